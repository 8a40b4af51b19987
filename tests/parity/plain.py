"""The network once more, written from the formulas on padded batches, to check the packed one on any option.

Nothing is shared with tim_ds.model but the names of the parameters: a real convolution, explicit softmax,
rotation by complex numbers, one batch axis. Letters in shapes: B images, N tokens, M text tokens, D width, Dh
head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor


def plain_forward(
    network: Mapping[str, Any], weights: Mapping[str, Tensor], x: Tensor, t: Tensor, r: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """F (B, C, H, W), h_proj (B, N, z_dim) and the activations that goldens record, by their names there.

    Args:
        network: the authors' constructor arguments.
        t, r: conditioning times, (B,).
        y: text states (B, M, width) or labels (B,).
    """

    def linear(v: Tensor, name: str) -> Tensor:
        out = torch.einsum("...i,oi->...o", v, weights[f"{name}.weight"])
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def swiglu(v: Tensor, name: str) -> Tensor:
        gate = linear(v, f"{name}.fc1_g")
        return linear(gate * torch.sigmoid(gate) * linear(v, f"{name}.fc1_x"), f"{name}.fc2")

    def norm(v: Tensor, epsilon: float, name: str = "") -> Tensor:
        centred = v - v.mean(-1, keepdim=True)
        v = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + epsilon)
        return v * weights[f"{name}.weight"] + weights[f"{name}.bias"] if name else v

    def embed_time(time: Tensor, name: str) -> Tensor:
        frequency = 10000.0 ** (-torch.arange(128, dtype=time.dtype) / 128)
        phase = time[:, None] * frequency
        hidden = linear(torch.cat([torch.cos(phase), torch.sin(phase)], 1), f"{name}.mlp.0")
        return linear(hidden * torch.sigmoid(hidden), f"{name}.mlp.2")

    def heads(v: Tensor) -> Tensor:
        return v.unflatten(-1, (network["num_heads"], -1)).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def head_norm(v: Tensor, name: str) -> Tensor:
        return norm(v, 1e-5, name) if network["qk_norm"] else v

    p, num_heads = network["patch_size"], network["num_heads"]
    patches = nnf.conv2d(x, weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=p)
    height, width = patches.shape[-2:]
    tokens = patches.flatten(2).transpose(1, 2)
    rotation = _rotation(height, width, network["hidden_size"] // num_heads, x.dtype)

    condition = network.get("new_condition", "t-r")
    interval_embedder = "delta_embedder" if network.get("use_new_embed") else "t_embedder"
    time_of = {"t": t, "r": r, "t-r": t - r}
    *first, last = condition.split(",")
    delta = embed_time(time_of[last], interval_embedder)
    for name in first:
        delta = delta + embed_time(time_of[name], "t_embedder")
    t_embed = embed_time(t, "t_embedder")
    c = t_embed + delta
    text = None
    if y.is_floating_point():
        y_embed = swiglu(norm(y, 1e-5, "y_embedder.norm"), "y_embedder.mlp")
        text = norm(y_embed, 1e-6)
    else:
        y_embed = weights["y_embedder.embedding_table.weight"][y]
        c = c + y_embed
    recorded = {"x_embed": tokens, "y_embed": y_embed, "t_embed": t_embed, "delta_embed": delta}

    for i in range(network["depth"]):
        block = f"blocks.{i}"
        modulation = swiglu(c, f"{block}.adaLN_modulation")[:, None]
        chunks = list(modulation.chunk(6 if text is None else 9, dim=-1))

        def enter(v: Tensor, chunks: list[Tensor] = chunks) -> Tensor:
            shift, scale = chunks.pop(0), chunks.pop(0)
            return norm(v, 1e-6) * (1 + scale) + shift

        qkv = linear(enter(tokens), f"{block}.attn.qkv")
        if network.get("distance_aware"):
            qkv = qkv + linear(delta, f"{block}.attn.qkv_d")[:, None]
        q, k, v = (heads(part) for part in qkv.chunk(3, dim=-1))
        q = _rotate(head_norm(q, f"{block}.attn.q_norm"), rotation)
        k = _rotate(head_norm(k, f"{block}.attn.k_norm"), rotation)
        attention = linear(attend(q, k, v), f"{block}.attn.proj")
        tokens = tokens + chunks.pop(0) * attention
        recorded |= {f"block{i}_adaln": modulation, f"block{i}_attn": attention}
        if text is not None:
            q = heads(linear(enter(tokens), f"{block}.cross_attn.q"))
            k, v = (heads(part) for part in linear(text, f"{block}.cross_attn.kv").chunk(2, dim=-1))
            q = _rotate(head_norm(q, f"{block}.cross_attn.q_norm"), rotation)
            k = head_norm(k, f"{block}.cross_attn.k_norm")
            crossed = linear(attend(q, k, v), f"{block}.cross_attn.proj")
            tokens = tokens + chunks.pop(0) * crossed
            recorded[f"block{i}_cross_attn"] = crossed
        mixed = swiglu(enter(tokens), f"{block}.mlp")
        tokens = tokens + chunks.pop(0) * mixed
        recorded |= {f"block{i}_mlp": mixed, f"block{i}_out": tokens}
        if i + 1 == network["encoder_depth"]:
            hidden = tokens
            for layer in (0, 2):
                hidden = linear(hidden, f"projector.{layer}")
                hidden = hidden * torch.sigmoid(hidden)
            recorded["h_proj"] = linear(hidden, "projector.4")

    shift, scale = swiglu(c, "final_layer.adaLN_modulation")[:, None].chunk(2, dim=-1)
    out = linear(norm(tokens, 1e-6) * (1 + scale) + shift, "final_layer.linear")
    out = out.reshape(x.shape[0], height, width, p, p, -1)
    recorded["F"] = torch.einsum("bhwijc->bchiwj", out).reshape(x.shape)
    return recorded


def rotary_angles(height: int, width: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Angle of every pair of a head at every token, (N, Dh / 2), at the authors' positions (n mod h, n div
    h)."""
    n = torch.arange(height * width)
    frequency = 10000.0 ** (-torch.arange(0, head_dim // 2, 2, dtype=torch.float64) / (head_dim // 2))
    a, b = (n % height).double(), (n // height).double()
    return torch.cat([a[:, None] * frequency, b[:, None] * frequency], dim=1).to(dtype)


def _rotation(height: int, width: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    angle = rotary_angles(height, width, head_dim, dtype)
    return torch.polar(torch.ones_like(angle), angle)


def _rotate(v: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2)
