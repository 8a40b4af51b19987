"""Triton kernel of the tangent: the tiles of the forward; values may lie in other rows than their tangents.

T rows of the values, T' rows that move, H columns.
"""

# What a jitted function returns has no type.
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tim_kernels.on_device import on_own_device
from tim_kernels.swiglu.kernel import grid_of, tile, tile_options


@triton.jit(do_not_specialize=["num_rows"])
def jvp_kernel(
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    d_out_ptr,
    rows_ptr,
    num_rows,
    gate_stride,
    up_stride,
    d_gate_stride,
    d_up_stride,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """rows_ptr: int32 [T'], where the values of a tangent's row lie; None where rows are the same."""
    row, column, mask = tile(num_rows, H, COLUMNS, ROWS)
    value_row = row
    if rows_ptr is not None:
        value_row = tl.load(rows_ptr + row, mask=row < num_rows, other=0).to(tl.int64)
    gate = tl.load(gate_ptr + value_row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + value_row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    d_gate = tl.load(d_gate_ptr + row * d_gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    d_up = tl.load(d_up_ptr + row * d_up_stride + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_out = (sigmoid + silu * (1.0 - sigmoid)) * d_gate * up + silu * d_up
    tl.store(d_out_ptr + row * H + column, d_out.to(d_out_ptr.dtype.element_ty), mask=mask)


@on_own_device
def launch_jvp(
    gate_TH: Tensor, up_TH: Tensor, d_gate_TH: Tensor, d_up_TH: Tensor, rows: Tensor | None
) -> Tensor:
    """Columns of all matrices are adjacent in memory."""
    num_rows, width = d_gate_TH.shape
    out = torch.empty((num_rows, width), dtype=gate_TH.dtype, device=gate_TH.device)
    options = tile_options(width)
    if num_rows:
        jvp_kernel[grid_of(num_rows, options)](
            gate_TH,
            up_TH,
            d_gate_TH,
            d_up_TH,
            out,
            rows,
            num_rows,
            gate_TH.stride(0),
            up_TH.stride(0),
            d_gate_TH.stride(0),
            d_up_TH.stride(0),
            **options,
        )
    return out
