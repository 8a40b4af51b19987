"""What enters the network: latent tokens, times, captions and labels.

T image tokens, L text tokens, S segments, C token channels, D model width, E text width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from tim_ds.model import ops
from tim_ds.model.config import ModelConfig
from tim_ds.model.tangent import Side, Tangent

TIME_FREQUENCIES = 128


class Linear(nn.Linear):
    """A matrix product in the dtype of its weight, or of autocast; activations are rounded to it."""

    def forward(self, input: Tensor, side: Side | None = None, again: ops.Again | None = None) -> Tensor:
        """With `again`, the input is not kept for the backward."""
        dtype = ops.compute_dtype(self.weight)
        weight = self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if side is not None:
            side.linear(weight, bias)
        return ops.linear(input.to(dtype), weight, bias, again)


class PreciseLinear(nn.Linear):
    """A matrix product in the dtype of its weight, at least float32, whatever autocast or the input says.

    For the paths in which the time derivative lives: times, AdaLN generators, final layer. Rounded to
    bfloat16 they alone put an error of tens of percent on a central difference.
    """

    def forward(self, input: Tensor, side: Side | None = None) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            weight = self.weight.to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            if side is not None:
                side.linear(weight, bias)
            return nnf.linear(input.to(dtype), weight, bias)


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1_g(v)) * fc1_x(v)); fc1_g is the activated half, in timm's naming."""

    def __init__(
        self, width: int, hidden: int, out: int, linear: type[Linear] | type[PreciseLinear] = Linear
    ) -> None:
        super().__init__()
        self.fc1_g = linear(width, hidden)
        self.fc1_x = linear(width, hidden)
        self.fc2 = linear(hidden, out)

    def forward(self, v: Tensor, side: Tangent | None = None) -> Tensor:
        other = None if side is None else side.fork()
        gate, up = self.fc1_g(v, side), self.fc1_x(v, other)
        if side is not None and other is not None:
            side.value = ops.swiglu_tangent(gate, up, side.value, other.value, side.plan)
        product = ops.swiglu(gate, up)
        if isinstance(self.fc2, Linear):
            return self.fc2(product, side, ops.swiglu_again(gate, up))
        return self.fc2(product, side)


class PatchProjection(nn.Module):
    """The patch convolution as a matrix product on packed tokens: [T, p*p*C] -> [T, D].

    The weight has the convolution's shape [D, C, p, p]; a token's last axis is ordered (row, col, channel).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.in_channels, p, p))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x_TC: Tensor, side: Side | None = None) -> Tensor:
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        if side is not None:
            side.linear(weight, self.bias)
        return nnf.linear(x_TC.to(weight.dtype), weight, self.bias)


class PatchEmbedder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = PatchProjection(config)

    def forward(self, x_TC: Tensor, side: Side | None = None) -> Tensor:
        return self.proj(x_TC, side)


def time_features(t_S: Tensor) -> Tensor:
    """Sinusoid of a conditioning time, cosines first: [S] -> [S, 256]. The time is not multiplied by 1000.

    In the dtype of the time, at least float32.
    """
    angle = _time_angle(ops.at_least_float32(t_S))
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def time_features_tangent(t_S: Tensor, d_t_S: Tensor) -> Tensor:
    """Tangent of `time_features`: [S] -> [S, 256]."""
    t = ops.at_least_float32(t_S)
    angle, d_angle = _time_angle(t), _time_angle(d_t_S.to(t.dtype))
    return torch.cat([-angle.sin() * d_angle, angle.cos() * d_angle], dim=1)


def _time_angle(t: Tensor) -> Tensor:
    """Time times each frequency: [S] -> [S, 128]."""
    k = torch.arange(TIME_FREQUENCIES, dtype=t.dtype, device=t.device)
    # The exponent is rounded in the dtype of t, as the authors round it, the exponential is not: a vectorised
    # float32 `exp` is off by a unit that differs between machines, which VP's conditioning time of 999 t
    # magnifies to 1e-5.
    frequency = torch.exp((-math.log(10000.0) / TIME_FREQUENCIES * k).double()).to(t.dtype)
    return t[:, None] * frequency


class TimeEmbedder(nn.Module):
    """Conditioning time to a vector: [S] -> [S, D].

    Features are made in the dtype of the time and rounded at the first product, which is in the dtype of the
    network, at least float32: a float64 time keeps its phases exact in a network of any dtype.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            PreciseLinear(2 * TIME_FREQUENCIES, width), nn.SiLU(), PreciseLinear(width, width)
        )

    def forward(self, t_S: Tensor, side: Side | None = None) -> Tensor:
        """`side` enters with the tangent of t, or with other times."""
        features = time_features(t_S)
        if side is not None:
            side.through(time_features, time_features_tangent, t_S)
        inward, activation, outward = self.mlp
        hidden = inward(features, side)
        if side is not None:
            # Not the module: a second call of it would be a step of ZeRO-3's trace.
            side.through(nnf.silu, ops.silu_tangent, hidden)
        return outward(activation(hidden), side)


class CaptionEmbedder(nn.Module):
    """Text states to model width, once a forward: [L, E] -> [L, D]."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_dim, eps=1e-5)
        self.mlp = SwiGLU(text_dim, 4 * width, width)

    def forward(self, states_LE: Tensor) -> Tensor:
        return self.mlp(self.norm(states_LE.to(self.norm.weight.dtype)))


class LabelEmbedder(nn.Module):
    """Class labels to vectors: int64 [S] -> [S, D]. The last row is the null label, where there is one."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, width)

    def forward(self, labels_S: Tensor) -> Tensor:
        return self.embedding_table(labels_S)
