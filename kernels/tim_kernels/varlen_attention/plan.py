"""Which keys each query sees: segments of two packed sequences, paired in order.

T query tokens, L key tokens, S segments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from tim_kernels.transfer import to_device


@dataclass(frozen=True, eq=False)
class DenseGroup:
    """Segments that run as one dense batch: equal query length, key lengths padded to `max_k`."""

    num: int
    length_q: int
    max_k: int
    mask: Tensor | None
    """bool [num, 1, 1, max_k], True where a key is real; None when nothing is padded."""


@dataclass(frozen=True, eq=False)
class DenseGroups:
    """A pack as dense batches, and the order of tokens that lines them up."""

    groups: tuple[DenseGroup, ...]
    index_q: Tensor | None
    """int64 [T]: query tokens in group order; None when they are in that order already."""
    index_k: Tensor | None
    """int64: key tokens in group order, padding repeats the segment's own first key."""
    inverse_q: Tensor | None


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Built once a batch on the host from the segments' lengths; nothing in it is read back from the device.

    Shapes:
        cu_seqlens_q, cu_seqlens_k: int32 [S+1], from 0 to T and from 0 to L.
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int
    is_uniform: bool
    """Whether all segments have the same number of queries, and all the same number of keys."""
    filled: FilledSegments | None
    """The segments that have queries and keys, where some lack either: no kernel sees the others."""
    _groups: dict[bool, DenseGroups]
    """Built when first asked for: most backends do not need them."""

    @classmethod
    def from_lengths(
        cls,
        lengths_q: Sequence[int],
        lengths_k: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> AttentionPlan:
        """Pair query segment s with key segment s; either may be empty.

        Args:
            cu_seqlens_q, cu_seqlens_k: if the caller has them already; the plan then lives on their device.
        Raises:
            ValueError: for different numbers of segments, a negative length, or cu_seqlens that do not fit.
        """
        lengths_q, lengths_k = tuple(lengths_q), tuple(lengths_k)
        if len(lengths_q) != len(lengths_k):
            raise ValueError(
                f"attention plan: {len(lengths_q)} query segments but {len(lengths_k)} key segments"
            )
        if any(n < 0 for n in chain(lengths_q, lengths_k)):
            raise ValueError(f"attention plan: lengths below 0 among {lengths_q} and {lengths_k}")
        given = cu_seqlens_q if cu_seqlens_q is not None else cu_seqlens_k
        device = torch.device(device) if given is None else given.device
        cu_seqlens_q = _cumulative(lengths_q, device) if cu_seqlens_q is None else cu_seqlens_q
        cu_seqlens_k = _cumulative(lengths_k, device) if cu_seqlens_k is None else cu_seqlens_k
        for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if cu.shape != (len(lengths_q) + 1,) or cu.dtype != torch.int32 or cu.device != device:
                raise ValueError(
                    f"attention plan: {name}: expected int32 [{len(lengths_q) + 1}] on {device}, "
                    f"received {cu.dtype} {list(cu.shape)} on {cu.device}"
                )
        filled = _filled(lengths_q, lengths_k, device)
        plan = cls(
            lengths_q,
            lengths_k,
            cu_seqlens_q,
            cu_seqlens_k,
            max(lengths_q, default=0),
            max(lengths_k, default=0),
            len(set(lengths_q)) <= 1 and len(set(lengths_k)) <= 1,
            filled,
            {},
        )
        if device.type == "cpu" and filled is None:
            # Every call on the CPU needs them; built here, they are inputs of a compiled model.
            _ = plan.padded_groups
        return plan

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens_q.device

    @property
    def num_queries(self) -> int:
        return sum(self.lengths_q)

    @property
    def num_keys(self) -> int:
        return sum(self.lengths_k)

    @property
    def padded_groups(self) -> DenseGroups:
        """One dense batch for each query length, keys padded and masked: few calls."""
        return self._grouped(pad_keys=True)

    @property
    def exact_groups(self) -> DenseGroups:
        """One dense batch for each pair of lengths: no masks."""
        return self._grouped(pad_keys=False)

    def _grouped(self, *, pad_keys: bool) -> DenseGroups:
        if pad_keys not in self._groups:
            self._groups[pad_keys] = _group(self.lengths_q, self.lengths_k, self.device, pad_keys=pad_keys)
        return self._groups[pad_keys]


@dataclass(frozen=True, eq=False)
class FilledSegments:
    """The segments of a pack that have queries and keys, as a pack of their own.

    Shapes:
        index_q, index_k: int64, their tokens in the whole pack; None where those are all tokens.
    """

    plan: AttentionPlan
    index_q: Tensor | None
    index_k: Tensor | None


def _filled(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], device: torch.device
) -> FilledSegments | None:
    kept = [i for i, (n_q, n_k) in enumerate(zip(lengths_q, lengths_k, strict=True)) if n_q and n_k]
    if len(kept) == len(lengths_q):
        return None
    chosen_q, chosen_k = ([lengths[i] for i in kept] for lengths in (lengths_q, lengths_k))
    return FilledSegments(
        AttentionPlan.from_lengths(chosen_q, chosen_k, device=device),
        _index(_tokens(kept, lengths_q), sum(lengths_q), device),
        _index(_tokens(kept, lengths_k), sum(lengths_k), device),
    )


def _group(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], device: torch.device, *, pad_keys: bool
) -> DenseGroups:
    """A padded slot repeats a key of its own segment and is masked: no foreign NaN comes near."""
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (n_q, n_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        members[n_q, 0 if pad_keys else n_k].append(i)
    start_k = _starts(lengths_k)
    groups: list[DenseGroup] = []
    order_q: list[int] = []
    order_k: list[int] = []
    for (n_q, _), chosen in members.items():
        chosen_k = [lengths_k[i] for i in chosen]
        max_k = max(chosen_k)
        mask = None
        if min(chosen_k) < max_k:
            mask = torch.arange(max_k) < torch.tensor(chosen_k)[:, None]
            mask = to_device(mask[:, None, None, :], device)
        order_q += _tokens(chosen, lengths_q)
        for i in chosen:
            order_k += range(start_k[i], start_k[i + 1])
            order_k += [start_k[i]] * (max_k - lengths_k[i])
        groups.append(DenseGroup(len(chosen), n_q, max_k, mask))
    index_q = _index(order_q, sum(lengths_q), device)
    inverse = None if index_q is None else to_device(torch.argsort(torch.tensor(order_q)), device)
    return DenseGroups(tuple(groups), index_q, _index(order_k, sum(lengths_k), device), inverse)


def _starts(lengths: tuple[int, ...]) -> list[int]:
    return [0, *accumulate(lengths)]


def _tokens(segments: list[int], lengths: tuple[int, ...]) -> list[int]:
    """Positions of the tokens of `segments`, in that order."""
    starts = _starts(lengths)
    return list(chain.from_iterable(range(starts[i], starts[i + 1]) for i in segments))


def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return to_device(torch.tensor(_starts(lengths), dtype=torch.int32), device)


def _index(order: list[int], total: int, device: torch.device) -> Tensor | None:
    if len(order) == total and order == list(range(total)):
        return None
    return to_device(torch.tensor(order, dtype=torch.int64), device)
