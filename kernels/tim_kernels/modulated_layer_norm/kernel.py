"""Triton kernels: a program takes a chunk of rows of one segment, row by row; modulation stays in registers.

T tokens, S segments, D width, K chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tim_kernels.checks import unit_column_stride
from tim_kernels.chunks import ChunkPlan
from tim_kernels.columns import (
    add_rows,
    centred_row,
    load_row,
    mean_of_row,
    means_of_rows,
    multiply_add_rows,
    multiply_rows,
    one_plus_row,
    round_row,
    row_options,
    scale_row,
    store_row,
    zero_row,
)
from tim_kernels.on_device import on_own_device
from tim_kernels.segment_sum import segment_sum


def forward_options(width: int) -> dict[str, Any]:
    return row_options(width, "modulated_layer_norm forward")


def backward_options(width: int) -> dict[str, Any]:
    return row_options(width, "modulated_layer_norm backward")


@triton.jit
def forward_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    x_new_ptr,
    h_ptr,
    statistics_ptr,
    chunks_ptr,
    x_stride,
    branch_stride,
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Without a branch, branch_ptr, gate_ptr and x_new_ptr are None."""
    chunk_ptr = chunks_ptr + tl.program_id(0) * 3
    first_row = tl.load(chunk_ptr).to(tl.int64)
    num_rows = tl.load(chunk_ptr + 1)
    segment = tl.load(chunk_ptr + 2).to(tl.int64)
    shift = load_row(shift_ptr + segment * shift_stride, D, BLOCKS)
    factor = one_plus_row(load_row(scale_ptr + segment * scale_stride, D, BLOCKS), BLOCKS)
    if branch_ptr is not None:
        gate = load_row(gate_ptr + segment * gate_stride, D, BLOCKS)
    for i in tl.range(0, num_rows, num_stages=STAGES):
        row = first_row + i
        x = load_row(x_ptr + row * x_stride, D, BLOCKS)
        if branch_ptr is not None:
            branch = load_row(branch_ptr + row * branch_stride, D, BLOCKS)
            # The statistics are those of the stored value: the backward starts from it.
            x = round_row(multiply_add_rows(gate, branch, x, BLOCKS), x_new_ptr, BLOCKS)
            store_row(x_new_ptr + row * D, x, D, BLOCKS)
        mean = mean_of_row(x, D, BLOCKS)
        centred = centred_row(x, mean, D, BLOCKS)
        rstd = tl.rsqrt(mean_of_row(multiply_rows(centred, centred, BLOCKS), D, BLOCKS) + eps)
        tl.store(statistics_ptr + row * 2, mean)
        tl.store(statistics_ptr + row * 2 + 1, rstd)
        normal = scale_row(centred, rstd, BLOCKS)
        store_row(h_ptr + row * D, multiply_add_rows(normal, factor, shift, BLOCKS), D, BLOCKS)


@triton.jit
def backward_kernel(
    d_h_ptr,
    d_x_new_ptr,
    x_new_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    statistics_ptr,
    d_x_ptr,
    d_branch_ptr,
    partial_ptr,
    chunks_ptr,
    d_h_stride,
    d_x_new_stride,
    x_new_stride,
    branch_stride,
    gate_stride,
    scale_stride,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial [K, 2 or 3, D]: this chunk's sums for shift, scale and (with a branch) gate.

    d_x_new_ptr is None where nothing but the norm used x'.
    """
    chunk = tl.program_id(0).to(tl.int64)
    first_row = tl.load(chunks_ptr + chunk * 3).to(tl.int64)
    num_rows = tl.load(chunks_ptr + chunk * 3 + 1)
    segment = tl.load(chunks_ptr + chunk * 3 + 2).to(tl.int64)
    factor = one_plus_row(load_row(scale_ptr + segment * scale_stride, D, BLOCKS), BLOCKS)
    d_shift = zero_row(BLOCKS)
    d_scale = zero_row(BLOCKS)
    if branch_ptr is not None:
        gate = load_row(gate_ptr + segment * gate_stride, D, BLOCKS)
        d_gate = zero_row(BLOCKS)
    for i in tl.range(0, num_rows, num_stages=STAGES):
        row = first_row + i
        d_h = load_row(d_h_ptr + row * d_h_stride, D, BLOCKS)
        x_new = load_row(x_new_ptr + row * x_new_stride, D, BLOCKS)
        if d_x_new_ptr is not None:
            d_residual = load_row(d_x_new_ptr + row * d_x_new_stride, D, BLOCKS)
        if branch_ptr is not None:
            branch = load_row(branch_ptr + row * branch_stride, D, BLOCKS)
        mean = tl.load(statistics_ptr + row * 2)
        rstd = tl.load(statistics_ptr + row * 2 + 1)

        normal = scale_row(centred_row(x_new, mean, D, BLOCKS), rstd, BLOCKS)
        d_normal = multiply_rows(d_h, factor, BLOCKS)
        along = multiply_rows(d_normal, normal, BLOCKS)
        mean_of_d, projection = means_of_rows(d_normal, along, D, BLOCKS)
        centred = centred_row(d_normal, mean_of_d, D, BLOCKS)
        d_x = add_rows(centred, scale_row(normal, -projection, BLOCKS), BLOCKS)
        d_x = scale_row(d_x, rstd, BLOCKS)
        if d_x_new_ptr is not None:
            d_x = add_rows(d_x, d_residual, BLOCKS)
        store_row(d_x_ptr + row * D, d_x, D, BLOCKS)
        d_shift = add_rows(d_shift, d_h, BLOCKS)
        d_scale = multiply_add_rows(d_h, normal, d_scale, BLOCKS)
        if branch_ptr is not None:
            store_row(d_branch_ptr + row * D, multiply_rows(d_x, gate, BLOCKS), D, BLOCKS)
            d_gate = multiply_add_rows(d_x, branch, d_gate, BLOCKS)
    if branch_ptr is not None:
        out_ptr = partial_ptr + chunk * (3 * D)
        store_row(out_ptr + 2 * D, d_gate, D, BLOCKS)
    else:
        out_ptr = partial_ptr + chunk * (2 * D)
    store_row(out_ptr, d_shift, D, BLOCKS)
    store_row(out_ptr + D, d_scale, D, BLOCKS)


@on_own_device
def launch_forward(
    x_TD: Tensor,
    branch_TD: Tensor | None,
    gate_SD: Tensor | None,
    shift_SD: Tensor,
    scale_SD: Tensor,
    plan: ChunkPlan,
    eps: float,
    h_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x' (x itself without a branch), h, and float32 [T, 2] mean and 1/deviation of the rows of x'."""
    x_TD, shift_SD, scale_SD = map(unit_column_stride, (x_TD, shift_SD, scale_SD))
    x_new = None
    if branch_TD is not None and gate_SD is not None:
        branch_TD, gate_SD = unit_column_stride(branch_TD), unit_column_stride(gate_SD)
        x_new = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    h = torch.empty(x_TD.shape, dtype=h_dtype, device=x_TD.device)
    statistics = torch.empty((x_TD.shape[0], 2), dtype=torch.float32, device=x_TD.device)
    if plan.num_chunks:
        forward_kernel[(plan.num_chunks,)](
            x_TD,
            branch_TD,
            gate_SD,
            shift_SD,
            scale_SD,
            x_new,
            h,
            statistics,
            plan.chunks,
            x_TD.stride(0),
            0 if branch_TD is None else branch_TD.stride(0),
            0 if gate_SD is None else gate_SD.stride(0),
            shift_SD.stride(0),
            scale_SD.stride(0),
            eps,
            **forward_options(x_TD.shape[1]),
        )
    return x_TD if x_new is None else x_new, h, statistics


def launch_backward(
    d_h: Tensor,
    d_x_new: Tensor | None,
    x_new: Tensor,
    branch_TD: Tensor | None,
    gate_SD: Tensor | None,
    scale_SD: Tensor,
    statistics: Tensor,
    plan: ChunkPlan,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """d_x, d_branch, and float32 [S, 2 or 3, D] sums: shift, scale and (with a branch) gate."""
    d_h, x_new, scale_SD = map(unit_column_stride, (d_h, x_new, scale_SD))
    d_x_new = None if d_x_new is None else unit_column_stride(d_x_new)
    d_branch = None
    if branch_TD is not None and gate_SD is not None:
        branch_TD, gate_SD = unit_column_stride(branch_TD), unit_column_stride(gate_SD)
        d_branch = torch.empty(branch_TD.shape, dtype=branch_TD.dtype, device=branch_TD.device)
    width = x_new.shape[1]
    d_x = torch.empty(x_new.shape, dtype=x_new.dtype, device=x_new.device)
    num_sums = 2 if branch_TD is None else 3
    partial = torch.empty((plan.num_chunks, num_sums, width), dtype=torch.float32, device=x_new.device)
    if plan.num_chunks:
        backward_kernel[(plan.num_chunks,)](
            d_h,
            d_x_new,
            x_new,
            branch_TD,
            gate_SD,
            scale_SD,
            statistics,
            d_x,
            d_branch,
            partial,
            plan.chunks,
            d_h.stride(0),
            0 if d_x_new is None else d_x_new.stride(0),
            x_new.stride(0),
            0 if branch_TD is None else branch_TD.stride(0),
            0 if gate_SD is None else gate_SD.stride(0),
            scale_SD.stride(0),
            **backward_options(width),
        )
    return d_x, d_branch, segment_sum(partial, plan)
