"""The second half of every per-segment reduction: add the partial sums of each segment's chunks, in order.

S segments, K chunks, W columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tim_kernels.chunks import ChunkPlan

COLUMNS = 64
OPTIONS: dict[str, Any] = {"COLUMNS": COLUMNS, "CHUNKS_AT_ONCE": 32, "num_warps": 4}


@triton.jit
def segment_sum_kernel(
    partial_ptr,
    first_chunk_ptr,
    out_ptr,
    row_size,
    COLUMNS: tl.constexpr,
    CHUNKS_AT_ONCE: tl.constexpr,
):
    """out[s] = sum of partial[k] over the chunks k of s; one program a segment and block of columns."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, CHUNKS_AT_ONCE)
    begin = tl.load(first_chunk_ptr + segment)
    end = tl.load(first_chunk_ptr + segment + 1)
    total = tl.zeros((CHUNKS_AT_ONCE, COLUMNS), tl.float32)
    for start in range(begin, end, CHUNKS_AT_ONCE):
        chunk = (start + row).to(tl.int64)
        mask = (chunk < end)[:, None] & (column < row_size)[None, :]
        total += tl.load(partial_ptr + chunk[:, None] * row_size + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + segment * row_size + column, tl.sum(total, 0), mask=column < row_size)


def segment_sum(partial_KW: Tensor, plan: ChunkPlan) -> Tensor:
    """Per-segment sums of float32 chunk sums: [K, ...] -> [S, ...]. A segment without chunks gives 0."""
    out = torch.empty(
        (plan.num_segments, *partial_KW.shape[1:]), dtype=torch.float32, device=partial_KW.device
    )
    row_size = out[0].numel() if plan.num_segments else 0
    if row_size:
        grid = (plan.num_segments, triton.cdiv(row_size, COLUMNS))
        segment_sum_kernel[grid](
            partial_KW,
            plan.first_chunk,
            out,
            row_size,
            **OPTIONS,
        )
    return out
