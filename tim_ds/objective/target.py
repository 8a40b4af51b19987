"""The regression target of a pack (Eq. 9): derivative, optional guidance and transport, put together."""

from __future__ import annotations

import inspect
from typing import NamedTuple, cast

import torch
from torch import Tensor

from tim_ds.errors import ConfigError
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.derivative import build_derivative, central_difference, path_direction, two_sides
from tim_ds.objective.guidance_target import guided_diffusion_target
from tim_ds.objective.noised import NoisedPack
from tim_ds.packed import CarryingNetwork, Condition, Network, NetworkOutput


class TargetParts(NamedTuple):
    """What Eq. 9 takes besides x, z and the times; without gradient."""

    dF_dt_TC: Tensor | None
    """Zero where r = t; None where no image has r < t."""
    diffusion_target_TC: Tensor | None
    """The diffusion part with guidance folded in, where the recipe asks for it."""


def output_and_parts(
    network: Network,
    config: ObjectiveConfig,
    pack: NoisedPack,
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
        ConfigError: if guidance is configured and `teacher` or `null_condition` is missing; if the network
            takes no direction and `paired` has one for it.
    """
    main = (pack.x_t_TC, pack.c_t_S, pack.c_r_S, pack.segments, pack.condition)
    if not _comes_with_the_main_call(config, network):
        parts = _estimated_parts(network, config, pack, teacher, null_condition)
        return network(*main, with_features=with_features), parts

    guided_TC = _guided(config, pack, teacher, null_condition)
    carrying, moving = cast(CarryingNetwork, network), pack.times.transition_indices
    if not moving:
        output, estimate_TC = carrying(*main, with_features=with_features), None
    elif config.derivative == "paired":
        try:
            output = carrying(*main, with_features=with_features, direction=path_direction(pack, moving))
        except TypeError as error:
            if _takes_direction(network):
                raise
            name = getattr(network, "__name__", type(network).__name__)
            raise ConfigError(
                f"objective.derivative: 'paired' hands the network a direction to carry, {name} takes none "
                "(`CarryingNetwork` in tim_ds/packed.py); use 'jvp' (forward mode, exact) or 'dde' (central "
                "difference), which any network can do"
            ) from error
        estimate_TC = output.dF_TC
    else:
        sides = two_sides(pack, moving, config.derivative_step)
        output = carrying(*main, with_features=with_features, copies=sides.copies)
        assert output.copies_F_TC is not None, "copies were given"
        estimate_TC = sides.difference(output.copies_F_TC)
    return output, TargetParts(_on_the_pack(estimate_TC, pack), guided_TC)


def _takes_direction(network: Network) -> bool:
    parameters = inspect.signature(getattr(network, "forward", network)).parameters.values()
    return any(p.name == "direction" or p.kind is p.VAR_KEYWORD for p in parameters)


def _comes_with_the_main_call(config: ObjectiveConfig, network: Network) -> bool:
    if config.derivative == "paired":
        return True
    is_difference = config.diffusion_share < 1.0 and build_derivative(config) is central_difference
    return is_difference and getattr(network, "carries_copies", False)


@torch.no_grad()
def transition_target(
    network: Network,
    config: ObjectiveConfig,
    pack: NoisedPack,
    *,
    teacher: Network | None = None,
    null_condition: Condition | None = None,
) -> Tensor:
    """F_target [T, C], without gradient, by an estimator that calls the network on its own (not `paired`).

    Raises:
        ConfigError: if guidance is configured and `teacher` or `null_condition` is missing.
    Source: Eq. 9.
    """
    parts = _estimated_parts(network, config, pack, teacher, null_condition)
    return pack.target_coefficients().by_token(pack.segments).target(pack.x_TC, pack.z_TC, *parts)


@torch.no_grad()
def _estimated_parts(
    network: Network,
    config: ObjectiveConfig,
    pack: NoisedPack,
    teacher: Network | None,
    null_condition: Condition | None,
) -> TargetParts:
    """The parts by an estimator that calls the network on its own.

    The derivative is estimated on the segments with r < t. Where none has r < t it is estimated on segment 0
    and not used: every rank and step then makes the same sequence of module calls (ZeRO-3 gathers parameters
    by it). A recipe with diffusion_share = 1 (flow matching) never makes the call.
    """
    guided_TC = _guided(config, pack, teacher, null_condition)
    estimate_TC = None
    if config.diffusion_share < 1.0:
        indices = pack.times.transition_indices or (0,)
        estimate_TC = build_derivative(config)(network, pack, indices, config.derivative_step)
    return TargetParts(_on_the_pack(estimate_TC, pack), guided_TC)


def _guided(
    config: ObjectiveConfig, pack: NoisedPack, teacher: Network | None, null_condition: Condition | None
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
    return guided_diffusion_target(teacher, config.guided_target, pack, null_condition)


def _on_the_pack(estimate_TC: Tensor | None, pack: NoisedPack) -> Tensor | None:
    """dF/dt of the segments with r < t on all tokens; `estimate_TC` is not read where there are none."""
    if estimate_TC is None or not pack.times.transition_indices:
        return None
    tokens = pack.segments.token_index(pack.times.transition_indices)
    return torch.zeros_like(pack.x_t_TC).index_copy(0, tokens, estimate_TC.to(pack.x_t_TC.dtype))
