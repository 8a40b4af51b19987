"""Guidance folded into the diffusion part of the target, so that sampling needs no second branch."""

from __future__ import annotations

import torch
from torch import Tensor

from tim_ds.errors import ShapeError
from tim_ds.objective.config import GuidedTargetConfig
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.time_sampling import Times
from tim_ds.packed import Condition, Network, concatenate


def guided_segments(config: GuidedTargetConfig, times: Times) -> tuple[int, ...]:
    """Segments with start <= t <= end, decided on the host; the bounds are rounded like the times."""
    start, end = torch.tensor([config.start, config.end], dtype=times.t_S.dtype).tolist()
    return tuple(i for i, t in enumerate(times.t_values) if start <= t <= end)


@torch.no_grad()
def guided_diffusion_target(
    teacher: Network, config: GuidedTargetConfig, pack: NoisedPack, null_condition: Condition
) -> Tensor:
    """w_gt h + w_cond F_c + (1 - w_gt - w_cond) F_u in [start, end], h = alpha_hat x + sigma_hat z outside.

    F_c and F_u are the teacher at (x_t, t, t) with `condition` and with `null_condition`, in one packed call.
    The teacher at r = t estimates E[h | x_t] and the weights add up to one, so the combination stands for h
    on every transport: v on OT-FM and TrigFlow, the noise on VP, the negated noise on VE. The teacher is
    called on segment 0 where no segment is guided: the sequence of module calls is then the same whatever
    the draw of times.

    Differs from reference: c_noise is applied once (there twice, which is harmless only where it is the
    identity).

    Shapes:
        returns [T, C].
    Raises:
        ShapeError: if the two conditions do not cover the segments.
    """
    segments, condition = pack.segments, pack.condition
    if not condition.num_segments == null_condition.num_segments == segments.num_segments:
        raise ShapeError(
            f"guided target: expected conditions of {segments.num_segments} segments, received "
            f"{condition.num_segments} and {null_condition.num_segments} (null)"
        )
    h_TC = pack.diffusion_target()
    guided = guided_segments(config, pack.times)
    called = guided or (0,)
    tokens, index = pack.rows(called)
    x_t_TC = pack.x_t_TC.index_select(0, tokens)
    c_S = pack.c_t_S.index_select(0, index).repeat(2)
    output = teacher(
        torch.cat([x_t_TC, x_t_TC]),
        c_S,
        c_S,
        segments.select([*called, *called]),
        concatenate([condition.select(called), null_condition.select(called)]),
    )
    if not guided:
        return h_TC
    F_cond_TC, F_null_TC = output.F_TC.to(h_TC.dtype).chunk(2)
    combined_TC = (
        config.w_gt * h_TC.index_select(0, tokens)
        + config.w_cond * F_cond_TC
        + (1 - config.w_gt - config.w_cond) * F_null_TC
    )
    return h_TC.index_copy(0, tokens, combined_TC)
