"""The authors' network in plain PyTorch, on batches of one size: what the step is compared with.

A second, separate implementation, from the published method and the described behaviour of the authors' code:
its modules, the order of its operations and, under autocast, its dtypes (residual stream, gates and
conditioning in bfloat16). It imports torch alone, so that nothing of ours can make it slower or agree with
us. Parameter names are the authors', which are ours.

It is a strong baseline. Rotary tables are made once a size and kept on the device, where the authors make
positions on the host in every call; attention is `scaled_dot_product_attention` with the kernel that torch
prefers, where they ask for FlashAttention-2.

B images, N image tokens of one, M text tokens of one, D width, K heads, H head width, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RopeLayout = Literal["row_major", "reference"]


class BaselineNetwork(nn.Module):
    """F(x_t, t, r | text or class) with one embedder for t and one for t - r.

    Args:
        text_dim: width of a text state; None for a network on classes.
        num_labels: rows of the label table; None for a network on text.
        z_dim: width of the projector's features; None for a network without projector.
        rope_layout: `reference` for the authors' positions, `row_major` for (row, column).
        checkpoint_blocks: compute every block again in the backward.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_hidden: int,
        adaln_hidden: int,
        text_dim: int | None,
        num_labels: int | None,
        encoder_depth: int,
        z_dim: int | None,
        projector_dim: int = 2048,
        rope_layout: RopeLayout = "reference",
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        if (text_dim is None) == (num_labels is None):
            raise ValueError("expected text_dim or num_labels, one of the two")
        self.in_channels, self.patch_size, self.encoder_depth = in_channels, patch_size, encoder_depth
        self.head_dim = hidden_size // num_heads
        self.rope_layout: RopeLayout = rope_layout
        self.checkpoint_blocks = checkpoint_blocks
        self.x_embedder = PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = TimestepEmbed(hidden_size)
        self.delta_embedder = TimestepEmbed(hidden_size)
        self.is_text = text_dim is not None
        if text_dim is not None:
            self.y_embedder = TextEmbed(text_dim, hidden_size)
        else:
            assert num_labels is not None, "checked above"
            self.y_embedder = LabelEmbed(num_labels, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_hidden, adaln_hidden, is_text=self.is_text)
            for _ in range(depth)
        )
        self.projector = None
        if z_dim is not None:
            self.projector = nn.Sequential(
                nn.Linear(hidden_size, projector_dim),
                nn.SiLU(),
                nn.Linear(projector_dim, projector_dim),
                nn.SiLU(),
                nn.Linear(projector_dim, z_dim),
            )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self._tables: dict[tuple[int, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, *, with_features: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """F [B, C, height, width], and the projector's features [B, N, Z] when they are asked for.

        Shapes:
            x: [B, C, height, width].   t, r: [B].   y: text states [B, M, E] or labels [B].
        """
        p = self.patch_size
        height, width = x.shape[2] // p, x.shape[3] // p
        tokens = self.x_embedder(x)
        delta = self.delta_embedder(t - r)[:, None]
        c = self.t_embedder(t)[:, None] + delta
        text = None
        if self.is_text:
            text = self.y_embedder(y)
        else:
            c = c + self.y_embedder(y)[:, None]
        cos, sin = self._rotary(height, width, x)
        features = None
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, c, delta, text, cos, sin, use_reentrant=False)
            else:
                tokens = block(tokens, c, delta, text, cos, sin)
            if with_features and number == self.encoder_depth:
                assert self.projector is not None, "features need a projector"
                features = self.projector(tokens)
        out = self.final_layer(tokens, c)
        out = out.reshape(x.shape[0], height, width, p, p, self.in_channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape), features

    def compile_parts(self, backend: str | Callable[..., Any]) -> None:
        """Compile embedder, blocks and final layer, each for the shapes it meets. All blocks share one
        compilation, so that it takes no longer for more of them."""
        options: dict[str, Any] = {"backend": backend, "dynamic": False}
        for part in (self.y_embedder, *self.blocks, self.final_layer):
            part.compile(**options)

    def _rotary(self, height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        # float32 angles, whatever autocast says.
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (height, width, like.device, dtype)
        if key not in self._tables:
            self._tables[key] = rotary_table(
                height, width, self.head_dim, self.rope_layout, like.device, dtype
            )
        return self._tables[key]


class PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbed(nn.Module):
    """Sinusoid of 256 values, cosines first, the time as it is; two layers: [B] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        wide = torch.promote_types(t.dtype, torch.float32)
        index = torch.arange(128, device=t.device, dtype=wide)
        angle = t.to(wide)[:, None] * torch.exp(-math.log(10000.0) / 128 * index)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(t.dtype))


class GatedMLP(nn.Module):
    """fc2(SiLU(fc1_g v) * fc1_x v)."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(width, hidden)
        self.fc1_x = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, v: Tensor) -> Tensor:
        return self.fc2(nnf.silu(self.fc1_g(v)) * self.fc1_x(v))


class TextEmbed(nn.Module):
    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_dim, eps=1e-5)
        self.mlp = GatedMLP(text_dim, 4 * width, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.mlp(self.norm(y))


class LabelEmbed(nn.Module):
    def __init__(self, num_labels: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, head_dim = num_heads, width // num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv_d = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-5)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-5)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor, delta: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(h) + self.qkv_d(delta)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, N, K, H]
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)
        return self.proj(attend(q, k, v))


class CrossAttention(nn.Module):
    """Queries are rotated, keys are not."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, head_dim = num_heads, width // num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = nn.LayerNorm(head_dim, eps=1e-5)
        self.k_norm = nn.LayerNorm(head_dim, eps=1e-5)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.q(h).unflatten(-1, (self.num_heads, -1))
        k, v = self.kv(text).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)
        k = self.k_norm(k).to(v.dtype)
        return self.proj(attend(q, k, v))


class Block(nn.Module):
    """Self-attention, cross-attention to the text (where there is one), MLP."""

    def __init__(
        self, width: int, num_heads: int, mlp_hidden: int, adaln_hidden: int, *, is_text: bool
    ) -> None:
        super().__init__()
        self.num_chunks = 9 if is_text else 6
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, num_heads)
        self.cross_attn = None
        if is_text:
            self.norm2_i = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
            self.norm2_t = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
            self.cross_attn = CrossAttention(width, num_heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = GatedMLP(width, mlp_hidden, width)
        self.adaLN_modulation = GatedMLP(width, adaln_hidden, self.num_chunks * width)

    def forward(
        self, x: Tensor, c: Tensor, delta: Tensor, text: Tensor | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        m = self.adaLN_modulation(c).chunk(self.num_chunks, dim=-1)
        x = x + m[2] * self.attn(modulate(self.norm1(x), m[0], m[1]), delta, cos, sin)
        if self.cross_attn is not None:
            assert text is not None, "a network on text is given text"
            h = modulate(self.norm2_i(x), m[3], m[4])
            x = x + m[5] * self.cross_attn(h, self.norm2_t(text), cos, sin)
        return x + m[-1] * self.mlp(modulate(self.norm3(x), m[-3], m[-2]))


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = GatedMLP(width, width // 2, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


def modulate(v: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return v * (1 + scale) + shift


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(H)) v: [B, N, K, H] each -> [B, N, D]."""
    out = nnf.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def rotary_table(
    height: int, width: int, head_dim: int, layout: RopeLayout, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [N, 1, H]: the first half of a head turns with one axis, the second with the other;
    a value of each angle for both entries of a pair."""
    n = torch.arange(height * width)
    if layout == "reference":
        a, b = n % height, n // height
    else:
        a, b = n // width, n % width
    half = head_dim // 2
    frequency = 10000.0 ** (-2.0 * torch.arange(half // 2, dtype=torch.float64) / half)
    angles = [(axis[:, None] * frequency).repeat_interleave(2, dim=1) for axis in (a, b)]
    angle = torch.cat(angles, dim=1)[:, None].to(dtype)
    return angle.cos().to(device), angle.sin().to(device)


def rotate(v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours (v0, v1) -> (v0 cos - v1 sin, v1 cos + v0 sin), in the dtype of the angles."""
    first, second = v.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return v * cos + turned * sin
