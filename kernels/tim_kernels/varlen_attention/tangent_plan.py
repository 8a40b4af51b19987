"""Which segments of a pack carry a tangent through attention, and which keys they read.

T query tokens and L key tokens of the pack, T' query tokens that move and L' key tokens that they read, S'
segments that move, M tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

import torch
from torch import Tensor

from tim_kernels.tangent_plan import check_segments
from tim_kernels.transfer import to_device
from tim_kernels.varlen_attention.plan import AttentionPlan

ROWS_PER_TILE = 128


@dataclass(frozen=True, eq=False)
class AttentionTangentPlan:
    """Built once a batch on the host, moved once; nothing in it is read back.

    Shapes:
        tiles: int32 [M, 6], of each tile of at most ROWS_PER_TILE queries of one segment: first query among
            those that move, number of queries, first query in the pack, first key among those that move,
            first key in the pack, number of keys.
    """

    num_queries: int
    num_keys: int
    moving: AttentionPlan
    """The moving segments and their keys as a pack of their own."""
    tiles: Tensor
    _chosen: tuple[tuple[int, ...], tuple[int, ...]]
    """Segments of queries and of keys, and where they start in the pack."""
    _starts: tuple[tuple[int, ...], tuple[int, ...]]
    _rows: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Of the chosen segments of queries (0) and keys (1), once somebody has asked: the definition does."""

    @classmethod
    def from_lengths(
        cls,
        lengths_q: Sequence[int],
        lengths_k: Sequence[int],
        moving: Sequence[int] | None = None,
        keys: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> AttentionTangentPlan:
        """Query segments `moving` carry a tangent, in that order; the i-th of them reads key segment keys[i].

        Args:
            moving: all query segments when not given.
            keys: `moving` when not given. A key segment may be read more than once.
        Raises:
            ValueError: for a segment that is not in the pack, or different numbers of both.
        """
        moving = tuple(range(len(lengths_q)) if moving is None else moving)
        keys = moving if keys is None else tuple(keys)
        check_segments("attention tangent plan: moving", moving, len(lengths_q))
        check_segments("attention tangent plan: keys", keys, len(lengths_k))
        own = AttentionPlan.from_lengths(
            [lengths_q[i] for i in moving], [lengths_k[i] for i in keys], device=device
        )
        starts_q, starts_k = (tuple([0, *accumulate(n)]) for n in (lengths_q, lengths_k))
        return cls(
            starts_q[-1],
            starts_k[-1],
            own,
            to_device(_tiles(own, [starts_q[i] for i in moving], [starts_k[i] for i in keys]), device),
            (moving, keys),
            (starts_q, starts_k),
        )

    @property
    def num_tiles(self) -> int:
        return self.tiles.shape[0]

    def queries_of(self, x: Tensor) -> Tensor:
        """The moving rows of a tensor with a row a query token of the pack."""
        return self._gather(x, 0)

    def keys_of(self, x: Tensor) -> Tensor:
        """The rows that are read, of a tensor with a row a key token of the pack."""
        return self._gather(x, 1)

    def _gather(self, x: Tensor, which: int) -> Tensor:
        chosen, starts = self._chosen[which], self._starts[which]
        if chosen == tuple(range(len(starts) - 1)):
            return x
        if which not in self._rows:
            rows = list(chain.from_iterable(range(starts[i], starts[i + 1]) for i in chosen))
            self._rows[which] = to_device(torch.tensor(rows, dtype=torch.int64), x.device)
        return x.index_select(0, self._rows[which])


def _tiles(own: AttentionPlan, start_q: list[int], start_k: list[int]) -> Tensor:
    length_s, start_s, keys_s = (
        torch.tensor(n, dtype=torch.int64) for n in (own.lengths_q, start_q, own.lengths_k)
    )
    own_q, own_k = length_s.cumsum(0) - length_s, keys_s.cumsum(0) - keys_s
    num_tiles_s = (length_s + (ROWS_PER_TILE - 1)) // ROWS_PER_TILE
    segment_M = torch.repeat_interleave(torch.arange(len(start_q)), num_tiles_s)
    first_tile_s = num_tiles_s.cumsum(0) - num_tiles_s
    # First query of the tile within its segment.
    local_M = (torch.arange(segment_M.shape[0]) - first_tile_s[segment_M]) * ROWS_PER_TILE
    columns = [
        own_q[segment_M] + local_M,
        (length_s[segment_M] - local_M).clamp(max=ROWS_PER_TILE),
        start_s[segment_M] + local_M,
        own_k[segment_M],
        torch.tensor(start_k, dtype=torch.int64)[segment_M],
        keys_s[segment_M],
    ]
    return torch.stack(columns, dim=1).to(torch.int32).contiguous()
