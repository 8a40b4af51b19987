"""The tangent of the op: checks, choice of path, and its definition.

T queries and L keys of the pack, T' and L' of what moves, N heads, H head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tim_kernels import dispatch
from tim_kernels.checks import check_device, check_floating, check_shape
from tim_kernels.qk_norm_rope.op import adjacent_heads
from tim_kernels.tangent import dense_attention_tangent
from tim_kernels.varlen_attention.tangent_plan import AttentionTangentPlan

NAME = "varlen_attention_jvp"
LARGEST_HEAD = 128


@torch.no_grad()
def varlen_attention_jvp(
    q_TNH: Tensor,
    k_LNH: Tensor,
    v_LNH: Tensor,
    d_q_TNH: Tensor,
    d_k_LNH: Tensor | None,
    d_v_LNH: Tensor | None,
    out_TNH: Tensor,
    lse_TN: Tensor | None,
    plan: AttentionTangentPlan,
    *,
    scale: float | None = None,
) -> Tensor:
    """Tangent of `varlen_attention`, from the output that it returned: [T', N, H] in the dtype of q.

    Shapes:
        q, out: [T, N, H], lse: [T, N], k, v: [L, N, H], of the whole pack.   d_q: [T', N, H], d_k, d_v:
        [L', N, H], of what moves. Token strides are free; heads that are not adjacent cost a copy.
    Dtypes:
        q, k, v, d_q, d_k, d_v, out: one of float32, bfloat16, float16 (float64 on the twin), lse float32.
        Products of 16-bit operands, those with P rounded to them, accumulate in float32.
    Args:
        d_k, d_v: None together where keys and values stand still (captions).
        out: of whichever backend ran. The twin does not read it.
        lse: logsumexp of every query, from `varlen_attention_with_lse`; None takes it anew in the same pass.
        scale: 1 / sqrt(H) when not given; the forward's.
    Derivatives:
        none: the result has no gradient, and nothing is kept for a backward.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    _check(q_TNH, k_LNH, v_LNH, d_q_TNH, d_k_LNH, d_v_LNH, out_TNH, lse_TN, plan)
    if scale is None:
        scale = 1 / math.sqrt(q_TNH.shape[-1])
    tensors = (q_TNH, k_LNH, v_LNH, d_q_TNH, d_k_LNH, d_v_LNH, out_TNH)
    if dispatch.choose(NAME, tensors, _obstacle(q_TNH.shape[-1])) == "torch":
        return varlen_attention_jvp_reference(
            q_TNH, k_LNH, v_LNH, d_q_TNH, d_k_LNH, d_v_LNH, plan, scale=scale
        )
    from tim_kernels.varlen_attention.jvp_kernel import launch_jvp

    q, k, v, d_q, d_k, d_v, out = (None if x is None else adjacent_heads(x) for x in tensors)
    lse = None if lse_TN is None else lse_TN.contiguous()
    return launch_jvp(q, k, v, d_q, d_k, d_v, out, lse, plan, scale)  # pyright: ignore[reportArgumentType]


def varlen_attention_jvp_reference(
    q_TNH: Tensor,
    k_LNH: Tensor,
    v_LNH: Tensor,
    d_q_TNH: Tensor,
    d_k_LNH: Tensor | None,
    d_v_LNH: Tensor | None,
    plan: AttentionTangentPlan,
    *,
    scale: float,
) -> Tensor:
    """The tangent from q, k and v alone, in dense batches; queries without keys have the tangent 0."""
    q, k, v = plan.queries_of(q_TNH), plan.keys_of(k_LNH), plan.keys_of(v_LNH)
    own, index_q, index_k = plan.moving, None, None
    if own.filled is not None:
        own, index_q, index_k = own.filled.plan, own.filled.index_q, own.filled.index_k
    groups = own.merged_groups
    batches_q = [groups.queries(_in_order(_in_order(x, index_q), groups.index_q)) for x in (q, d_q_TNH)]
    batches_k = [
        [None] * len(groups.groups)
        if x is None
        else groups.keys(_in_order(_in_order(x, index_k), groups.index_k))
        for x in (k, v, d_k_LNH, d_v_LNH)
    ]
    outputs = [q[:0]] if not groups.groups else []
    for g, q_B, d_q_B, k_B, v_B, d_k_B, d_v_B in zip(groups.groups, *batches_q, *batches_k, strict=True):
        assert k_B is not None and v_B is not None, "only tangents may be absent"
        out = dense_attention_tangent(q_B, k_B, v_B, d_q_B, d_k_B, d_v_B, g.mask, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    result = _in_order(outputs[0] if len(outputs) == 1 else torch.cat(outputs), groups.inverse_q)
    if index_q is None:
        return result
    return q.new_zeros(d_q_TNH.shape).index_copy(0, index_q, result)


def _in_order(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _obstacle(head_dim: int) -> str | None:
    if head_dim % 8 or head_dim > LARGEST_HEAD:
        return f"head_dim {head_dim} is not a multiple of 8 up to {LARGEST_HEAD}"
    return None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_q: Tensor,
    d_k: Tensor | None,
    d_v: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    plan: AttentionTangentPlan,
) -> None:
    if (d_k is None) != (d_v is None):
        raise ValueError(f"{NAME}: d_k and d_v: expected both or neither")
    if q.ndim != 3 or q.shape[0] != plan.num_queries:
        raise ValueError(
            f"{NAME}: q: expected [{plan.num_queries}, heads, head_dim] as in the plan, "
            f"received {list(q.shape)}"
        )
    keys, moving_keys = (plan.num_keys, *q.shape[1:]), (plan.moving.num_keys, *q.shape[1:])
    expected = {"k": keys, "v": keys, "d_q": (plan.moving.num_queries, *q.shape[1:])}
    expected |= {"d_k": moving_keys, "d_v": moving_keys, "out": tuple(q.shape)}
    tensors = {"q": q, "k": k, "v": v, "d_q": d_q, "d_k": d_k, "d_v": d_v, "out": out}
    for name, shape in expected.items():
        x = tensors[name]
        if x is not None:
            check_shape(NAME, name, x, shape)
            if x.dtype != q.dtype:
                raise ValueError(f"{NAME}: {name}: expected {q.dtype} as q, received {x.dtype}")
    if lse is not None:
        check_shape(NAME, "lse", lse, q.shape[:2])
        if lse.dtype != torch.promote_types(q.dtype, torch.float32):
            raise ValueError(f"{NAME}: lse: expected float32 (or float64 with q), received {lse.dtype}")
    check_floating(NAME, tensors)
    check_device(NAME, {**tensors, "lse": lse, "plan": plan.tiles})
