"""Small networks with the signature of the real one, and images for them, for tests of the objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import EDM, OTFM, VE, VP, TiMTransport, Transport, TrigFlow
from tim_ds.packed import ClassCondition, Condition, Direction, Network, NetworkOutput, Segments

TRANSPORTS: dict[str, Transport] = {
    "ot_fm": OTFM(),
    "trigflow": TrigFlow(),
    "edm_sd1": EDM(sigma_data=1.0),
    "edm_sd0p5": EDM(sigma_data=0.5),
    "vp": VP(),
    "ve": VE(),
    "tim": TiMTransport(),
}


def differenced(**settings: Any) -> ObjectiveConfig:
    """Settings for networks that carry no tangents: `dde` needs nothing of a network but its calls."""
    return ObjectiveConfig(derivative="dde", **settings)


def invert_c_noise(transport: Transport, c: Tensor) -> Tensor:
    match transport.name:
        case "edm":
            return torch.exp(4 * c)
        case "vp":
            return c / 999
        case "ve":
            return 2 * torch.exp(c)
        case _:
            return c


def random_times(transport: Transport, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float64 (t, r), r < t, spread over the whole domain: log-uniform where it spans decades."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(2, count, generator=generator, dtype=torch.float64)
    if transport.T_min > 0:
        times = transport.T_min * (transport.T_max / transport.T_min) ** u
    else:
        times = transport.T_min + (transport.T_max - transport.T_min) * u
    return times.amax(0), times.amin(0)


def images_at(
    transport: Transport,
    t: Tensor | Sequence[float],
    r: Tensor | Sequence[float],
    grids: Sequence[tuple[int, int]],
    *,
    channels: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> NoisedPack:
    """Unit normal images of `grids` at the times (t, r); image i has label i."""
    generator = torch.Generator().manual_seed(seed)
    segments = Segments.from_grids(grids)
    x, z = torch.randn(2, segments.num_tokens, channels, generator=generator, dtype=dtype)
    t_S, r_S = (torch.as_tensor(s, dtype=dtype) for s in (t, r))
    times = Times.from_tensors(transport, t_S, r_S)
    return NoisedPack(transport, x, z, times, segments, ClassCondition(torch.arange(len(grids))))


class Call(NamedTuple):
    x_TC: Tensor
    c_t_S: Tensor
    c_r_S: Tensor
    segments: Segments
    condition: Condition
    with_features: bool


class SmoothNetwork(nn.Module):
    """Smooth in x, c_t, c_r; tokens of a segment interact; remembers its calls."""

    def __init__(self, channels: int, *, num_classes: int = 4, width: int = 8, z_dim: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.inward = parameter(channels, width)
        self.context = parameter(channels, width)
        self.time = parameter(4, width)
        self.label = parameter(num_classes + 1, width)
        self.outward = parameter(width, channels)
        self.projector = parameter(width, z_dim)
        self.calls: list[Call] = []

    def forward(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        assert isinstance(condition, ClassCondition)
        self.calls.append(Call(x_TC, t_S, r_S, segments, condition, with_features))
        zero = x_TC.new_zeros(segments.num_segments, x_TC.shape[1])
        sums_SC = zero.index_add(0, segments.segment_ids, x_TC)
        mean_SC = sums_SC / torch.tensor(segments.lengths, dtype=x_TC.dtype)[:, None]
        time_S4 = torch.stack([torch.sin(t_S), torch.cos(t_S), torch.sin(r_S), torch.cos(t_S - r_S)], -1)
        bias_SD = mean_SC @ self.context + time_S4 @ self.time + self.label[condition.labels_S]
        hidden_TD = torch.tanh(x_TC @ self.inward + segments.expand(bias_SD))
        return NetworkOutput(hidden_TD @ self.outward, hidden_TD @ self.projector if with_features else None)


class AttentionNetwork(nn.Module):
    """One SDPA layer over the tokens of each segment; for forward mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels + 2, 3 * channels, dtype=torch.float64)

    def forward(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        times_T2 = segments.expand(torch.stack([t_S, r_S], -1))
        outputs = []
        for part in segments.split(self.qkv(torch.cat([x_TC, times_T2], -1))):
            q, k, v = part[None, None].chunk(3, -1)
            outputs.append(nnf.scaled_dot_product_attention(q, k, v)[0, 0])
        return NetworkOutput(torch.cat(outputs), None)


class CarryingNetwork:
    """Adds the derivative along a direction to a network, by forward mode; remembers the directions."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.directions: list[Direction | None] = []

    def __call__(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
        direction: Direction | None = None,
    ) -> NetworkOutput:
        self.directions.append(direction)
        output = self.network(x_TC, t_S, r_S, segments, condition, with_features=with_features)
        if direction is None:
            return output
        tokens = segments.token_index(direction.indices)
        dx_TC = torch.zeros_like(x_TC).index_copy(0, tokens, direction.dx_TC)
        dt_S = torch.zeros_like(t_S).index_copy(0, torch.tensor(direction.indices), direction.dt_S)
        with torch.no_grad():
            dF_TC = torch.func.jvp(
                lambda x, t: self.network(x, t, r_S, segments, condition).F_TC, (x_TC, t_S), (dx_TC, dt_S)
            )[1]
        return output._replace(dF_TC=dF_TC[tokens])


class GaussianNetwork:
    """The exact transition of data with independent N(mean, deviation^2) entries, for any transport.

    Along the PF-ODE (x_t - alpha_t mean) / S_t is constant with S_t^2 = alpha_t^2 deviation^2 + sigma_t^2,
    which gives x_r; F solves x_r = A x_t + B F, and at r = t it is E[alpha_hat x + sigma_hat z | x_t].
    """

    def __init__(self, transport: Transport, mean: float, deviation: float) -> None:
        self.transport = transport
        self.mean = mean
        self.deviation = deviation

    def spread(self, t: Tensor) -> Tensor:
        return torch.sqrt((self.transport.alpha(t) * self.deviation) ** 2 + self.transport.sigma(t) ** 2)

    def posterior(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[x | x_t], E[z | x_t]."""
        alpha, sigma = self.transport.alpha(t), self.transport.sigma(t)
        centred = (x_t - alpha * self.mean) / self.spread(t) ** 2
        return self.mean + alpha * self.deviation**2 * centred, sigma * centred

    def state_at(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        transport = self.transport
        unit = (x_t - transport.alpha(t) * self.mean) / self.spread(t)
        return transport.alpha(r) * self.mean + self.spread(r) * unit

    def F(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        transport = self.transport
        local = transport.diffusion_target(*self.posterior(x_t, t), t)
        is_local = (t == r).expand_as(x_t)
        B = torch.where(t == r, torch.ones_like(t), transport.B(t, r))
        return torch.where(is_local, local, (self.state_at(x_t, t, r) - transport.A(t, r) * x_t) / B)

    def __call__(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        t = segments.expand(invert_c_noise(self.transport, t_S))[:, None]
        r = segments.expand(invert_c_noise(self.transport, r_S))[:, None]
        return NetworkOutput(self.F(x_TC, t, r), None)
