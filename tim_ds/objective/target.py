"""The regression target of a pack (Eq. 9): derivative, optional guidance and transport, put together."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from tim_ds.errors import ConfigError
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.derivative import build_derivative, central_difference, path_direction, two_sides
from tim_ds.objective.guidance_target import guided_diffusion_target
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import Transport
from tim_ds.packed import CarryingNetwork, Condition, Network, NetworkOutput, Segments


class TargetParts(NamedTuple):
    """What Eq. 9 takes besides x, z and the times; without gradient."""

    dF_dt_TC: Tensor | None
    """Zero where r = t; None where no image has r < t."""
    diffusion_target_TC: Tensor | None
    """The diffusion part with guidance folded in, where the recipe asks for it."""


def output_and_parts(
    network: Network,
    transport: Transport,
    config: ObjectiveConfig,
    x_TC: Tensor,
    z_TC: Tensor,
    x_t_TC: Tensor,
    times: Times,
    segments: Segments,
    condition: Condition,
    *,
    teacher: Network | None = None,
    null_condition: Condition | None = None,
    with_features: bool = False,
) -> tuple[NetworkOutput, TargetParts]:
    """F(x_t, t, r) of the main call, and what its target is made of.

    With `paired`, and with `dde` where the network carries copies, the derivative comes with the main call
    and there is no other: a pack without r < t makes the same module calls as one with them. Other calls
    without gradient come before the main call, so that their activations are gone before its graph is built.

    Raises:
        ConfigError: if guidance is configured and `teacher` or `null_condition` is missing.
    """
    pack = (x_TC, z_TC, x_t_TC, times, segments, condition)
    c_t_S, c_r_S = transport.c_noise(times.t_S), transport.c_noise(times.r_S)
    if not _comes_with_the_main_call(config, network):
        parts = _estimated_parts(network, transport, config, *pack, teacher, null_condition)
        output = network(x_t_TC, c_t_S, c_r_S, segments, condition, with_features=with_features)
        return output, parts

    guided_TC = _guided(transport, config, *pack, teacher, null_condition)
    carrying, main = cast(CarryingNetwork, network), (x_t_TC, c_t_S, c_r_S, segments, condition)
    moving = (transport, x_TC, z_TC, times, segments, times.transition_indices)
    if not times.transition_indices:
        output, estimate_TC = carrying(*main, with_features=with_features), None
    elif config.derivative == "paired":
        output = carrying(*main, with_features=with_features, direction=path_direction(*moving))
        estimate_TC = output.dF_TC
    else:
        sides = two_sides(*moving, config.derivative_step)
        output = carrying(*main, with_features=with_features, copies=sides.copies)
        assert output.copies_F_TC is not None, "copies were given"
        estimate_TC = sides.difference(output.copies_F_TC)
    return output, TargetParts(_on_the_pack(estimate_TC, x_t_TC, times, segments), guided_TC)


def _comes_with_the_main_call(config: ObjectiveConfig, network: Network) -> bool:
    if config.derivative == "paired":
        return True
    is_difference = config.diffusion_share < 1.0 and build_derivative(config) is central_difference
    return is_difference and getattr(network, "carries_copies", False)


@torch.no_grad()
def transition_target(
    network: Network,
    transport: Transport,
    config: ObjectiveConfig,
    x_TC: Tensor,
    z_TC: Tensor,
    x_t_TC: Tensor,
    times: Times,
    segments: Segments,
    condition: Condition,
    *,
    teacher: Network | None = None,
    null_condition: Condition | None = None,
) -> Tensor:
    """F_target [T, C], without gradient, by an estimator that calls the network on its own (not `paired`).

    Raises:
        ConfigError: if guidance is configured and `teacher` or `null_condition` is missing.
    Source: Eq. 9.
    """
    parts = _estimated_parts(
        network, transport, config, x_TC, z_TC, x_t_TC, times, segments, condition, teacher, null_condition
    )
    coefficients = transport.target_coefficients(times.t_S, times.r_S)
    return coefficients.by_token(segments).target(x_TC, z_TC, *parts)


@torch.no_grad()
def _estimated_parts(
    network: Network,
    transport: Transport,
    config: ObjectiveConfig,
    x_TC: Tensor,
    z_TC: Tensor,
    x_t_TC: Tensor,
    times: Times,
    segments: Segments,
    condition: Condition,
    teacher: Network | None,
    null_condition: Condition | None,
) -> TargetParts:
    """The parts by an estimator that calls the network on its own.

    The derivative is estimated on the segments with r < t. Where none has r < t it is estimated on segment 0
    and not used: every rank and step then makes the same sequence of module calls (ZeRO-3 gathers parameters
    by it). A recipe with diffusion_share = 1 (flow matching) never makes the call.
    """
    guided_TC = _guided(
        transport, config, x_TC, z_TC, x_t_TC, times, segments, condition, teacher, null_condition
    )
    estimate_TC = None
    if config.diffusion_share < 1.0:
        estimate_TC = build_derivative(config)(
            network,
            transport,
            x_TC,
            z_TC,
            times,
            segments,
            condition,
            times.transition_indices or (0,),
            config.derivative_step,
        )
    return TargetParts(_on_the_pack(estimate_TC, x_t_TC, times, segments), guided_TC)


def _guided(
    transport: Transport,
    config: ObjectiveConfig,
    x_TC: Tensor,
    z_TC: Tensor,
    x_t_TC: Tensor,
    times: Times,
    segments: Segments,
    condition: Condition,
    teacher: Network | None,
    null_condition: Condition | None,
) -> Tensor | None:
    """The diffusion part with guidance folded in, where the recipe asks for it."""
    if config.guided_target is None:
        return None
    if teacher is None or null_condition is None:
        raise ConfigError(
            "objective.guided_target: needs a teacher network and a null condition, received "
            f"teacher={'given' if teacher is not None else 'none'}, "
            f"null_condition={'given' if null_condition is not None else 'none'}"
        )
    return guided_diffusion_target(
        teacher,
        transport,
        config.guided_target,
        x_TC,
        z_TC,
        x_t_TC,
        times,
        segments,
        condition,
        null_condition,
    )


def _on_the_pack(
    estimate_TC: Tensor | None, x_t_TC: Tensor, times: Times, segments: Segments
) -> Tensor | None:
    """dF/dt of the segments with r < t on all tokens; `estimate_TC` is not read where there are none."""
    if estimate_TC is None or not times.transition_indices:
        return None
    tokens = segments.token_index(times.transition_indices)
    return torch.zeros_like(x_t_TC).index_copy(0, tokens, estimate_TC.to(x_t_TC.dtype))
