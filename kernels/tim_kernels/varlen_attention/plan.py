"""Which keys each query sees: segments of two packed sequences, paired in order.

T query tokens, L key tokens, S segments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Literal

import torch
from torch import Tensor

from tim_kernels.transfer import to_device

_Padding = Literal["none", "keys", "both"]

MERGED_LOGITS = 2**15
"""Up to so many logits a head, padding included, segments of all lengths are one dense batch: on a CPU the
calls that it saves take longer than what it adds."""


@dataclass(frozen=True, eq=False)
class DenseGroup:
    """Segments that run as one dense batch: query lengths padded to `length_q`, key lengths to `max_k`."""

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
    """int64: query tokens in group order, padding repeats the segment's own first query; None when they are
    in that order already."""
    index_k: Tensor | None
    """int64: key tokens in group order, padding repeats the segment's own first key."""
    inverse_q: Tensor | None
    """int64 [T]: where each query token stands in that order."""

    def queries(self, x: Tensor) -> list[Tensor]:
        """Each group's part of a tensor [tokens, N, H] in the order of `index_q`: [num, N, length_q, H]."""
        return _batches(x, [(g.num, g.length_q) for g in self.groups])

    def keys(self, x: Tensor) -> list[Tensor]:
        """Each group's part of a tensor [tokens, N, H] in the order of `index_k`: [num, N, max_k, H]."""
        return _batches(x, [(g.num, g.max_k) for g in self.groups])


def _batches(x: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    # One split, whose backward is one concatenation; slices would each be padded with zeros and added.
    parts = x.split([num * length for num, length in sizes])
    return [part.unflatten(0, size).transpose(1, 2) for part, size in zip(parts, sizes, strict=True)]


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
    _groups: dict[_Padding, DenseGroups]
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
        return self._grouped("keys")

    @property
    def exact_groups(self) -> DenseGroups:
        """One dense batch for each pair of lengths: no masks."""
        return self._grouped("none")

    @property
    def merged_groups(self) -> DenseGroups:
        """One dense batch of all, queries padded too, where that is small; else `padded_groups`."""
        is_small = len(self.lengths_q) * self.max_q * self.max_k <= MERGED_LOGITS
        return self._grouped("both" if is_small else "keys")

    def _grouped(self, padding: _Padding) -> DenseGroups:
        if padding not in self._groups:
            self._groups[padding] = _group(self.lengths_q, self.lengths_k, self.device, padding)
        return self._groups[padding]


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
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], device: torch.device, padding: _Padding
) -> DenseGroups:
    """A padded slot repeats a token of its own segment; as a key it is masked: no foreign NaN comes near."""
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (n_q, n_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        members[0 if padding == "both" else n_q, n_k if padding == "none" else 0].append(i)
    start_q, start_k = _starts(lengths_q), _starts(lengths_k)
    groups: list[DenseGroup] = []
    order_q: list[int] = []
    order_k: list[int] = []
    place_q = [0] * start_q[-1]
    for chosen in members.values():
        length_q, chosen_k = max(lengths_q[i] for i in chosen), [lengths_k[i] for i in chosen]
        max_k = max(chosen_k)
        mask = None
        if min(chosen_k) < max_k:
            mask = torch.arange(max_k) < torch.tensor(chosen_k)[:, None]
            mask = to_device(mask[:, None, None, :], device)
        for i in chosen:
            place_q[start_q[i] : start_q[i + 1]] = range(len(order_q), len(order_q) + lengths_q[i])
            order_q += _padded(start_q[i], lengths_q[i], length_q)
            order_k += _padded(start_k[i], lengths_k[i], max_k)
        groups.append(DenseGroup(len(chosen), length_q, max_k, mask))
    index_q = _index(order_q, start_q[-1], device)
    inverse = None if index_q is None else to_device(torch.tensor(place_q, dtype=torch.int64), device)
    return DenseGroups(tuple(groups), index_q, _index(order_k, start_k[-1], device), inverse)


def _padded(start: int, length: int, slots: int) -> list[int]:
    """Tokens of one segment, its first again in the slots that are left."""
    return [*range(start, start + length), *[start] * (slots - length)]


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
