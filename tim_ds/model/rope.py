"""Two-axis positions for grids of any shape, one grid a segment: which place each token turns its heads by.

T image tokens. Half of a head rotates with one grid axis, half with the other (`ops.rotary_table`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tim_ds.errors import ShapeError
from tim_ds.packed import Segments


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
