"""Attention within segments as dense batches: the definition, the path of every CPU, and of forward mode.

T query tokens, L key tokens, N heads, H head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tim_kernels.varlen_attention.plan import DenseGroups


def dense_attention(
    q_TNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, batches: DenseGroups, scale: float
) -> Tensor:
    """softmax(scale * q k) v within each segment: [T, N, H]. Every segment has queries and keys.

    Derivatives:
        backward; forward mode under torch.nn.attention.sdpa_kernel(SDPBackend.MATH).
    """
    queries = batches.queries(_in_order(q_TNH, batches.index_q))
    keys, values = (batches.keys(_in_order(x, batches.index_k)) for x in (k_LNH, v_LNH))
    outputs = []
    for g, q, k, v in zip(batches.groups, queries, keys, values, strict=True):
        out = nnf.scaled_dot_product_attention(q, k, v, attn_mask=g.mask, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return _in_order(_joined(outputs), batches.inverse_q)


@torch.no_grad()
def dense_logsumexp(q_TNH: Tensor, k_LNH: Tensor, batches: DenseGroups, scale: float) -> Tensor:
    """log sum exp(scale * q k) of every query: float32 or wider [T, N]. Holds a group's logits at a time."""
    wide = torch.promote_types(q_TNH.dtype, torch.float32)
    q_TNH, k_LNH = _in_order(q_TNH, batches.index_q).to(wide), _in_order(k_LNH, batches.index_k).to(wide)
    outputs = []
    for g, q, k in zip(batches.groups, batches.queries(q_TNH), batches.keys(k_LNH), strict=True):
        logits = scale * q @ k.transpose(-1, -2)
        if g.mask is not None:
            logits = logits.masked_fill(~g.mask, float("-inf"))
        outputs.append(logits.logsumexp(-1).transpose(1, 2).flatten(0, 1))
    return _in_order(_joined(outputs), batches.inverse_q)


def _in_order(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
