"""Which segments of a pack carry a tangent, and where the values of their rows lie in it.

A tangent exists for some segments of a pack, in an order of its own. Gathering the values that go with it
would write and read every one of them once more; the kernels read them where they are.

T rows and S segments of the pack, T' rows and S' segments that move, K chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tim_kernels.chunks import ChunkPlan
from tim_kernels.transfer import to_device


@dataclass(frozen=True, eq=False)
class TangentPlan:
    """Built once a batch on the host, moved once; nothing in it is read back.

    Shapes:
        segment_ids: int32 [T'], of the moving rows among the moving segments.
        chunks: int32 [K, 5], of each chunk: first row among those that move, number of rows, segment among
            those that move, first row in the pack, segment in the pack.
    """

    num_rows: int
    num_segments: int
    num_moving_rows: int
    num_moving_segments: int
    segment_ids: Tensor
    chunks: Tensor
    rows: slice | Tensor
    """Of the pack, those that move: a slice where they are neighbours in order, else int32 [T']."""
    segments: slice | Tensor
    """Of the pack, those that move: likewise, int32 [S']."""

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        moving: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
        rows_per_chunk: int | None = None,
    ) -> TangentPlan:
        """A pack of segments of `lengths` rows; the segments `moving` carry a tangent, in that order.

        Args:
            moving: all segments when not given; a length of zero and no segment at all are allowed.
            rows_per_chunk: most rows of a chunk; chosen from the number of rows when not given.
        Raises:
            ValueError: for a negative length, 2^31 rows or more, or a segment that is not in the pack.
        """
        moving = range(len(lengths)) if moving is None else moving
        check_segments("tangent plan: moving", moving, len(lengths))
        if any(n < 0 for n in lengths) or sum(lengths) >= 2**31:
            raise ValueError(
                "tangent plan: lengths: expected at least 0 each and fewer than 2^31 in all, "
                f"received {lengths}"
            )
        own = ChunkPlan.from_lengths([lengths[i] for i in moving], rows_per_chunk=rows_per_chunk)
        start = torch.tensor([0, *accumulate(lengths)])
        length_s, index_s = torch.tensor(lengths, dtype=torch.int64), torch.tensor(moving, dtype=torch.int64)
        own_start = torch.tensor([0, *accumulate(lengths[i] for i in moving)])
        # From a row among those that move to its row in the pack, by segment.
        offset = start[index_s] - own_start[:-1]
        segment_K = own.chunks[:, 2].long()
        first_K = own.chunks[:, 0] + offset[segment_K]
        chunks = torch.stack([*own.chunks.unbind(1), first_K, index_s[segment_K]], dim=1).to(torch.int32)
        num_moving_rows = int(own_start[-1])
        rows, segments = slice(0, 0), slice(0, 0)
        if len(moving) and list(moving) == list(range(moving[0], moving[0] + len(moving))):
            segments = slice(moving[0], moving[0] + len(moving))
            rows = slice(int(start[moving[0]]), int(start[moving[0]]) + num_moving_rows)
        elif len(moving):
            spread = torch.repeat_interleave(offset, length_s[index_s])
            rows, segments = (
                to_device(x.to(torch.int32), device)
                for x in (spread + torch.arange(num_moving_rows), index_s)
            )
        return cls(
            sum(lengths),
            len(lengths),
            num_moving_rows,
            len(moving),
            to_device(own.segment_ids, device),
            to_device(chunks.contiguous(), device),
            rows,
            segments,
        )

    @property
    def num_chunks(self) -> int:
        return self.chunks.shape[0]

    def rows_of(self, x: Tensor) -> Tensor:
        """The moving rows of a tensor with a row a token of the pack."""
        return x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)

    def segments_of(self, x: Tensor) -> Tensor:
        """The moving segments of a tensor with a row a segment of the pack."""
        return x[self.segments] if isinstance(self.segments, slice) else x.index_select(0, self.segments)


def check_segments(name: str, chosen: Sequence[int], count: int) -> None:
    """Raises ValueError unless every chosen segment is among `count`."""
    if any(not 0 <= i < count for i in chosen):
        raise ValueError(f"{name}: expected segments among {count}, received {list(chosen)}")
