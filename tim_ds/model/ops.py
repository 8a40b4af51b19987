"""The seam between the network and its kernels: every memory-bound operation of a block passes through here.

The operations of `tim_kernels` choose between their Triton kernel and their plain-PyTorch definition; the
choice can be forced (`tim_kernels.use_path`, TIM_KERNELS) and is logged once. The definitions work in any
floating dtype, under autocast, with forward-mode derivatives; nothing here asks the device for a length.

T image tokens, L text tokens, S segments, D model width, N heads, H head width.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

import tim_kernels
from tim_ds.errors import ShapeError
from tim_ds.model.rope import rotate
from tim_ds.packed import Segments
from tim_kernels import ChunkPlan

LAYER_NORM_EPS = 1e-6
"""Of the norms without affine parameters; the authors' value."""
QK_NORM_EPS = 1e-5


def at_least_float32(x: Tensor) -> Tensor:
    """float32, or float64 when `x` is: the dtype of the residual stream, the time path and every norm."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a product with `weight` takes its operands: autocast's, or the weight's own."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def plan_chunks(segments: Segments) -> ChunkPlan:
    """How the tokens of a pack are cut for kernels that reduce over each segment. Built once a forward."""
    return ChunkPlan.from_lengths(segments.lengths, segment_ids=segments.segment_ids)


def residual_modulated_norm(
    x_TD: Tensor,
    branch_TD: Tensor | None,
    gate_SD: Tensor | None,
    shift_SD: Tensor,
    scale_SD: Tensor,
    chunks: ChunkPlan,
    h_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the previous branch through its gate, normalise, modulate.

    x' = x + gate[s] * branch;  h = LayerNorm(x') * (1 + scale[s]) + shift[s].

    Dtypes:
        x' and all arithmetic: float32 or wider; the branch may be bfloat16. h is rounded once to `h_dtype`,
        the dtype that the next product takes.
    Returns:
        (x', h). Without a branch, x' is x.
    """
    return tim_kernels.modulated_layer_norm(
        x_TD, branch_TD, gate_SD, shift_SD, scale_SD, chunks, eps=LAYER_NORM_EPS, h_dtype=h_dtype
    )


def plain_norm(x_LD: Tensor) -> Tensor:
    """LayerNorm without affine parameters, float32 or wider (the captions)."""
    return nnf.layer_norm(at_least_float32(x_LD), (x_LD.shape[-1],), eps=LAYER_NORM_EPS)


def gated_residual(x_TD: Tensor, branch_TD: Tensor, gate_SD: Tensor, chunks: ChunkPlan) -> Tensor:
    """x + gate[s] * branch, in the dtype of the residual stream x."""
    return tim_kernels.gated_residual(x_TD, branch_TD, gate_SD, chunks)


def residual_modulated_norm_tangent(
    x_TD: Tensor,
    d_x_TD: Tensor,
    scale_SD: Tensor,
    d_shift_SD: Tensor,
    d_scale_SD: Tensor,
    segment_ids: Tensor,
    h_dtype: torch.dtype,
) -> Tensor:
    """Tangent of h in `residual_modulated_norm`. x_TD is x', the residual stream with the branch added, and
    d_x_TD its tangent (`gated_residual_tangent`)."""
    return tim_kernels.modulated_layer_norm_tangent(
        x_TD, d_x_TD, scale_SD, d_shift_SD, d_scale_SD, segment_ids, eps=LAYER_NORM_EPS, h_dtype=h_dtype
    )


def gated_residual_tangent(
    d_x_TD: Tensor,
    branch_TD: Tensor,
    d_branch_TD: Tensor,
    gate_SD: Tensor,
    d_gate_SD: Tensor,
    segment_ids: Tensor,
) -> Tensor:
    """Tangent of x + gate[s] * branch."""
    return tim_kernels.gated_residual_tangent(d_x_TD, branch_TD, d_branch_TD, gate_SD, d_gate_SD, segment_ids)


def qk_norm_rope(
    x_TNH: Tensor,
    weight_H: Tensor | None,
    bias_H: Tensor | None,
    table: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Per-head LayerNorm with affine, then rotation; either may be absent. float32 within, x's dtype out."""
    x = at_least_float32(x_TNH)
    if weight_H is not None:
        bias = None if bias_H is None else bias_H.to(x.dtype)
        x = nnf.layer_norm(x, (x.shape[-1],), weight_H.to(x.dtype), bias, eps=QK_NORM_EPS)
    if table is not None:
        x = rotate(x, *table)
    return x.to(x_TNH.dtype)


def qk_norm_rope_tangent(
    x_TNH: Tensor,
    d_x_TNH: Tensor,
    weight_H: Tensor | None,
    table: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Tangent of `qk_norm_rope` at x, in the dtype of x. `table` is that of these tokens."""
    with torch.no_grad():
        d_x = at_least_float32(d_x_TNH)
        if weight_H is not None:
            d_x = tim_kernels.head_norm_tangent(x_TNH, d_x, weight_H, eps=QK_NORM_EPS)
        if table is not None:
            d_x = rotate(d_x, *table)
        return d_x.to(x_TNH.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up."""
    return tim_kernels.swiglu(gate, up)


def swiglu_tangent(gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> Tensor:
    """Tangent of `swiglu` at these rows."""
    return tim_kernels.swiglu_tangent(gate, up, d_gate, d_up)


def silu_tangent(x: Tensor, d_x: Tensor) -> Tensor:
    """Tangent of SiLU at x."""
    return tim_kernels.silu_tangent(x, d_x)


@dataclass(frozen=True, eq=False)
class _Group:
    """Segments that run as one dense batch: equal query length, key lengths padded to `max_k`."""

    num: int
    length_q: int
    max_k: int
    mask: Tensor | None
    """bool [num, 1, 1, max_k], True where a key is real; None when nothing is padded."""


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """How the segments of a pack are grouped for dense attention. Built once a forward, on the host."""

    groups: tuple[_Group, ...]
    index_q: Tensor | None
    """int64 [T]: query tokens in group order; None when they are in that order already."""
    index_k: Tensor | None
    """int64: key tokens in group order, padding repeats the segment's own first key."""
    inverse_q: Tensor | None


def plan_attention(queries: Segments, keys: Segments) -> AttentionPlan:
    """Group segments of equal query length, so that a pack with few shapes costs few calls.

    Keys of one group are padded to the longest. A padded slot repeats a key of its own segment and is masked,
    so no value of another image can reach the result, not even a NaN.

    Raises:
        ShapeError: if the two packs hold different numbers of segments.
    """
    if queries.num_segments != keys.num_segments:
        raise ShapeError(
            f"attention: {queries.num_segments} image segments but {keys.num_segments} key segments"
        )
    device = queries.cu_seqlens.device
    members: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for i, (n_q, n_k) in enumerate(zip(queries.lengths, keys.lengths, strict=True)):
        if n_q:
            members[n_q, n_k == 0].append(i)
    start_q, start_k = _starts(queries.lengths), _starts(keys.lengths)
    groups, order_q, order_k = [], [], []
    for (n_q, no_keys), chosen in members.items():
        lengths_k = [keys.lengths[i] for i in chosen]
        max_k = max(lengths_k)
        mask = None
        if min(lengths_k) < max_k:
            mask = torch.arange(max_k) < torch.tensor(lengths_k)[:, None]
            mask = mask[:, None, None, :].to(device, non_blocking=True)
        for i in chosen:
            order_q.extend(range(start_q[i], start_q[i] + n_q))
            if not no_keys:
                order_k.extend(range(start_k[i], start_k[i] + keys.lengths[i]))
                order_k.extend([start_k[i]] * (max_k - keys.lengths[i]))
        groups.append(_Group(len(chosen), n_q, max_k, mask))
    index_q = _index(order_q, queries.num_tokens, device)
    inverse = None if index_q is None else torch.argsort(torch.tensor(order_q)).to(device, non_blocking=True)
    return AttentionPlan(tuple(groups), index_q, _index(order_k, keys.num_tokens, device), inverse)


def attention(q_TNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q k / sqrt(H)) v within each segment: [T, N, H]. A segment without keys gives zeros."""
    if plan.index_q is not None:
        q_TNH = q_TNH.index_select(0, plan.index_q)
    if plan.index_k is not None:
        k_LNH, v_LNH = k_LNH.index_select(0, plan.index_k), v_LNH.index_select(0, plan.index_k)
    outputs = []
    at_q = at_k = 0
    for g in plan.groups:
        size_q, size_k = g.num * g.length_q, g.num * g.max_k
        q = q_TNH[at_q : at_q + size_q]
        if size_k == 0:
            outputs.append(torch.zeros_like(q))
        else:
            q, k, v = (
                x.unflatten(0, (g.num, -1)).transpose(1, 2)
                for x in (q, k_LNH[at_k : at_k + size_k], v_LNH[at_k : at_k + size_k])
            )
            o = nnf.scaled_dot_product_attention(q, k, v, attn_mask=g.mask)
            outputs.append(o.transpose(1, 2).flatten(0, 1))
        at_q, at_k = at_q + size_q, at_k + size_k
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if plan.inverse_q is None else out.index_select(0, plan.inverse_q)


@torch.no_grad()
def attention_tangent(
    q_TNH: Tensor,
    k_LNH: Tensor,
    v_LNH: Tensor,
    d_q_TNH: Tensor,
    d_k_LNH: Tensor | None,
    d_v_LNH: Tensor | None,
    plan: AttentionPlan,
) -> Tensor:
    """Tangent of `attention` at these queries, keys and values; keys and values may stand still."""
    ordered_q = [_in_order(x, plan.index_q) for x in (q_TNH, d_q_TNH)]
    ordered_k = [None if x is None else _in_order(x, plan.index_k) for x in (k_LNH, v_LNH, d_k_LNH, d_v_LNH)]
    outputs = []
    at_q = at_k = 0
    for g in plan.groups:
        size_q, size_k = g.num * g.length_q, g.num * g.max_k
        q, d_q = (_batch(x[at_q : at_q + size_q], g.num) for x in ordered_q)
        k, v, d_k, d_v = (None if x is None else _batch(x[at_k : at_k + size_k], g.num) for x in ordered_k)
        if k is None or v is None or size_k == 0:
            out = torch.zeros_like(q)
        else:
            out = tim_kernels.dense_attention_tangent(q, k, v, d_q, d_k, d_v, g.mask)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        at_q, at_k = at_q + size_q, at_k + size_k
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _in_order(out, plan.inverse_q)


def _in_order(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def _batch(x: Tensor, num: int) -> Tensor:
    """Tokens of `num` equal segments [num * length, N, H] -> [num, N, length, H]."""
    return x.unflatten(0, (num, -1)).transpose(1, 2)


def _starts(lengths: tuple[int, ...]) -> list[int]:
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    return starts


def _index(order: list[int], total: int, device: torch.device) -> Tensor | None:
    if len(order) == total and order == list(range(total)):
        return None
    return torch.tensor(order, dtype=torch.int64).to(device, non_blocking=True)
