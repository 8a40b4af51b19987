"""The regression target of a pack (Eq. 9): derivative, optional guidance and transport, put together."""

from __future__ import annotations

import torch
from torch import Tensor

from tim_ds.errors import ConfigError
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.derivative import build_derivative
from tim_ds.objective.guidance_target import guided_diffusion_target
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import Transport
from tim_ds.packed import Condition, Network, Segments


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
    """F_target [T, C], without gradient.

    The derivative is estimated on the segments with r < t. Where none has r < t it is estimated on segment 0
    and not
    used: every rank and step then makes the same sequence of module calls (ZeRO-3 gathers parameters by it).
    A recipe with diffusion_share = 1 (flow matching) never makes the call.

    Raises:
        ConfigError: if guidance is configured and `teacher` or `null_condition` is missing.
    Source: Eq. 9.
    """
    guided_TC = None
    if config.guided_target is not None:
        if teacher is None or null_condition is None:
            raise ConfigError(
                "objective.guided_target: needs a teacher network and a null condition, received "
                f"teacher={'given' if teacher is not None else 'none'}, "
                f"null_condition={'given' if null_condition is not None else 'none'}"
            )
        guided_TC = guided_diffusion_target(
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

    dF_dt_TC = torch.zeros_like(x_t_TC)
    if config.diffusion_share < 1.0:
        indices = times.transition_indices or (0,)
        estimate_TC = build_derivative(config)(
            network,
            transport,
            x_TC,
            z_TC,
            times,
            segments,
            condition,
            indices,
            config.derivative_step,
        )
        if times.transition_indices:
            dF_dt_TC = dF_dt_TC.index_copy(0, segments.token_index(indices), estimate_TC)

    t_T1, r_T1 = segments.expand(times.t_S)[:, None], segments.expand(times.r_S)[:, None]
    return transport.target(x_TC, z_TC, t_T1, r_T1, dF_dt_TC, diffusion_target=guided_TC)
