"""Row chunks: how a pack of segments is cut for kernels that reduce over the tokens of each segment.

A chunk is a run of consecutive rows of one segment. One program works on one chunk, keeps its part of a
per-segment sum in registers and stores it once; a second kernel adds the parts of each segment in a fixed
order. No atomics, so that gradients are bitwise repeatable.

T rows (tokens) of the pack, S segments, K chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tim_kernels.schedule import RUN, schedule_of
from tim_kernels.transfer import to_device

MIN_ROWS_PER_CHUNK = 4
MIN_CHUNKS = 512
"""About four programs for each multiprocessor of a large GPU; smaller packs are cut finer to reach it."""


@dataclass(frozen=True, eq=False)
class ChunkPlan:
    """Built once a batch on the host from the segments' lengths, moved once; nothing in it is read back.

    Shapes:
        segment_ids: int32 or int64 [T].   chunks: int32 [K, 3], (first row, rows, segment) of each chunk.
        first_chunk: int32 [S+1], the chunks of segment s are first_chunk[s] .. first_chunk[s+1] - 1.
    """

    num_rows: int
    num_segments: int
    segment_ids: Tensor
    chunks: Tensor
    first_chunk: Tensor

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        segment_ids: Tensor | None = None,
        rows_per_chunk: int | None = None,
    ) -> ChunkPlan:
        """Cut segments of `lengths` rows; a length of zero is allowed.

        Args:
            segment_ids: [T], if the caller has it already; the plan then lives on its device.
            rows_per_chunk: most rows of a chunk; chosen from the number of rows when not given.
        Raises:
            ValueError: for a negative length, 2^31 rows or more, or segment_ids that do not fit.
        """
        num_rows = sum(lengths)
        if any(n < 0 for n in lengths) or num_rows >= 2**31:
            raise ValueError(
                f"segment lengths: expected at least 0 each and fewer than 2^31 in all, received {lengths}"
            )
        rows = _rows_per_chunk(num_rows) if rows_per_chunk is None else rows_per_chunk
        if rows < 1:
            raise ValueError(f"rows_per_chunk: expected at least 1, received {rows}")
        length_S = torch.tensor(list(lengths), dtype=torch.int64)
        num_chunks_S = (length_S + (rows - 1)) // rows
        first_chunk = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(num_chunks_S, 0, out=first_chunk[1:])
        segment_K = torch.repeat_interleave(torch.arange(len(lengths)), num_chunks_S)
        # Row of the chunk's start within its segment.
        local_K = (torch.arange(segment_K.shape[0]) - first_chunk[segment_K]) * rows
        start_S = torch.cumsum(length_S, 0) - length_S
        count_K = (length_S[segment_K] - local_K).clamp(max=rows)
        chunks = torch.stack([start_S[segment_K] + local_K, count_K, segment_K], dim=1)
        if segment_ids is None:
            segment_ids = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), length_S)
            segment_ids = to_device(segment_ids, device)
        elif segment_ids.shape != (num_rows,):
            raise ValueError(f"segment_ids: expected [{num_rows}], received {list(segment_ids.shape)}")
        device = segment_ids.device
        return cls(
            num_rows,
            len(lengths),
            segment_ids,
            to_device(chunks.to(torch.int32).contiguous(), device),
            to_device(first_chunk.to(torch.int32), device),
        )

    @property
    def num_chunks(self) -> int:
        return self.chunks.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ChunkPlan:
        """The same plan with its tensors on `device`."""
        return replace(
            self,
            segment_ids=self.segment_ids.to(device, non_blocking=non_blocking),
            chunks=self.chunks.to(device, non_blocking=non_blocking),
            first_chunk=self.first_chunk.to(device, non_blocking=non_blocking),
        )


def _rows_per_chunk(num_rows: int) -> int:
    """The schedule's, halved until that leaves MIN_CHUNKS chunks."""
    rows = schedule_of(RUN).rows
    while rows > MIN_ROWS_PER_CHUNK and num_rows < rows * MIN_CHUNKS:
        rows //= 2
    return rows
