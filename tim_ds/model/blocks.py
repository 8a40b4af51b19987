"""One TiM block and the final layer, on packed tokens.

T image tokens, L text tokens, S segments, D model width, N heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tim_ds.model import ops
from tim_ds.model.config import ModelConfig
from tim_ds.model.context import BlockContext
from tim_ds.model.embed import Linear, PreciseLinear, SwiGLU
from tim_ds.model.tangent import Tangent


class _Heads(nn.Module):
    """What self- and cross-attention share: head layout, query and key norms, output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        if config.qk_norm:
            self.q_norm = nn.LayerNorm(config.head_dim, eps=ops.QK_NORM_EPS)
            self.k_norm = nn.LayerNorm(config.head_dim, eps=ops.QK_NORM_EPS)
        else:
            self.q_norm = self.k_norm = None
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    @staticmethod
    def affine(norm: nn.LayerNorm | None) -> ops.Affine | None:
        return None if norm is None else (norm.weight, norm.bias)


class SelfAttention(_Heads):
    """Attention among the tokens of one image; the interval embedding shifts q, k and v (`qkv_d`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.qkv = Linear(width, 3 * width)
        self.qkv_d = PreciseLinear(width, 3 * width, bias=False) if config.distance_aware else None

    def forward(self, h_TD: Tensor, again: ops.Again | None, context: BlockContext) -> Tensor:
        # From here on `stream.value` is the tangent of what was computed last: h, qkv, the heads' result.
        stream = context.active_tangent
        qkv = self.qkv(h_TD, stream, again)
        shift, side = None, None
        if self.qkv_d is not None:
            side = None if stream is None else stream.interval()
            shift = self.qkv_d(context.interval_SD, side)
        norms = self.affine(self.q_norm), self.affine(self.k_norm)
        q, k, v = ops.qkv_norm_rope(qkv, self.num_heads, *norms, context.table, shift, context.chunks)
        if stream is None:
            return self.proj(ops.attention(q, k, v, context.self_plan).flatten(-2))
        d_shift = None if side is None else side.value
        moved = ops.qkv_norm_rope_tangent(
            qkv, stream.value, self.num_heads, *norms, context.table, shift, d_shift, stream.plan
        )
        out, sums = ops.attention_with_sums(q, k, v, context.self_plan)
        stream.value = ops.attention_tangent(q, k, v, *moved, out, sums, stream.self_plan).flatten(-2)
        return self.proj(out.flatten(-2), stream)


class CrossAttention(_Heads):
    """Image tokens look at their own caption. Only the queries are rotated, as the authors do it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.q = Linear(config.hidden_size, config.hidden_size)
        self.kv = Linear(config.hidden_size, 2 * config.hidden_size)

    def keys_and_values(self, text_LD: Tensor) -> ops.KeysValues:
        """Of the captions: all that read them share these."""
        return ops.kv_norm(self.kv(text_LD), self.num_heads, self.affine(self.k_norm))

    def forward(
        self, h_TD: Tensor, again: ops.Again | None, text: ops.KeysValues, context: BlockContext
    ) -> Tensor:
        stream = context.active_tangent
        raw_q = self.split(self.q(h_TD, stream, again))
        q = ops.q_norm_rope(raw_q, self.affine(self.q_norm), context.table)
        k, v = text
        assert context.cross_plan is not None, "a text network always plans its cross-attention"
        if stream is None:
            return self.proj(ops.attention(q, k, v, context.cross_plan).flatten(-2))
        assert stream.cross_plan is not None, "a text network plans it for both"
        d_q = ops.q_norm_rope_tangent(
            raw_q, self.split(stream.value), self.affine(self.q_norm), context.table, stream.plan
        )
        out, sums = ops.attention_with_sums(q, k, v, context.cross_plan)
        stream.value = ops.attention_tangent(q, k, v, d_q, None, None, out, sums, stream.cross_plan).flatten(
            -2
        )
        return self.proj(out.flatten(-2), stream)


class TransitionBlock(nn.Module):
    """Self-attention, cross-attention (text networks), MLP; each behind a modulated norm and a gate.

    AdaLN chunk order: shift, scale, gate for self-attention, then for cross-attention, then for the MLP.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_branches = 3 if config.condition == "text" else 2
        self.attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config) if config.condition == "text" else None
        self.mlp = SwiGLU(width, config.mlp_hidden, width)
        self.adaLN_modulation = SwiGLU(
            width, config.adaln_width, 3 * self.num_branches * width, linear=PreciseLinear
        )

    def forward(self, x_TD: Tensor, context: BlockContext) -> Tensor:
        text = None
        if self.cross_attn is not None:
            assert context.text_LD is not None, "a text network always has its captions"
            text = self.cross_attn.keys_and_values(context.text_LD)
        x_TD = self._evaluate(x_TD, text, context)
        copies = context.active_copies
        if copies is not None:
            with torch.no_grad():
                copies.value = self._evaluate(copies.value, copies.keys_and_values(text), copies.context)
        return x_TD

    def _evaluate(self, x_TD: Tensor, text: ops.KeysValues | None, context: BlockContext) -> Tensor:
        stream = context.active_tangent
        side = None if stream is None else stream.modulation()
        m = _Modulation.of(self.adaLN_modulation, context.modulation_SD, side, 3 * self.num_branches)
        h_dtype = ops.compute_dtype(self.mlp.fc2.weight)
        x, h = m.norm(0, x_TD, None, context, h_dtype)
        branch = self.attn(h, m.again(0, x, context, h_dtype), context)
        if self.cross_attn is not None:
            assert text is not None, "keys and values come with cross-attention"
            x, h = m.norm(1, x, branch, context, h_dtype)
            branch = self.cross_attn(h, m.again(1, x, context, h_dtype), text, context)
        x, h = m.norm(self.num_branches - 1, x, branch, context, h_dtype)
        return m.add_last(x, self.mlp(h, stream), context)


@dataclass(frozen=True, eq=False)
class _Modulation:
    """Shift, scale and gate of every branch, [S, D] each, and their tangents when the forward carries any."""

    chunks: tuple[Tensor, ...]
    tangents: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, generator: SwiGLU, modulation_SD: Tensor, side: Tangent | None, count: int) -> _Modulation:
        chunks = generator(modulation_SD, side).chunk(count, dim=-1)
        return cls(chunks, None if side is None else side.value.chunk(count, dim=-1))

    def norm(
        self,
        number: int,
        x_TD: Tensor,
        branch_TD: Tensor | None,
        context: BlockContext,
        h_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add the branch before number `number` through its gate, and normalise for that number: (x', h)."""
        m, d_m, at = self.chunks, self.tangents, 3 * number
        gate = None if branch_TD is None else m[at - 1]
        x, h = ops.residual_modulated_norm(x_TD, branch_TD, gate, m[at], m[at + 1], context.chunks, h_dtype)
        stream = context.active_tangent
        if stream is not None and d_m is not None:
            d_gate = None if gate is None else d_m[at - 1]
            stream.norm(x, branch_TD, gate, d_gate, m[at + 1], d_m[at], d_m[at + 1], h.dtype)
        return x, h

    def again(
        self, number: int, x_TD: Tensor, context: BlockContext, h_dtype: torch.dtype
    ) -> ops.Again | None:
        """How h of `norm` comes out of its x'. For its only reader: two products would compute it twice."""
        shift, scale = self.chunks[3 * number : 3 * number + 2]
        return ops.modulated_norm_again(x_TD, shift, scale, context.chunks, h_dtype)

    def add_last(self, x_TD: Tensor, branch_TD: Tensor, context: BlockContext) -> Tensor:
        stream = context.active_tangent
        if stream is not None and self.tangents is not None:
            stream.add_branch(branch_TD, self.chunks[-1], self.tangents[-1])
        return ops.gated_residual(x_TD, branch_TD, self.chunks[-1], context.chunks)


class FinalLayer(nn.Module):
    """Modulated norm and the projection to the target's channels, in float32 or wider: [T, D] -> [T, C]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = PreciseLinear(width, config.token_channels)
        self.adaLN_modulation = SwiGLU(width, width // 2, 2 * width, linear=PreciseLinear)

    def forward(self, x_TD: Tensor, context: BlockContext) -> Tensor:
        """What travels beside becomes the tangent of the output, or the output of the copies."""
        F_TC = self._evaluate(x_TD, context)
        copies = context.active_copies
        if copies is not None:
            with torch.no_grad():
                copies.value = self._evaluate(copies.value, copies.context)
        return F_TC

    def _evaluate(self, x_TD: Tensor, context: BlockContext) -> Tensor:
        stream = context.active_tangent
        side = None if stream is None else stream.modulation()
        m = _Modulation.of(self.adaLN_modulation, context.modulation_SD, side, 2)
        _, h = m.norm(0, x_TD, None, context)
        return self.linear(h, stream)
