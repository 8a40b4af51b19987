"""The definition, in plain PyTorch: any floating dtype, forward mode, vmap and compilation included.

T tokens, N heads, H head width, S segments, P parts of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tim_kernels.qk_norm_rope.table import RotaryTable
from tim_kernels.tangent import head_norm_tangent
from tim_kernels.tangent_plan import TangentPlan


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
    pairs = x_TNH.to(torch.promote_types(x_TNH.dtype, cos.dtype)).unflatten(-1, (-1, 2))
    c, s = cos[:, None, :], sin[:, None, :]
    if torch.compiler.is_compiling():
        # Inductor makes no code for complex numbers.
        x0, x1 = pairs.unbind(-1)
        return torch.stack([x0 * c - x1 * s, x1 * c + x0 * s], dim=-1).flatten(-2)
    # The same as a product of complex numbers: one operation in place of seven, each of which skips every
    # second element. On a CPU 8 times as fast at 320 tokens, 50 times at 4096.
    if pairs.storage_offset() % 2 or any(n % 2 for n in pairs.stride()[:-1]):
        pairs = pairs.contiguous()
    turned = torch.view_as_complex(pairs) * torch.complex(c, s)
    return torch.view_as_real(turned).flatten(-2)


def packed_norm_rope_reference(
    packed_TE: Tensor,
    num_heads: int,
    norms: Sequence[tuple[Tensor, Tensor | None] | None],
    table: RotaryTable | None,
    shift_SE: Tensor | None,
    segment_ids: Tensor | None,
    *,
    eps: float,
) -> tuple[Tensor, ...]:
    """The parts of packed + shift[s]: for each norm one that is normalised and rotated, then a plain one.

    Nothing is rounded between the shift and the norm. Each part is [T, N, H] in the dtype of the packed row.
    """
    x = packed_TE
    if shift_SE is not None and segment_ids is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide) + shift_SE.to(wide).index_select(0, segment_ids)
    *normed, plain = (part.unflatten(-1, (num_heads, -1)) for part in x.chunk(len(norms) + 1, dim=-1))
    outputs = [
        qk_norm_rope_reference(part, *(norm or (None, None)), table, eps=eps)
        for part, norm in zip(normed, norms, strict=True)
    ]
    return tuple(y.to(packed_TE.dtype) for y in (*outputs, plain))


def qk_norm_rope_jvp_reference(
    x_TNH: Tensor,
    d_x_TNH: Tensor,
    weight_H: Tensor | None,
    table: RotaryTable | None,
    plan: TangentPlan,
    *,
    eps: float,
) -> Tensor:
    """The tangent of `qk_norm_rope_reference`, at the rows of x and of the table that move.

    Dtypes:
        arithmetic: float32, or float64 when x is. The result has the dtype of d_x.
    """
    d_x = _normed_tangent(plan.rows_of(x_TNH), d_x_TNH, weight_H, table, plan, eps)
    return d_x.to(d_x_TNH.dtype)


def _normed_tangent(
    x: Tensor,
    d_x: Tensor,
    weight_H: Tensor | None,
    table: RotaryTable | None,
    plan: TangentPlan,
    eps: float,
) -> Tensor:
    """Of the rows that move, x and d_x; float32 or wider."""
    d_x = d_x.to(torch.promote_types(x.dtype, torch.float32))
    if weight_H is not None:
        d_x = head_norm_tangent(x, d_x, weight_H, eps=eps)
    return d_x if table is None else rotate(d_x, *(plan.rows_of(y) for y in table.by_token()))


def packed_norm_rope_jvp_reference(
    packed_TE: Tensor,
    d_packed_TE: Tensor,
    num_heads: int,
    weights: Sequence[Tensor | None],
    table: RotaryTable | None,
    shift_SE: Tensor | None,
    d_shift_SE: Tensor | None,
    plan: TangentPlan,
    *,
    eps: float,
) -> tuple[Tensor, ...]:
    """The parts of the tangent of packed + shift[s]: one for each weight, then a plain one.

    Nothing is rounded between the shift and the norm. Each part is [T', N, H] in the dtype of d_packed.
    """
    x, d_x = plan.rows_of(packed_TE), d_packed_TE
    if shift_SE is not None and d_shift_SE is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide) + plan.segments_of(shift_SE).to(wide).index_select(0, plan.segment_ids)
        d_x = d_x.to(wide) + d_shift_SE.to(wide).index_select(0, plan.segment_ids)
    *d_normed, d_plain = (y.unflatten(-1, (num_heads, -1)) for y in d_x.chunk(len(weights) + 1, dim=-1))
    normed = (y.unflatten(-1, (num_heads, -1)) for y in x.chunk(len(weights) + 1, dim=-1))
    outputs = [
        _normed_tangent(y, d_y, weight, table, plan, eps)
        for y, d_y, weight in zip(normed, d_normed, weights, strict=False)
    ]
    return tuple(y.to(d_packed_TE.dtype) for y in (*outputs, d_plain))
