"""Tangent rules: how each op carries a direction, in plain PyTorch. The definition of every tangent kernel.

A rule takes the values that the op has already computed and the tangents of its inputs; it returns the
tangent of the output, exact to first order. Arithmetic is float32, or float64 where the values are, whatever
autocast says; the result is rounded once. No tangent has a gradient, nothing is kept for a backward.

T tokens, L keys, S segments, D width, N heads, H head width, B segments of one dense batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**24
"""Attention logits held at a time: 64 MiB of float32 for each of the three matrices that a rule needs."""


@torch.no_grad()
def gated_residual_tangent(
    d_x_TD: Tensor,
    branch_TD: Tensor,
    d_branch_TD: Tensor,
    gate_SD: Tensor,
    d_gate_SD: Tensor,
    segment_ids: Tensor,
) -> Tensor:
    """d(x + gate[s] * branch), in the dtype of d_x."""
    wide = _wide(d_x_TD)
    gate_TD, d_gate_TD = (x.to(wide).index_select(0, segment_ids) for x in (gate_SD, d_gate_SD))
    moved_TD = d_gate_TD * branch_TD.to(wide) + gate_TD * d_branch_TD.to(wide)
    return (d_x_TD.to(wide) + moved_TD).to(d_x_TD.dtype)


@torch.no_grad()
def modulated_layer_norm_tangent(
    x_TD: Tensor,
    d_x_TD: Tensor,
    scale_SD: Tensor,
    d_shift_SD: Tensor,
    d_scale_SD: Tensor,
    segment_ids: Tensor,
    *,
    eps: float,
    h_dtype: torch.dtype,
) -> Tensor:
    """d(LayerNorm(x) * (1 + scale[s]) + shift[s]); the norm without affine, x with its residual added."""
    normal_TD, d_normal_TD = _layer_norm(x_TD, d_x_TD, eps)
    scale_SD, d_shift_SD, d_scale_SD = (x.to(normal_TD.dtype) for x in (scale_SD, d_shift_SD, d_scale_SD))
    factor_TD, d_shift_TD, d_scale_TD = (
        x.index_select(0, segment_ids) for x in (1 + scale_SD, d_shift_SD, d_scale_SD)
    )
    return (d_normal_TD * factor_TD + normal_TD * d_scale_TD + d_shift_TD).to(h_dtype)


@torch.no_grad()
def swiglu_tangent(gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> Tensor:
    """d(SiLU(gate) * up), in the dtype of the values."""
    wide = _wide(gate)
    wide_gate = gate.to(wide)
    d_activated = silu_tangent(wide_gate, d_gate.to(wide))
    return (d_activated * up.to(wide) + torch.nn.functional.silu(wide_gate) * d_up.to(wide)).to(gate.dtype)


@torch.no_grad()
def silu_tangent(x: Tensor, d_x: Tensor) -> Tensor:
    """d(x * sigmoid(x))."""
    # The derivative of an elementwise function times a direction is that times a gradient.
    return torch.ops.aten.silu_backward(d_x, x)


@torch.no_grad()
def head_norm_tangent(x_TNH: Tensor, d_x_TNH: Tensor, weight_H: Tensor, *, eps: float) -> Tensor:
    """d of the per-head LayerNorm with affine, float32 or wider."""
    _, d_normal = _layer_norm(x_TNH, d_x_TNH, eps)
    return d_normal * weight_H.to(d_normal.dtype)


@torch.no_grad()
def dense_attention_tangent(
    q_BNTH: Tensor,
    k_BNLH: Tensor,
    v_BNLH: Tensor,
    d_q_BNTH: Tensor,
    d_k_BNLH: Tensor | None,
    d_v_BNLH: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float | None = None,
) -> Tensor:
    """d(softmax(scale q k) v) of segments of one shape: [B, N, T, H] in the dtype of q.

    With P the softmax and dS the tangent of the logits: (P dS - P rowsum(P dS)) v + P dv. Queries are taken
    in pieces, so that memory grows with the number of keys and not with its square.

    Args:
        d_k_BNLH, d_v_BNLH: None where keys and values stand still (captions).
        mask: bool, broadcasts to [B, N, T, L]; True where a key is real.
        scale: 1 / sqrt(H) when not given.
    """
    wide = _wide(q_BNTH)
    if scale is None:
        scale = 1 / math.sqrt(q_BNTH.shape[-1])
    with torch.autocast(q_BNTH.device.type, enabled=False):
        k, v = k_BNLH.to(wide).transpose(-1, -2), v_BNLH.to(wide)
        d_k = None if d_k_BNLH is None else d_k_BNLH.to(wide).transpose(-1, -2)
        d_v = None if d_v_BNLH is None else d_v_BNLH.to(wide)
        rows = max(1, LOGITS_AT_ONCE // max(1, q_BNTH.shape[0] * q_BNTH.shape[1] * k.shape[-1]))
        pieces = []
        for q, d_q in zip(q_BNTH.split(rows, 2), d_q_BNTH.split(rows, 2), strict=True):
            q, d_q = scale * q.to(wide), scale * d_q.to(wide)
            logits = q @ k
            if mask is not None:
                logits = logits.masked_fill(~mask, float("-inf"))
            weights = logits.softmax(-1)
            d_logits = d_q @ k if d_k is None else d_q @ k + q @ d_k
            moved = weights * d_logits
            d_out = (moved - weights * moved.sum(-1, keepdim=True)) @ v
            pieces.append(d_out if d_v is None else d_out + weights @ d_v)
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)).to(q_BNTH.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _layer_norm(x: Tensor, d_x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm over the last axis without affine, and its tangent."""
    wide, axis = _wide(x), x.shape[-1:]
    x, d_x = x.to(wide), d_x.to(wide)
    normal, mean, inverse = torch.native_layer_norm(x, axis, None, None, eps)
    # The Jacobian of a row's norm is symmetric, inverse (1 - 1/H - normal normal' / H): its product with a
    # direction is that with a gradient.
    d_normal, _, _ = torch.ops.aten.native_layer_norm_backward(
        d_x, x, axis, mean, inverse, None, None, [True, False, False]
    )
    return normal, d_normal
