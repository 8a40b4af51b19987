"""Triton kernel of the tangent: a program takes a chunk of rows of one segment, row by row.

Mean and deviation are taken from x' again: reading them back would save no bytes that matter, and the two
sums run beside those of the tangent.

T rows of the pack, T' rows that move, S and S' segments, D width, K chunks.
"""

# Triton compiles the concatenation of tuples, not their unpacking.
# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tim_kernels.checks import unit_column_stride
from tim_kernels.columns import (
    carry_gate,
    centred_row,
    load_row,
    means_of_rows,
    multiply_rows,
    round_row,
    row_options,
    store_row,
)
from tim_kernels.on_device import on_own_device
from tim_kernels.tangent_plan import TangentPlan


def jvp_options(width: int) -> dict[str, Any]:
    return row_options(width, "modulated_layer_norm_jvp")


@triton.jit
def modulate(centred, d_centred, rstd, along, scale, d_shift, d_scale, BLOCKS: tl.constexpr):
    """Tangent of normal * (1 + scale) + shift, with normal = centred * rstd."""
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        d_normal = rstd * (d_centred[b] - centred[b] * along)
        out = out + (d_normal * (1.0 + scale[b]) + (centred[b] * rstd) * d_scale[b] + d_shift[b],)
    return out


@triton.jit
def jvp_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    d_x_ptr,
    d_branch_ptr,
    d_gate_ptr,
    d_shift_ptr,
    d_scale_ptr,
    d_x_new_ptr,
    d_h_ptr,
    chunks_ptr,
    x_stride,
    branch_stride,
    gate_stride,
    scale_stride,
    d_x_stride,
    d_branch_stride,
    d_gate_stride,
    d_shift_stride,
    d_scale_stride,
    eps,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x is x', with its residual added. Without a branch, what belongs to it and d_x_new_ptr are None."""
    chunk_ptr = chunks_ptr + tl.program_id(0) * 5
    first_moving = tl.load(chunk_ptr).to(tl.int64)
    num_rows = tl.load(chunk_ptr + 1)
    moving_segment = tl.load(chunk_ptr + 2).to(tl.int64)
    first_row = tl.load(chunk_ptr + 3).to(tl.int64)
    segment = tl.load(chunk_ptr + 4).to(tl.int64)
    scale = load_row(scale_ptr + segment * scale_stride, D, BLOCKS)
    d_shift = load_row(d_shift_ptr + moving_segment * d_shift_stride, D, BLOCKS)
    d_scale = load_row(d_scale_ptr + moving_segment * d_scale_stride, D, BLOCKS)
    if branch_ptr is not None:
        gate = load_row(gate_ptr + segment * gate_stride, D, BLOCKS)
        d_gate = load_row(d_gate_ptr + moving_segment * d_gate_stride, D, BLOCKS)
    for i in tl.range(0, num_rows, num_stages=STAGES):
        row = first_row + i
        moving = first_moving + i
        x = load_row(x_ptr + row * x_stride, D, BLOCKS)
        d_x = load_row(d_x_ptr + moving * d_x_stride, D, BLOCKS)
        if branch_ptr is not None:
            branch = load_row(branch_ptr + row * branch_stride, D, BLOCKS)
            d_branch = load_row(d_branch_ptr + moving * d_branch_stride, D, BLOCKS)
            # The norm's tangent is that of the stored one, which the next block starts from.
            d_x = round_row(carry_gate(d_x, branch, d_branch, gate, d_gate, BLOCKS), d_x_new_ptr, BLOCKS)
            store_row(d_x_new_ptr + moving * D, d_x, D, BLOCKS)
        mean, d_mean = means_of_rows(x, d_x, D, BLOCKS)
        centred = centred_row(x, mean, D, BLOCKS)
        d_centred = centred_row(d_x, d_mean, D, BLOCKS)
        squares = multiply_rows(centred, centred, BLOCKS)
        products = multiply_rows(centred, d_centred, BLOCKS)
        variance, covariance = means_of_rows(squares, products, D, BLOCKS)
        rstd = tl.rsqrt(variance + eps)
        along = covariance * rstd * rstd
        d_h = modulate(centred, d_centred, rstd, along, scale, d_shift, d_scale, BLOCKS)
        store_row(d_h_ptr + moving * D, d_h, D, BLOCKS)


@on_own_device
def launch_jvp(
    x_TD: Tensor,
    d_x_TD: Tensor,
    branch_TD: Tensor | None,
    d_branch_TD: Tensor | None,
    gate_SD: Tensor | None,
    d_gate_SD: Tensor | None,
    scale_SD: Tensor,
    d_shift_SD: Tensor,
    d_scale_SD: Tensor,
    plan: TangentPlan,
    eps: float,
    h_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """d_x' (d_x itself without a branch) and d_h."""
    x, d_x, scale, d_shift, d_scale = map(
        unit_column_stride, (x_TD, d_x_TD, scale_SD, d_shift_SD, d_scale_SD)
    )
    branch, d_branch, gate, d_gate = (
        None if y is None else unit_column_stride(y) for y in (branch_TD, d_branch_TD, gate_SD, d_gate_SD)
    )
    d_x_new = None if branch is None else torch.empty(d_x.shape, dtype=d_x.dtype, device=d_x.device)
    d_h = torch.empty(d_x.shape, dtype=h_dtype, device=d_x.device)
    if plan.num_chunks:
        jvp_kernel[(plan.num_chunks,)](
            x,
            branch,
            gate,
            scale,
            d_x,
            d_branch,
            d_gate,
            d_shift,
            d_scale,
            d_x_new,
            d_h,
            plan.chunks,
            x.stride(0),
            0 if branch is None else branch.stride(0),
            0 if gate is None else gate.stride(0),
            scale.stride(0),
            d_x.stride(0),
            0 if d_branch is None else d_branch.stride(0),
            0 if d_gate is None else d_gate.stride(0),
            d_shift.stride(0),
            d_scale.stride(0),
            eps,
            **jvp_options(x.shape[1]),
        )
    return d_x_TD if d_x_new is None else d_x_new, d_h
