"""One TiM block and the final layer, on packed tokens.

T image tokens, L text tokens, S segments, D model width, N heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tim_ds.model import ops
from tim_ds.model.config import ModelConfig
from tim_ds.model.embed import Linear, PreciseLinear, SwiGLU
from tim_ds.packed import Segments


@dataclass(frozen=True, eq=False)
class BlockContext:
    """What all blocks of one forward share."""

    segments: Segments
    modulation_SD: Tensor
    """c: the vector that drives every AdaLN generator, float32 [S, D]."""
    interval_SD: Tensor
    """The raw interval embedding, for the distance-aware term, float32 [S, D]."""
    table: tuple[Tensor, Tensor]
    """Rotary cos and sin of every image token."""
    chunks: ops.ChunkPlan
    self_plan: ops.AttentionPlan
    text_LD: Tensor | None
    """Embedded and normalised captions (None in a class-conditional network). The norm in front of every
    cross-attention has no parameters and the captions do not change, so it is taken once a forward."""
    cross_plan: ops.AttentionPlan | None


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
    def normed(x: Tensor, norm: nn.LayerNorm | None, table: tuple[Tensor, Tensor] | None) -> Tensor:
        if norm is None:
            return ops.qk_norm_rope(x, None, None, table)
        return ops.qk_norm_rope(x, norm.weight, norm.bias, table)


class SelfAttention(_Heads):
    """Attention among the tokens of one image; the interval embedding shifts q, k and v (`qkv_d`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.qkv = Linear(width, 3 * width)
        self.qkv_d = PreciseLinear(width, 3 * width, bias=False) if config.distance_aware else None

    def forward(self, h_TD: Tensor, context: BlockContext) -> Tensor:
        qkv = self.qkv(h_TD)
        if self.qkv_d is not None:
            shift = context.segments.expand(self.qkv_d(context.interval_SD))
            qkv = (qkv + shift).to(qkv.dtype)
        q, k, v = (self.split(x) for x in qkv.chunk(3, dim=-1))
        q = self.normed(q, self.q_norm, context.table)
        k = self.normed(k, self.k_norm, context.table)
        return self.proj(ops.attention(q, k, v, context.self_plan).flatten(-2))


class CrossAttention(_Heads):
    """Image tokens look at their own caption. Only the queries are rotated (reference_spec 1.5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.q = Linear(config.hidden_size, config.hidden_size)
        self.kv = Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(self, h_TD: Tensor, text_LD: Tensor, context: BlockContext) -> Tensor:
        q = self.normed(self.split(self.q(h_TD)), self.q_norm, context.table)
        k, v = (self.split(x) for x in self.kv(text_LD).chunk(2, dim=-1))
        k = self.normed(k, self.k_norm, None)
        assert context.cross_plan is not None, "a text network always plans its cross-attention"
        return self.proj(ops.attention(q, k, v, context.cross_plan).flatten(-2))


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
        m = self.adaLN_modulation(context.modulation_SD).chunk(3 * self.num_branches, dim=-1)
        chunks, h_dtype = context.chunks, ops.compute_dtype(self.mlp.fc2.weight)
        x, h = ops.residual_modulated_norm(x_TD, None, None, m[0], m[1], chunks, h_dtype)
        branch, gate = self.attn(h, context), m[2]
        if self.cross_attn is not None:
            assert context.text_LD is not None, "a text network always has its captions"
            x, h = ops.residual_modulated_norm(x, branch, gate, m[3], m[4], chunks, h_dtype)
            branch, gate = self.cross_attn(h, context.text_LD, context), m[5]
        x, h = ops.residual_modulated_norm(x, branch, gate, m[-3], m[-2], chunks, h_dtype)
        return ops.gated_residual(x, self.mlp(h), m[-1], chunks)


class FinalLayer(nn.Module):
    """Modulated norm and the projection to the target's channels, in float32 or wider: [T, D] -> [T, C]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = PreciseLinear(width, config.token_channels)
        self.adaLN_modulation = SwiGLU(width, width // 2, 2 * width, linear=PreciseLinear)

    def forward(self, x_TD: Tensor, modulation_SD: Tensor, chunks: ops.ChunkPlan) -> Tensor:
        shift, scale = self.adaLN_modulation(modulation_SD).chunk(2, dim=-1)
        _, h = ops.residual_modulated_norm(x_TD, None, None, shift, scale, chunks)
        return self.linear(h)
