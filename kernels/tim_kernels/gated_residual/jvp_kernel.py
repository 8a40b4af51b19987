"""Triton kernel of the tangent: a program takes a chunk of rows of one segment, row by row.

T rows of the pack, T' rows that move, S and S' segments, D width, K chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tim_kernels.checks import unit_column_stride
from tim_kernels.columns import carry_gate, load_row, row_options, store_row
from tim_kernels.on_device import on_own_device
from tim_kernels.tangent_plan import TangentPlan


def jvp_options(width: int) -> dict[str, Any]:
    return row_options(width, "gated_residual_jvp")


@triton.jit
def jvp_kernel(
    d_x_ptr,
    branch_ptr,
    d_branch_ptr,
    gate_ptr,
    d_gate_ptr,
    d_out_ptr,
    chunks_ptr,
    d_x_stride,
    branch_stride,
    d_branch_stride,
    gate_stride,
    d_gate_stride,
    D: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunk_ptr = chunks_ptr + tl.program_id(0) * 5
    first_moving = tl.load(chunk_ptr).to(tl.int64)
    num_rows = tl.load(chunk_ptr + 1)
    moving_segment = tl.load(chunk_ptr + 2).to(tl.int64)
    first_row = tl.load(chunk_ptr + 3).to(tl.int64)
    segment = tl.load(chunk_ptr + 4).to(tl.int64)
    gate = load_row(gate_ptr + segment * gate_stride, D, BLOCKS)
    d_gate = load_row(d_gate_ptr + moving_segment * d_gate_stride, D, BLOCKS)
    for i in tl.range(0, num_rows, num_stages=STAGES):
        moving = first_moving + i
        d_x = load_row(d_x_ptr + moving * d_x_stride, D, BLOCKS)
        branch = load_row(branch_ptr + (first_row + i) * branch_stride, D, BLOCKS)
        d_branch = load_row(d_branch_ptr + moving * d_branch_stride, D, BLOCKS)
        d_out = carry_gate(d_x, branch, d_branch, gate, d_gate, BLOCKS)
        store_row(d_out_ptr + moving * D, d_out, D, BLOCKS)


@on_own_device
def launch_jvp(
    d_x_TD: Tensor,
    branch_TD: Tensor,
    d_branch_TD: Tensor,
    gate_SD: Tensor,
    d_gate_SD: Tensor,
    plan: TangentPlan,
) -> Tensor:
    d_x, branch, d_branch, gate, d_gate = map(
        unit_column_stride, (d_x_TD, branch_TD, d_branch_TD, gate_SD, d_gate_SD)
    )
    out = torch.empty(d_x.shape, dtype=d_x.dtype, device=d_x.device)
    if plan.num_chunks:
        jvp_kernel[(plan.num_chunks,)](
            d_x,
            branch,
            d_branch,
            gate,
            d_gate,
            out,
            plan.chunks,
            d_x.stride(0),
            branch.stride(0),
            d_branch.stride(0),
            gate.stride(0),
            d_gate.stride(0),
            **jvp_options(d_x.shape[1]),
        )
    return out
