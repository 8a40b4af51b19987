"""dF/dt along the path at fixed r, without gradient.

`dde` and `jvp` are estimators of one signature that call the network on their own. `paired` needs none: the
main call, given the direction of the path, returns the derivative too.

T' tokens of the segments that take part, out of T.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tim_ds.errors import ConfigError, ShapeError
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import Transport
from tim_ds.packed import Condition, Direction, Network, Segments


class Derivative(Protocol):
    """dF/dt [T', C] of the segments `indices`, in that order, at fixed r.

    Args:
        indices: segments that take part, at least one.
        step: half-width of the difference in the transport's time; None: the transport's own. `forward_mode`
            has no use for it.
    """

    def __call__(
        self,
        network: Network,
        transport: Transport,
        x_TC: Tensor,
        z_TC: Tensor,
        times: Times,
        segments: Segments,
        condition: Condition,
        indices: Sequence[int],
        step: float | None,
    ) -> Tensor: ...


class _Chosen(NamedTuple):
    x_TC: Tensor
    z_TC: Tensor
    t_S: Tensor
    r_S: Tensor
    condition: Condition


def _chosen(
    x_TC: Tensor, z_TC: Tensor, times: Times, segments: Segments, condition: Condition, indices: Sequence[int]
) -> _Chosen:
    if not indices:
        raise ShapeError("time derivative: expected at least one segment, received none")
    tokens = segments.token_index(indices)
    index = torch.tensor(list(indices), dtype=torch.int64).to(times.t_S.device, non_blocking=True)
    return _Chosen(
        x_TC.index_select(0, tokens),
        z_TC.index_select(0, tokens),
        times.t_S.index_select(0, index),
        times.r_S.index_select(0, index),
        condition.select(indices),
    )


@torch.no_grad()
def central_difference(
    network: Network,
    transport: Transport,
    x_TC: Tensor,
    z_TC: Tensor,
    times: Times,
    segments: Segments,
    condition: Condition,
    indices: Sequence[int],
    step: float | None,
) -> Tensor:
    """(F(x_{t+e}, t+e, r) - F(x_{t-e}, t-e, r)) / 2e, both sides packed into one call of the network.

    The two sides of an image are neighbours in the pack and read one caption, which is embedded once.

    e is `transport.difference_step`: the given step, smaller close to a singular time (VP, EDM, VE); past
    T_max, and past T_min where the path is smooth (OT-FM, TrigFlow, TiM), the formulas are continued. The
    difference is divided by the distance that the rounded times really have, which in float32 near
    t = 80 is up to 0.05 % off 2e.

    Source: Eq. 10.
    """
    pack = _chosen(x_TC, z_TC, times, segments, condition, indices)
    chosen = segments.select(indices)
    width_S = transport.difference_step(pack.t_S, transport.dde_step if step is None else step)
    late_S, early_S = pack.t_S + width_S, pack.t_S - width_S
    sides = [
        transport.interpolate(pack.x_TC, pack.z_TC, chosen.expand(t)[:, None]) for t in (late_S, early_S)
    ]
    # Segment 2i is the late side of image i, segment 2i + 1 its early side.
    both = segments.select([i for i in indices for _ in range(2)])
    late, early = (both.token_index(range(side, both.num_segments, 2)) for side in range(2))
    x_t_TC = sides[0].new_empty(both.num_tokens, x_TC.shape[1])
    for tokens, side_TC in zip((late, early), sides, strict=True):
        x_t_TC.index_copy_(0, tokens, side_TC)
    output = network(
        x_t_TC,
        transport.c_noise(torch.stack([late_S, early_S], 1).flatten()),
        transport.c_noise(pack.r_S.repeat_interleave(2)),
        both,
        pack.condition.repeat(2),
    )
    F_TC = output.F_TC.to(x_t_TC.dtype)
    span_T1 = chosen.expand(late_S - early_S)[:, None]
    return (F_TC.index_select(0, late) - F_TC.index_select(0, early)) / span_T1


@torch.no_grad()
def forward_mode(
    network: Network,
    transport: Transport,
    x_TC: Tensor,
    z_TC: Tensor,
    times: Times,
    segments: Segments,
    condition: Condition,
    indices: Sequence[int],
    step: float | None,
) -> Tensor:
    """The exact derivative along (dx_t, dt, dr) = (v_t, 1, 0), c_noise included, by forward mode.

    Slow: it needs the explicit softmax of SDPA's math backend and operations that have a tangent rule.
    """
    pack = _chosen(x_TC, z_TC, times, segments, condition, indices)
    chosen = segments.select(indices)
    t_T1 = chosen.expand(pack.t_S)[:, None]
    c_r_S = transport.c_noise(pack.r_S)

    def output(x_t_TC: Tensor, t_S: Tensor) -> Tensor:
        F_TC = network(x_t_TC, transport.c_noise(t_S), c_r_S, chosen, pack.condition).F_TC
        return F_TC.to(x_t_TC.dtype)

    primals = (transport.interpolate(pack.x_TC, pack.z_TC, t_T1), pack.t_S)
    tangents = (transport.velocity(pack.x_TC, pack.z_TC, t_T1), torch.ones_like(pack.t_S))
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(output, primals, tangents)[1]


@torch.no_grad()
def path_direction(
    transport: Transport,
    x_TC: Tensor,
    z_TC: Tensor,
    times: Times,
    segments: Segments,
    indices: Sequence[int],
) -> Direction:
    """(dx_t/dt, dc_noise(t)/dt) of the segments `indices`: along it F changes by dF/dt at fixed r."""
    tokens = segments.token_index(indices)
    index = torch.tensor(list(indices), dtype=torch.int64).to(times.t_S.device, non_blocking=True)
    t_S = times.t_S.index_select(0, index)
    t_T1 = segments.expand(times.t_S).index_select(0, tokens)[:, None]
    v_TC = transport.velocity(x_TC.index_select(0, tokens), z_TC.index_select(0, tokens), t_T1)
    return Direction(tuple(indices), v_TC, transport.d_c_noise(t_S))


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
