"""Triton kernels: a program takes a chunk of rows of one segment, row by row; the gate stays in registers.

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
    load_row,
    multiply_add_rows,
    multiply_rows,
    row_options,
    store_row,
    zero_row,
)
from tim_kernels.on_device import on_own_device
from tim_kernels.segment_sum import segment_sum


def forward_options(width: int) -> dict[str, Any]:
    return row_options(width, "gated_residual forward")


def backward_options(width: int) -> dict[str, Any]:
    return row_options(width, "gated_residual backward")


@triton.jit
def forward_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    out_ptr,
    chunks_ptr,
    x_stride,
    branch_stride,
    gate_stride,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    first_row = tl.load(chunks_ptr + chunk * 3).to(tl.int64)
    num_rows = tl.load(chunks_ptr + chunk * 3 + 1)
    segment = tl.load(chunks_ptr + chunk * 3 + 2).to(tl.int64)
    gate = load_row(gate_ptr + segment * gate_stride, D, BLOCKS)
    for i in tl.range(0, num_rows, num_stages=STAGES):
        row = first_row + i
        x = load_row(x_ptr + row * x_stride, D, BLOCKS)
        branch = load_row(branch_ptr + row * branch_stride, D, BLOCKS)
        store_row(out_ptr + row * D, multiply_add_rows(gate, branch, x, BLOCKS), D, BLOCKS)


@triton.jit
def backward_kernel(
    d_out_ptr,
    branch_ptr,
    gate_ptr,
    d_branch_ptr,
    partial_ptr,
    chunks_ptr,
    d_out_stride,
    branch_stride,
    gate_stride,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial [K, D]: this chunk's sum for the gate. The gradient of x is that of the result."""
    chunk = tl.program_id(0).to(tl.int64)
    first_row = tl.load(chunks_ptr + chunk * 3).to(tl.int64)
    num_rows = tl.load(chunks_ptr + chunk * 3 + 1)
    segment = tl.load(chunks_ptr + chunk * 3 + 2).to(tl.int64)
    gate = load_row(gate_ptr + segment * gate_stride, D, BLOCKS)
    d_gate = zero_row(BLOCKS)
    for i in tl.range(0, num_rows, num_stages=STAGES):
        row = first_row + i
        d_out = load_row(d_out_ptr + row * d_out_stride, D, BLOCKS)
        branch = load_row(branch_ptr + row * branch_stride, D, BLOCKS)
        store_row(d_branch_ptr + row * D, multiply_rows(d_out, gate, BLOCKS), D, BLOCKS)
        d_gate = multiply_add_rows(d_out, branch, d_gate, BLOCKS)
    store_row(partial_ptr + chunk * D, d_gate, D, BLOCKS)


@on_own_device
def launch_forward(x_TD: Tensor, branch_TD: Tensor, gate_SD: Tensor, plan: ChunkPlan) -> Tensor:
    x_TD, branch_TD, gate_SD = map(unit_column_stride, (x_TD, branch_TD, gate_SD))
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if plan.num_chunks:
        forward_kernel[(plan.num_chunks,)](
            x_TD,
            branch_TD,
            gate_SD,
            out,
            plan.chunks,
            x_TD.stride(0),
            branch_TD.stride(0),
            gate_SD.stride(0),
            **forward_options(x_TD.shape[1]),
        )
    return out


def launch_backward(
    d_out: Tensor, branch_TD: Tensor, gate_SD: Tensor, plan: ChunkPlan
) -> tuple[Tensor, Tensor]:
    """d_branch, and float32 [S, D] d_gate."""
    d_out, branch_TD, gate_SD = map(unit_column_stride, (d_out, branch_TD, gate_SD))
    width = branch_TD.shape[1]
    d_branch = torch.empty(branch_TD.shape, dtype=branch_TD.dtype, device=branch_TD.device)
    partial = torch.empty((plan.num_chunks, width), dtype=torch.float32, device=branch_TD.device)
    if plan.num_chunks:
        backward_kernel[(plan.num_chunks,)](
            d_out,
            branch_TD,
            gate_SD,
            d_branch,
            partial,
            plan.chunks,
            d_out.stride(0),
            branch_TD.stride(0),
            gate_SD.stride(0),
            **backward_options(width),
        )
    return d_branch, segment_sum(partial, plan)
