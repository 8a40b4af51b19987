"""Rows whose width is not a power of two: a row is held as up to three column blocks, and columns as a tuple.

Padding 1152 columns to 2048 leaves 44 % of the lanes idle and halves occupancy; 1024 + 128 leaves none.
"""

# Triton compiles the concatenation of tuples, not their unpacking; its loops and arguments have no types.
# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from tim_kernels.schedule import schedule_of

MAX_BLOCKS = 3
MAX_WARPS = 16
WIDEST_IN_STAGES = 2048
"""Columns of a row up to which the next rows fit into shared memory beside those of other programs."""


def column_blocks(width: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of the blocks that cover `width` columns; only the last may reach beyond it.

    Sizes are the largest powers of two that fit; the third and last is rounded up. No lane is idle when at
    most three bits of `width` are set (1152 = 1024 + 128, 1408 = 1024 + 256 + 128); at worst one in eight is.
    """
    blocks = []
    start = 0
    while start < width:
        rest = width - start
        floor = 1 << (rest.bit_length() - 1)
        is_last = len(blocks) == MAX_BLOCKS - 1
        size = 1 << (rest - 1).bit_length() if is_last else floor
        blocks.append((start, size))
        start += size
    return tuple(blocks)


def row_options(width: int, kernel: str) -> dict[str, Any]:
    """Compile-time arguments and warps of a kernel that works on one row of `width` columns at a time.

    A wide row alone is enough to keep the memory busy: it is read in its turn.
    """
    schedule = schedule_of(kernel)
    warps = 1
    while warps < MAX_WARPS and width > warps * schedule.columns_per_warp:
        warps *= 2
    stages = schedule.stages if width <= WIDEST_IN_STAGES else 1
    return {"D": width, "BLOCKS": column_blocks(width), "STAGES": stages, "num_warps": warps}


@triton.constexpr_function
def smallest_block(blocks: Any) -> int:
    return min(size for _, size in blocks)


@triton.jit
def load_row(row_ptr, D: tl.constexpr, BLOCKS: tl.constexpr):
    """One row as a tuple of float32 blocks; lanes beyond D hold 0."""
    parts = ()
    for b in tl.static_range(len(BLOCKS)):
        column = BLOCKS[b][0] + tl.arange(0, BLOCKS[b][1])
        if BLOCKS[b][0] + BLOCKS[b][1] <= D:
            value = tl.load(row_ptr + column)
        else:
            value = tl.load(row_ptr + column, mask=column < D, other=0.0)
        parts = parts + (value.to(tl.float32),)
    return parts


@triton.jit
def store_row(row_ptr, parts, D: tl.constexpr, BLOCKS: tl.constexpr):
    """Store a row in the dtype of the pointer."""
    for b in tl.static_range(len(BLOCKS)):
        column = BLOCKS[b][0] + tl.arange(0, BLOCKS[b][1])
        value = parts[b].to(row_ptr.dtype.element_ty)
        if BLOCKS[b][0] + BLOCKS[b][1] <= D:
            tl.store(row_ptr + column, value)
        else:
            tl.store(row_ptr + column, value, mask=column < D)


@triton.jit
def zero_row(BLOCKS: tl.constexpr):
    parts = ()
    for b in tl.static_range(len(BLOCKS)):
        parts = parts + (tl.zeros_like(tl.arange(0, BLOCKS[b][1])).to(tl.float32),)
    return parts


@triton.jit
def fold_row(parts, BLOCKS: tl.constexpr):
    """Sums of neighbouring columns, so that all blocks are of the size of the smallest, added up."""
    SIZE: tl.constexpr = smallest_block(BLOCKS)
    total = tl.sum(tl.reshape(parts[0], (SIZE, BLOCKS[0][1] // SIZE)), 1)
    for b in tl.static_range(1, len(BLOCKS)):
        total += tl.sum(tl.reshape(parts[b], (SIZE, BLOCKS[b][1] // SIZE)), 1)
    return total


@triton.jit
def mean_of_row(parts, D: tl.constexpr, BLOCKS: tl.constexpr):
    """Mean over the D columns; lanes beyond them must hold 0."""
    return tl.sum(fold_row(parts, BLOCKS), 0) * (1.0 / D)


@triton.jit
def means_of_rows(a, b, D: tl.constexpr, BLOCKS: tl.constexpr):
    """Both means in one exchange between the warps."""
    both = tl.sum(tl.join(fold_row(a, BLOCKS), fold_row(b, BLOCKS)), 0)
    mean_a, mean_b = tl.split(both * (1.0 / D))
    return mean_a, mean_b


@triton.jit
def centred_row(parts, mean, D: tl.constexpr, BLOCKS: tl.constexpr):
    """parts - mean, with 0 kept in the lanes beyond D."""
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        value = parts[b] - mean
        if BLOCKS[b][0] + BLOCKS[b][1] > D:
            column = BLOCKS[b][0] + tl.arange(0, BLOCKS[b][1])
            value = tl.where(column < D, value, 0.0)
        out = out + (value,)
    return out


@triton.jit
def one_plus_row(a, BLOCKS: tl.constexpr):
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        out = out + (1.0 + a[b],)
    return out


@triton.jit
def scale_row(a, factor, BLOCKS: tl.constexpr):
    """a * factor, a scalar."""
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        out = out + (a[b] * factor,)
    return out


@triton.jit
def add_rows(a, b, BLOCKS: tl.constexpr):
    out = ()
    for i in tl.static_range(len(BLOCKS)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def multiply_rows(a, b, BLOCKS: tl.constexpr):
    out = ()
    for i in tl.static_range(len(BLOCKS)):
        out = out + (a[i] * b[i],)
    return out


@triton.jit
def multiply_add_rows(a, b, c, BLOCKS: tl.constexpr):
    """a * b + c."""
    out = ()
    for i in tl.static_range(len(BLOCKS)):
        out = out + (a[i] * b[i] + c[i],)
    return out


@triton.jit
def carry_gate(d_x, branch, d_branch, gate, d_gate, BLOCKS: tl.constexpr):
    """Tangent of x + gate * branch."""
    out = ()
    for i in tl.static_range(len(BLOCKS)):
        out = out + (d_x[i] + (d_gate[i] * branch[i] + gate[i] * d_branch[i]),)
    return out


@triton.jit
def round_row(a, like_ptr, BLOCKS: tl.constexpr):
    """a as it reads back after a store through `like_ptr`."""
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        out = out + (a[b].to(like_ptr.dtype.element_ty).to(tl.float32),)
    return out
