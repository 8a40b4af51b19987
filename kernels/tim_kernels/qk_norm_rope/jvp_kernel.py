"""Triton kernel of the tangent: a program of one warp takes some heads of one part of a chunk of rows.

The Jacobian of a LayerNorm is symmetric, so the tangent goes through the arithmetic of its backward, and then
through the affine weight and the rotation in their forward order.

T rows of the pack, T' rows that move, N heads, H head width, S and S' segments, P parts of a packed row.
"""

# A test for None must stand alone, to be decided at compile time.
# ruff: noqa: SIM102
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAssignmentType=false
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tim_kernels.on_device import on_own_device
from tim_kernels.qk_norm_rope.kernel import (
    Layout,
    add,
    head_options,
    load_angles,
    load_heads,
    load_vector,
    mean_of_heads,
    multiply,
    normalise,
    normalise_backward,
    rotate,
    scale_columns,
    store_heads,
    table_tensors,
)
from tim_kernels.qk_norm_rope.table import RotaryTable
from tim_kernels.tangent_plan import TangentPlan


def jvp_options(num_heads: int, head_dim: int) -> dict[str, Any]:
    return head_options(num_heads, head_dim, "qk_norm_rope_jvp")


@triton.jit
def jvp_part(
    d_x_ptr,
    d_shift_ptr,
    x_ptr,
    shift_ptr,
    d_out_ptr,
    weight_ptr,
    table,
    run,
    x_stride,
    d_x_stride,
    eps,
    N: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One part of a run (first row among the moving, first row in the pack, count)."""
    cos_ptr = table[0]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    if weight_ptr is not None:
        weight_even, weight_odd = load_vector(weight_ptr, H, BLOCKS)
    # Kept in registers: read anew for each row, they would pass through shared memory as the rows do.
    if d_shift_ptr is not None:
        d_shift_even, d_shift_odd = load_heads(d_shift_ptr, head, N, H, HEADS, BLOCKS)
    if shift_ptr is not None:
        shift_even, shift_odd = load_heads(shift_ptr, head, N, H, HEADS, BLOCKS)
    for i in tl.range(0, run[2], num_stages=STAGES):
        moving = run[0] + i
        row = run[1] + i
        d_even, d_odd = load_heads(d_x_ptr + moving * d_x_stride, head, N, H, HEADS, BLOCKS)
        if weight_ptr is not None:
            even, odd = load_heads(x_ptr + row * x_stride, head, N, H, HEADS, BLOCKS)
        if cos_ptr is not None:
            a = tl.load(table[2] + row)
            b = tl.load(table[3] + row)
            cos = load_angles(cos_ptr, a, b, H, BLOCKS)
            sin = load_angles(table[1], a, b, H, BLOCKS)
        if d_shift_ptr is not None:
            d_even = add(d_even, d_shift_even, BLOCKS)
            d_odd = add(d_odd, d_shift_odd, BLOCKS)
        if weight_ptr is not None:
            if shift_ptr is not None:
                even = add(even, shift_even, BLOCKS)
                odd = add(odd, shift_odd, BLOCKS)
            even, odd, rstd = normalise(even, odd, eps, H, BLOCKS)
            mean = mean_of_heads(d_even, d_odd, H, BLOCKS)
            along_even = multiply(d_even, even, BLOCKS)
            along_odd = multiply(d_odd, odd, BLOCKS)
            projection = mean_of_heads(along_even, along_odd, H, BLOCKS)
            d_even = normalise_backward(d_even, even, mean, projection, rstd, BLOCKS)
            d_odd = normalise_backward(d_odd, odd, mean, projection, rstd, BLOCKS)
            d_even = scale_columns(d_even, weight_even, BLOCKS)
            d_odd = scale_columns(d_odd, weight_odd, BLOCKS)
        if cos_ptr is not None:
            d_even, d_odd = rotate(d_even, d_odd, cos, sin, BLOCKS, False)
        store_heads(d_out_ptr + moving * (N * H), d_even, d_odd, head, N, H, HEADS, BLOCKS)


@triton.jit
def jvp_kernel(
    d_x_ptr,
    d_shift_ptr,
    x_ptr,
    shift_ptr,
    d_first_ptr,
    d_second_ptr,
    d_plain_ptr,
    first_weight_ptr,
    second_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_a_ptr,
    position_b_ptr,
    chunks_ptr,
    d_x_stride,
    d_shift_stride,
    x_stride,
    shift_stride,
    eps,
    N: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid and parts as in the forward. Positions are those of the whole pack.

    x_ptr and shift_ptr are None without a norm: what is left is linear.
    """
    chunk_ptr = chunks_ptr + tl.program_id(0) * 5
    first_moving = tl.load(chunk_ptr).to(tl.int64)
    count = tl.load(chunk_ptr + 1)
    first_row = tl.load(chunk_ptr + 3).to(tl.int64)
    part = tl.program_id(2)
    d_x_ptr += part * (N * H)
    if d_shift_ptr is not None:
        d_shift_ptr += tl.load(chunk_ptr + 2).to(tl.int64) * d_shift_stride + part * (N * H)
    if x_ptr is not None:
        x_ptr += part * (N * H)
    if shift_ptr is not None:
        shift_ptr += tl.load(chunk_ptr + 4).to(tl.int64) * shift_stride + part * (N * H)
    table = (cos_ptr, sin_ptr, position_a_ptr, position_b_ptr)
    run = (first_moving, first_row, count)
    if part == 0:
        jvp_part(
            d_x_ptr, d_shift_ptr, x_ptr, shift_ptr, d_first_ptr, first_weight_ptr, table, run,
            x_stride, d_x_stride, eps, N, H, HEADS, BLOCKS, STAGES,
        )  # fmt: skip
    if d_second_ptr is not None:
        if part == 1:
            jvp_part(
                d_x_ptr, d_shift_ptr, x_ptr, shift_ptr, d_second_ptr, second_weight_ptr, table, run,
                x_stride, d_x_stride, eps, N, H, HEADS, BLOCKS, STAGES,
            )  # fmt: skip
    if d_plain_ptr is not None:
        PLAIN: tl.constexpr = 1 if d_second_ptr is None else 2
        none = (None, None, None, None)
        if part == PLAIN:
            jvp_part(
                d_x_ptr, d_shift_ptr, None, None, d_plain_ptr, None, none, run,
                x_stride, d_x_stride, eps, N, H, HEADS, BLOCKS, STAGES,
            )  # fmt: skip


@on_own_device
def launch_jvp(
    d_x: Tensor,
    d_shift_SE: Tensor | None,
    x: Tensor,
    shift_SE: Tensor | None,
    weights: Sequence[Tensor],
    table: RotaryTable | None,
    plan: TangentPlan,
    layout: Layout,
    eps: float,
) -> list[Tensor]:
    """The parts of the tangent, each [T', N, H]; a plain part only where there is a shift to add to it.

    Args:
        d_x, x: rows of adjacent heads, [T', ...] and [T, ...].
        weights: of the normalised parts; none without a norm.
    """
    num_rows, has_norm = d_x.shape[0], len(weights) > 0
    with_plain = layout.has_plain and d_shift_SE is not None
    shape = (num_rows, layout.num_heads, layout.head_dim)
    outputs = [
        torch.empty(shape, dtype=d_x.dtype, device=d_x.device) for _ in range(layout.num_normed + with_plain)
    ]
    options = jvp_options(layout.num_heads, layout.head_dim)
    if plan.num_chunks:
        groups = -(-layout.num_heads // options["HEADS"])
        jvp_kernel[(plan.num_chunks, groups, len(outputs))](
            layout.first_parts(d_x, len(outputs)),
            d_shift_SE,
            layout.first_parts(x, layout.num_normed) if has_norm else None,
            shift_SE if has_norm else None,
            outputs[0],
            outputs[1] if layout.num_normed == 2 else None,
            outputs[-1] if with_plain else None,
            weights[0].contiguous() if has_norm else None,
            weights[1].contiguous() if len(weights) == 2 else None,
            *table_tensors(table),
            plan.chunks,
            d_x.stride(0),
            0 if d_shift_SE is None else d_shift_SE.stride(0),
            x.stride(0) if has_norm else 0,
            0 if shift_SE is None or not has_norm else shift_SE.stride(0),
            eps,
            **options,
        )
    return outputs
