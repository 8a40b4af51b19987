"""Two-axis rotary positions for grids of any shape, one grid a segment.

T image tokens, H head width. Half of the head rotates with one grid axis, half with the other; pairs are
interleaved: (v0, v1) -> (v0 cos - v1 sin, v1 cos + v0 sin).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tim_ds.errors import ShapeError
from tim_ds.packed import Segments

BASE = 10000.0


def token_positions(segments: Segments, layout: Literal["row_major", "reference"]) -> tuple[Tensor, Tensor]:
    """Coordinates (a, b) of every token: int32 [T] each; a turns the first half of the head.

    `row_major`: (row, column). `reference`: the authors' (n mod height, n div height) for token
    n = row * width + column, a transpose on square grids and a scramble on others; their weights need it.

    Raises:
        ShapeError: if the segments have no grid.
    """
    if segments.grids is None or segments.token_rows is None or segments.token_cols is None:
        raise ShapeError("rotary positions need image segments with a grid; received text segments")
    if layout == "row_major":
        return segments.token_rows, segments.token_cols
    device = segments.cu_seqlens.device
    size_S2 = torch.tensor(segments.grids, dtype=torch.int32).reshape(-1, 2).to(device, non_blocking=True)
    height, width = segments.expand(size_S2).unbind(1)
    n = segments.token_rows * width + segments.token_cols
    return n % height, torch.div(n, height, rounding_mode="floor")


def rotary_table(
    segments: Segments, head_dim: int, layout: Literal["row_major", "reference"], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation of every token and pair: [T, head_dim / 2] each.

    Angles are formed in `dtype`, float32 or wider: bfloat16 angles are off by 0.24 rad at 128 tokens a side.
    """
    quarter = head_dim // 4
    k = torch.arange(quarter, dtype=torch.float64)
    frequency = (BASE ** (-2.0 * k / (2 * quarter))).to(segments.cu_seqlens.device, dtype, non_blocking=True)
    a, b = token_positions(segments, layout)
    angle = torch.cat([a.to(dtype)[:, None] * frequency, b.to(dtype)[:, None] * frequency], dim=1)
    return angle.cos(), angle.sin()


def rotate(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs of every head: [T, N, H] by cos, sin [T, H/2], in the table's dtype."""
    x = x_TNH.to(cos.dtype).unflatten(-1, (-1, 2))
    x0, x1 = x.unbind(-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.stack([x0 * c - x1 * s, x1 * c + x0 * s], dim=-1).flatten(-2)
