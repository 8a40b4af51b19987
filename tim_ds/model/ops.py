"""The seam between the network and its kernels: every memory-bound operation of a block passes through here.

The operations of `tim_kernels` choose between their Triton kernel and their plain-PyTorch definition; the
choice can be forced (`tim_kernels.use_path`, TIM_KERNELS) and is logged once. The definitions work in any
floating dtype, under autocast, with forward-mode derivatives; nothing here asks the device for a length.

The tangent of an operation reads the values whole, as the forward left them, and holds the rows that move.

T image tokens, L text tokens, S segments, D model width, N heads, H head width, E = 2 D or 3 D. T' and S' are
the tokens and segments that move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as nnf
from torch import Tensor

import tim_kernels
from tim_ds.errors import ConfigError
from tim_ds.model.rope import token_positions
from tim_ds.packed import Segments
from tim_kernels import (
    AttentionPlan,
    AttentionTangentPlan,
    ChunkPlan,
    RotaryTable,
    TangentPlan,
    TargetCoefficients,
)
from tim_kernels.dispatch import OPS, Path

LAYER_NORM_EPS = 1e-6
"""Of the norms without affine parameters; the authors' value."""
QK_NORM_EPS = 1e-5

Affine = tuple[Tensor, Tensor | None]
"""Weight [H] and bias [H] of a per-head norm."""
KeysValues = tuple[Tensor, Tensor]
"""[L, N, H] each."""


def at_least_float32(x: Tensor) -> Tensor:
    """float32, or float64 when `x` is: the dtype of the residual stream, the time path and every norm."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a product with `weight` takes its operands: autocast's, or the weight's own."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


@dataclass(frozen=True, eq=False)
class Again:
    """How to compute a tensor a second time, from tensors that are kept for the backward anyway."""

    compute: Callable[..., Tensor]
    sources: tuple[Tensor, ...]


def _again(op: str, compute: Callable[..., Tensor], sources: tuple[Tensor, ...]) -> Again | None:
    """For an op that has just run on its kernel. Its definition keeps more than its result, and takes longer:
    on a CPU, a training step of the handwriting recipe would be 15 % slower."""
    return Again(compute, sources) if tim_kernels.path_taken(op) == "triton" else None


def linear(x_TK: Tensor, weight_DK: Tensor, bias_D: Tensor | None, again: Again | None = None) -> Tensor:
    """x W^T + b. With `again`, x is not kept for the backward but computed again there: [T, K] -> [T, D].

    Dtypes:
        one for all.
    """
    has_tangent = forward_ad.unpack_dual(x_TK).tangent is not None
    if again is None or not torch.is_grad_enabled() or has_tangent:
        return nnf.linear(x_TK, weight_DK, bias_D)
    return _LinearOfAgain.apply(x_TK, weight_DK, bias_D, again.compute, *again.sources)  # type: ignore[return-value]


class _LinearOfAgain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        weight_DK: Tensor,
        bias_D: Tensor | None,
        compute: Callable[..., Tensor],
        *sources: Tensor,
    ) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(weight_DK, *sources)
        return nnf.linear(x_TK, weight_DK, bias_D)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = gradients
        weight_DK, *sources = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_x = d_out @ weight_DK if needs_x else None
        d_weight = d_out.t() @ ctx.compute(*sources) if needs_weight else None
        d_bias = d_out.sum(0) if needs_bias else None
        return d_x, d_weight, d_bias, None, *[None] * len(sources)


def kernels(path: Path) -> ExitStack:
    """Within the block, the path of every operation but attention, which keeps the first kernel that can be
    trusted: its definition is no way to train."""
    stack = ExitStack()
    stack.enter_context(tim_kernels.use_path(path))
    if path != "auto":
        stack.enter_context(tim_kernels.use_path("auto", "varlen_attention"))
    return stack


def paths_taken() -> dict[str, str]:
    """Path of the latest call of every operation that was called (of attention, the kernel)."""
    taken = {op: tim_kernels.path_taken(op) for op in OPS}
    return {op: path for op, path in taken.items() if path is not None}


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


def modulated_norm_again(
    x_TD: Tensor, shift_SD: Tensor, scale_SD: Tensor, chunks: ChunkPlan, h_dtype: torch.dtype
) -> Again | None:
    """h of `residual_modulated_norm`, from its x'; None where it is cheaper kept."""
    compute = partial(_modulated_norm, chunks=chunks, h_dtype=h_dtype)
    return _again("modulated_layer_norm", compute, (x_TD, shift_SD, scale_SD))


def _modulated_norm(
    x_TD: Tensor, shift_SD: Tensor, scale_SD: Tensor, *, chunks: ChunkPlan, h_dtype: torch.dtype
) -> Tensor:
    return residual_modulated_norm(x_TD, None, None, shift_SD, scale_SD, chunks, h_dtype)[1]


def plain_norm(x_LD: Tensor) -> Tensor:
    """LayerNorm without affine parameters, float32 or wider (the captions)."""
    return nnf.layer_norm(at_least_float32(x_LD), (x_LD.shape[-1],), eps=LAYER_NORM_EPS)


def gated_residual(x_TD: Tensor, branch_TD: Tensor, gate_SD: Tensor, chunks: ChunkPlan) -> Tensor:
    """x + gate[s] * branch, in the dtype of the residual stream x."""
    return tim_kernels.gated_residual(x_TD, branch_TD, gate_SD, chunks)


def plan_tangent(segments: Segments, moving: Sequence[int]) -> TangentPlan:
    """Where the tokens of the segments `moving` lie in a pack. Built once a forward, on the host."""
    return TangentPlan.from_lengths(segments.lengths, moving, device=segments.cu_seqlens.device)


def plan_segment_tangent(segments: Segments, moving: Sequence[int]) -> TangentPlan:
    """The same for tensors with a row a segment."""
    lengths = [1] * segments.num_segments
    return TangentPlan.from_lengths(lengths, moving, device=segments.cu_seqlens.device)


def residual_modulated_norm_tangent(
    x_TD: Tensor,
    d_x_TD: Tensor,
    branch_TD: Tensor | None,
    d_branch_TD: Tensor | None,
    gate_SD: Tensor | None,
    d_gate_SD: Tensor | None,
    scale_SD: Tensor,
    d_shift_SD: Tensor,
    d_scale_SD: Tensor,
    plan: TangentPlan,
    h_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Tangents of (x', h) of `residual_modulated_norm`. x_TD is the x' that it returned, d_x_TD the tangent
    of the x that it was given."""
    return tim_kernels.modulated_layer_norm_jvp(
        x_TD, d_x_TD, branch_TD, d_branch_TD, gate_SD, d_gate_SD, scale_SD, d_shift_SD, d_scale_SD, plan,
        eps=LAYER_NORM_EPS, h_dtype=h_dtype,
    )  # fmt: skip


def gated_residual_tangent(
    d_x_TD: Tensor,
    branch_TD: Tensor,
    d_branch_TD: Tensor,
    gate_SD: Tensor,
    d_gate_SD: Tensor,
    plan: TangentPlan,
) -> Tensor:
    """Tangent of `gated_residual`."""
    return tim_kernels.gated_residual_jvp(d_x_TD, branch_TD, d_branch_TD, gate_SD, d_gate_SD, plan)


def rotary_table(
    segments: Segments, head_dim: int, layout: Literal["row_major", "reference"], dtype: torch.dtype
) -> RotaryTable:
    """By which angles every token of a pack turns its queries and keys. Built once a forward.

    Args:
        dtype: of the angles, float32 or wider: bfloat16 angles are off by 0.24 rad at 128 tokens a side.
    Raises:
        ShapeError: if the segments have no grid.
    """
    a, b = token_positions(segments, layout)
    sides = max((side for grid in segments.grids or () for side in grid), default=0)
    return RotaryTable.from_positions(a, b, sides, head_dim, dtype=dtype)


def qkv_norm_rope(
    qkv_TE: Tensor,
    num_heads: int,
    q_norm: Affine | None,
    k_norm: Affine | None,
    table: RotaryTable,
    shift_SE: Tensor | None,
    chunks: ChunkPlan,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of self-attention from their packed projection: shift[s] is added to all three, then q and k
    are normalised and rotated. float32 within, the dtype of qkv out: [T, N, H] each."""
    return tim_kernels.qkv_norm_rope(
        qkv_TE, num_heads, q_norm, k_norm, table, shift_SE=shift_SE, plan=chunks, eps=QK_NORM_EPS
    )


def q_norm_rope(q_TNH: Tensor, norm: Affine | None, table: RotaryTable) -> Tensor:
    """The queries of cross-attention, normalised (if there is a norm) and rotated."""
    weight, bias = norm or (None, None)
    return tim_kernels.qk_norm_rope(q_TNH, weight, bias, table, eps=QK_NORM_EPS)


def kv_norm(kv_LE: Tensor, num_heads: int, norm: Affine | None) -> KeysValues:
    """k, v of cross-attention from their packed projection: [L, N, H] each, k normalised."""
    return tim_kernels.kv_norm_rope(kv_LE, num_heads, norm, eps=QK_NORM_EPS)


def qkv_norm_rope_tangent(
    qkv_TE: Tensor,
    d_qkv_TE: Tensor,
    num_heads: int,
    q_norm: Affine | None,
    k_norm: Affine | None,
    table: RotaryTable,
    shift_SE: Tensor | None,
    d_shift_SE: Tensor | None,
    plan: TangentPlan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of q, k and v of `qkv_norm_rope`: [T', N, H] each."""
    q_weight, k_weight = (None if norm is None else norm[0] for norm in (q_norm, k_norm))
    return tim_kernels.qkv_norm_rope_jvp(
        qkv_TE, d_qkv_TE, num_heads, q_weight, k_weight, table, plan,
        shift_SE=shift_SE, d_shift_SE=d_shift_SE, eps=QK_NORM_EPS,
    )  # fmt: skip


def q_norm_rope_tangent(
    q_TNH: Tensor, d_q_TNH: Tensor, norm: Affine | None, table: RotaryTable, plan: TangentPlan
) -> Tensor:
    """Tangent of `q_norm_rope` at q, the queries before their norm."""
    weight = None if norm is None else norm[0]
    return tim_kernels.qk_norm_rope_jvp(q_TNH, d_q_TNH, weight, table, plan, eps=QK_NORM_EPS)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up."""
    return tim_kernels.swiglu(gate, up)


def swiglu_again(gate: Tensor, up: Tensor) -> Again | None:
    """SiLU(gate) * up; None where it is cheaper kept."""
    return _again("swiglu", swiglu, (gate, up))


def swiglu_tangent(gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor, plan: TangentPlan) -> Tensor:
    """Tangent of `swiglu`."""
    return tim_kernels.swiglu_jvp(gate, up, d_gate, d_up, plan)


def silu_tangent(x: Tensor, d_x: Tensor) -> Tensor:
    """Tangent of SiLU at x."""
    return tim_kernels.silu_tangent(x, d_x)


def plan_attention(queries: Segments, keys: Segments) -> AttentionPlan:
    """Query segment s sees key segment s. Built once a forward, on the host."""
    return AttentionPlan.from_lengths(
        queries.lengths, keys.lengths, cu_seqlens_q=queries.cu_seqlens, cu_seqlens_k=keys.cu_seqlens
    )


def prove_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Try this machine's attention kernels at start-up, so that no trial and no refusal falls into a step.

    Raises:
        ConfigError: if none can be trusted, or not the one that TIM_ATTENTION_BACKEND asks for.
    """
    tim_kernels.prove_attention_backends(device, dtype, head_dim)
    x = torch.zeros(1, 1, head_dim, dtype=dtype, device=device)
    try:
        tim_kernels.varlen_attention(x, x, x, AttentionPlan.from_lengths((1,), (1,), device=device))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from error


def attention(q_TNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q k / sqrt(H)) v within each segment: [T, N, H]. A segment without keys gives zeros."""
    return tim_kernels.varlen_attention(q_TNH, k_LNH, v_LNH, plan)


def attention_with_sums(
    q_TNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, plan: AttentionPlan
) -> tuple[Tensor, Tensor | None]:
    """`attention`, and for its tangent the logsumexp of every query [T, N] where the kernel has it at hand.

    No kernel of a CPU has: there it would be computed for its own sake.
    """
    if q_TNH.device.type == "cpu":
        return attention(q_TNH, k_LNH, v_LNH, plan), None
    return tim_kernels.varlen_attention_with_lse(q_TNH, k_LNH, v_LNH, plan)


def plan_attention_tangent(
    queries: Segments, keys: Segments, moving: Sequence[int], read: Sequence[int]
) -> AttentionTangentPlan:
    """Query segment moving[i] sees key segment read[i]. Built once a forward, on the host."""
    return AttentionTangentPlan.from_lengths(
        queries.lengths, keys.lengths, moving, read, device=queries.cu_seqlens.device
    )


def attention_tangent(
    q_TNH: Tensor,
    k_LNH: Tensor,
    v_LNH: Tensor,
    d_q_TNH: Tensor,
    d_k_LNH: Tensor | None,
    d_v_LNH: Tensor | None,
    out_TNH: Tensor,
    lse_TN: Tensor | None,
    plan: AttentionTangentPlan,
) -> Tensor:
    """Tangent of `attention_with_sums`, from what it returned; keys and values may stand still."""
    return tim_kernels.varlen_attention_jvp(
        q_TNH, k_LNH, v_LNH, d_q_TNH, d_k_LNH, d_v_LNH, out_TNH, lse_TN, plan
    )


def transition_loss_terms(
    F_TC: Tensor,
    x_TC: Tensor,
    z_TC: Tensor,
    dF_dt_TC: Tensor | None,
    coefficients: Sequence[Tensor],
    segments: Segments,
    *,
    diffusion_target_TC: Tensor | None,
    latent_channels: int,
    directional: bool,
) -> tuple[Tensor, Tensor]:
    """The two terms of the objective's loss in one pass over F, x, z and dF/dt (`objective.loss.ImageTerms`).

    In float32, or float64 where x is.
    """
    return tim_kernels.transition_loss(
        F_TC,
        x_TC,
        z_TC,
        dF_dt_TC,
        TargetCoefficients(*coefficients),
        plan_chunks(segments),
        latent_channels=latent_channels,
        directional=directional,
        diffusion_target_TC=diffusion_target_TC,
    )
