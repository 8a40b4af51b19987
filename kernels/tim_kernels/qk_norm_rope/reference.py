"""The definition, in plain PyTorch: any floating dtype, forward mode, vmap and compilation included.

T tokens, N heads, H head width, S segments, P parts of a packed row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tim_kernels.qk_norm_rope.table import RotaryTable


def qk_norm_rope_reference(
    x_TNH: Tensor, weight_H: Tensor | None, bias_H: Tensor | None, table: RotaryTable | None, *, eps: float
) -> Tensor:
    """LayerNorm of every head with affine (if there is a weight), then rotation (if there is a table).

    Dtypes:
        arithmetic: float32, or float64 when x is. The result has the dtype of x.
    """
    x = x_TNH.to(torch.promote_types(x_TNH.dtype, torch.float32))
    if weight_H is not None:
        bias = None if bias_H is None else bias_H.to(x.dtype)
        x = nnf.layer_norm(x, (x.shape[-1],), weight_H.to(x.dtype), bias, eps=eps)
    if table is not None:
        x = rotate(x, *table.by_token())
    return x.to(x_TNH.dtype)


def rotate(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(v0, v1) -> (v0 cos - v1 sin, v1 cos + v0 sin) for the interleaved pairs of every head.

    Shapes:
        cos, sin: [T, H / 2].
    """
    x = x_TNH.to(torch.promote_types(x_TNH.dtype, cos.dtype)).unflatten(-1, (-1, 2))
    x0, x1 = x.unbind(-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.stack([x0 * c - x1 * s, x1 * c + x0 * s], dim=-1).flatten(-2)


def add_shift_reference(packed_TE: Tensor, shift_SE: Tensor, segment_ids: Tensor) -> Tensor:
    """packed + shift[s], in float32 or wider: nothing is rounded before the norm."""
    wide = torch.promote_types(packed_TE.dtype, torch.float32)
    return packed_TE.to(wide) + shift_SE.to(wide).index_select(0, segment_ids)
