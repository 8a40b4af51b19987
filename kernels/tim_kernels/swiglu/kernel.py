"""Triton kernels: tiles of whole 128-bit vectors; the rows of each tensor have a stride of their own.

T rows, H columns.
"""

# What a jitted function returns has no type.
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tim_kernels.on_device import on_own_device

COLUMN_TILES = (512, 256, 128, 64, 32)
TILE = 2048
"""Elements of a tile: two vectors of eight for each thread of four warps."""


def tile_options(width: int) -> dict[str, Any]:
    """Compile-time arguments and warps: the widest tile that divides the row, else 128 columns and a mask."""
    columns = next((c for c in COLUMN_TILES if width % c == 0), 128)
    return {"H": width, "COLUMNS": columns, "ROWS": TILE // columns, "num_warps": 4}


@triton.jit
def tile(num_rows, H: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Rows [ROWS, 1] int64, columns [1, COLUMNS] and mask of this program's tile."""
    COLUMN_BLOCKS: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = (program // COLUMN_BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % COLUMN_BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = row < num_rows
    if H % COLUMNS != 0:
        mask = mask & (column < H)
    return row, column, mask


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    num_rows,
    gate_stride,
    up_stride,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, column, mask = tile(num_rows, H, COLUMNS, ROWS)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * H + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    d_out_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    d_up_ptr,
    num_rows,
    d_out_stride,
    gate_stride,
    up_stride,
    d_gate_stride,
    d_up_stride,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, column, mask = tile(num_rows, H, COLUMNS, ROWS)
    d_out = tl.load(d_out_ptr + row * d_out_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d_out * up * (sigmoid + silu * (1.0 - sigmoid))
    d_up = d_out * silu
    tl.store(d_gate_ptr + row * d_gate_stride + column, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + row * d_up_stride + column, d_up.to(d_up_ptr.dtype.element_ty), mask=mask)


@on_own_device
def launch_forward(gate_TH: Tensor, up_TH: Tensor) -> Tensor:
    """Columns of both arguments are adjacent in memory."""
    num_rows, width = gate_TH.shape
    out = torch.empty((num_rows, width), dtype=gate_TH.dtype, device=gate_TH.device)
    options = tile_options(width)
    if num_rows:
        forward_kernel[grid_of(num_rows, options)](
            gate_TH, up_TH, out, num_rows, gate_TH.stride(0), up_TH.stride(0), **options
        )
    return out


def launch_backward(d_out: Tensor, gate_TH: Tensor, up_TH: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Writes d_gate and d_up; columns of all arguments are adjacent in memory."""
    num_rows, width = gate_TH.shape
    options = tile_options(width)
    if num_rows:
        backward_kernel[grid_of(num_rows, options)](
            d_out,
            gate_TH,
            up_TH,
            d_gate,
            d_up,
            num_rows,
            d_out.stride(0),
            gate_TH.stride(0),
            up_TH.stride(0),
            d_gate.stride(0),
            d_up.stride(0),
            **options,
        )


def grid_of(num_rows: int, options: dict[str, Any]) -> tuple[int]:
    row_blocks = -(-num_rows // options["ROWS"])
    column_blocks = -(-options["H"] // options["COLUMNS"])
    return (row_blocks * column_blocks,)
