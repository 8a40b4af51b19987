"""dF/dt along the path at fixed r, without gradient.

`paired` and `dde` come with the main call of the network: given the direction of the path it returns the
derivative too, given both sides of a difference it returns F there (`path_direction`, `two_sides`). `jvp`,
and `dde` for networks that carry nothing, are estimators of one signature that call the network on their own.

T' tokens of the segments that take part, out of T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tim_ds.errors import ConfigError
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.noised import NoisedPack
from tim_ds.packed import Copies, Direction, Network, Segments


class Derivative(Protocol):
    """dF/dt [T', C] of the segments `indices`, in that order, at fixed r.

    Args:
        indices: segments that take part, at least one.
        step: half-width of the difference in the transport's time; None: the transport's own. `forward_mode`
            has no use for it.
    """

    def __call__(
        self, network: Network, pack: NoisedPack, indices: Sequence[int], step: float | None
    ) -> Tensor: ...


class TwoSides(NamedTuple):
    """The stencil of Eq. 10: what F is asked for at t + e and t - e, and how the answers are put together."""

    copies: Copies
    """Two an image: its late side, then its early side."""
    pack: Segments
    """The copies as a pack of their own."""
    span_T1: Tensor
    """(t + e) - (t - e) as rounded, of every token of the images."""

    def difference(self, F_TC: Tensor) -> Tensor:
        """dF/dt [T', C] from F at the copies, in the dtype of the states."""
        F_TC = F_TC.to(self.copies.x_TC.dtype)
        late, early = (F_TC.index_select(0, tokens) for tokens in _sides(self.pack))
        return (late - early) / self.span_T1


def _sides(pack: Segments) -> list[Tensor]:
    """Tokens of the late sides and of the early sides of a pack of both."""
    return [pack.token_index(range(side, pack.num_segments, 2)) for side in range(2)]


@torch.no_grad()
def two_sides(pack: NoisedPack, indices: Sequence[int], step: float | None) -> TwoSides:
    """The states and times on both sides of the segments `indices`, rebuilt from the same (x, z).

    e is `transport.difference_step`: the given step, smaller close to a singular time (VP, EDM, VE); past
    T_max, and past T_min where the path is smooth (OT-FM, TrigFlow, TiM), the formulas are continued. The
    difference is divided by the distance that the rounded times really have, which in float32 near
    t = 80 is up to 0.05 % off 2e.

    Source: Eq. 10.
    """
    transport = pack.transport
    tokens, index = pack.rows(indices)
    t_S = pack.times.t_S.index_select(0, index)
    x_TC, z_TC = pack.x_TC.index_select(0, tokens), pack.z_TC.index_select(0, tokens)
    chosen = pack.segments.select(indices)
    both = pack.segments.select([i for i in indices for _ in range(2)])
    width_S = transport.difference_step(t_S, transport.dde_step if step is None else step)
    both_S = t_S + width_S, t_S - width_S
    states = [transport.interpolate(x_TC, z_TC, chosen.expand(t)[:, None]) for t in both_S]
    x_t_TC = states[0].new_empty(both.num_tokens, x_TC.shape[1])
    for tokens, state_TC in zip(_sides(both), states, strict=True):
        x_t_TC.index_copy_(0, tokens, state_TC)
    c_t_S = transport.c_noise(torch.stack(both_S, 1).flatten())
    copies = Copies(tuple(indices), 2, x_t_TC, c_t_S)
    span_S = (both_S[0] - both_S[1]).to(pack.dtype)
    return TwoSides(copies, both, chosen.expand(span_S)[:, None])


@torch.no_grad()
def central_difference(
    network: Network, pack: NoisedPack, indices: Sequence[int], step: float | None
) -> Tensor:
    """(F(x_{t+e}, t+e, r) - F(x_{t-e}, t-e, r)) / 2e, both sides packed into one call of the network.

    For networks that do not carry copies. The two sides of an image are neighbours in the pack and read one
    caption, which is embedded once.

    Source: Eq. 10.
    """
    sides = two_sides(pack, indices, step)
    _, index = pack.rows(indices)
    c_r_S = pack.c_r_S.index_select(0, index).repeat_interleave(2)
    condition = pack.condition.select(indices).repeat(2)
    output = network(sides.copies.x_TC, sides.copies.t_S, c_r_S, sides.pack, condition)
    return sides.difference(output.F_TC)


@torch.no_grad()
def forward_mode(network: Network, pack: NoisedPack, indices: Sequence[int], step: float | None) -> Tensor:
    """The exact derivative along (dx_t, dt, dr) = (v_t, 1, 0), c_noise included, by forward mode.

    Slow: it needs the explicit softmax of SDPA's math backend and operations that have a tangent rule.
    """
    chosen, transport = pack.select(indices), pack.transport

    def output(x_t_TC: Tensor, t_S: Tensor) -> Tensor:
        c_t_S = transport.c_noise(t_S)
        F_TC = network(x_t_TC, c_t_S, chosen.c_r_S, chosen.segments, chosen.condition).F_TC
        return F_TC.to(x_t_TC.dtype)

    primals = (chosen.x_t_TC, chosen.times.t_S)
    tangents = (
        transport.velocity(chosen.x_TC, chosen.z_TC, chosen.t_T1),
        torch.ones_like(chosen.times.t_S),
    )
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(output, primals, tangents)[1]


@torch.no_grad()
def path_direction(pack: NoisedPack, indices: Sequence[int]) -> Direction:
    """(dx_t/dt, dc_noise(t)/dt) of the segments `indices`: along it F changes by dF/dt at fixed r."""
    tokens, index = pack.rows(indices)
    x_TC, z_TC, t_T1 = (value.index_select(0, tokens) for value in (pack.x_TC, pack.z_TC, pack.t_T1))
    dc_t_S = pack.transport.d_c_noise(pack.times.t_S.index_select(0, index))
    return Direction(tuple(indices), pack.transport.velocity(x_TC, z_TC, t_T1), dc_t_S)


def build_derivative(config: ObjectiveConfig) -> Derivative:
    """The estimator named by `config.derivative`.

    Raises:
        ConfigError: for `paired`, which is part of the main call and no estimator of its own.
    """
    match config.derivative:
        case "dde":
            return central_difference
        case "jvp":
            return forward_mode
        case "paired":
            raise ConfigError("objective.derivative: 'paired' comes with the main call of the network")
