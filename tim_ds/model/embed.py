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

TIME_FREQUENCIES = 128


class Linear(nn.Linear):
    """A matrix product in the dtype of its weight (bfloat16 weights take float32 activations)."""

    def forward(self, input: Tensor) -> Tensor:
        return nnf.linear(input.to(self.weight.dtype), self.weight, self.bias)


class PreciseLinear(nn.Linear):
    """A matrix product in float32 or wider, whatever autocast or the stored dtype says.

    For the paths in which the time derivative lives: times, AdaLN generators, final layer. Rounded to
    bfloat16 they alone put an error of tens of percent on a central difference.
    """

    def forward(self, input: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(self.weight.dtype, torch.float32), input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return nnf.linear(input.to(dtype), self.weight.to(dtype), bias)


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1_g(v)) * fc1_x(v)); fc1_g is the activated half (reference_spec 1.3)."""

    def __init__(self, width: int, hidden: int, out: int, linear: type[nn.Linear] = Linear) -> None:
        super().__init__()
        self.fc1_g = linear(width, hidden)
        self.fc1_x = linear(width, hidden)
        self.fc2 = linear(hidden, out)

    def forward(self, v: Tensor) -> Tensor:
        return self.fc2(ops.swiglu(self.fc1_g(v), self.fc1_x(v)))


class PatchProjection(nn.Module):
    """The patch convolution as a matrix product on packed tokens: [T, p*p*C] -> [T, D].

    The weight has the convolution's shape [D, C, p, p]; a token's last axis is ordered (row, col, channel).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.in_channels, p, p))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x_TC: Tensor) -> Tensor:
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return nnf.linear(x_TC.to(weight.dtype), weight, self.bias)


class PatchEmbedder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = PatchProjection(config)

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.proj(x_TC)


def time_features(t_S: Tensor) -> Tensor:
    """Sinusoid of a conditioning time, cosines first: [S] -> [S, 256]. The time is not multiplied by 1000."""
    t = ops.at_least_float32(t_S)
    k = torch.arange(TIME_FREQUENCIES, dtype=t.dtype, device=t.device)
    # The exponent is rounded in the dtype of t, as the authors round it, the exponential is not: a vectorised
    # float32 `exp` is off by a unit that differs between machines, which VP's conditioning time of 999 t
    # magnifies to 1e-5.
    frequency = torch.exp((-math.log(10000.0) / TIME_FREQUENCIES * k).double()).to(t.dtype)
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeEmbedder(nn.Module):
    """Conditioning time to a vector: [S] -> [S, D], in float32 or wider."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            PreciseLinear(2 * TIME_FREQUENCIES, width), nn.SiLU(), PreciseLinear(width, width)
        )

    def forward(self, t_S: Tensor) -> Tensor:
        return self.mlp(time_features(t_S))


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
