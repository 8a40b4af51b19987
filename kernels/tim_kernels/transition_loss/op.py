"""The op: checks, choice of path, autograd.

T tokens, S segments, C channels of a token (whole cells of the latent, channel last).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tim_kernels import dispatch
from tim_kernels.checks import check_device, check_floating, check_plan, check_shape
from tim_kernels.chunks import ChunkPlan
from tim_kernels.transition_loss.reference import TargetCoefficients, transition_loss_reference

NAME = "transition_loss"


def transition_loss(
    F_TC: Tensor,
    x_TC: Tensor,
    z_TC: Tensor,
    dF_dt_TC: Tensor | None,
    coefficients: TargetCoefficients,
    plan: ChunkPlan,
    *,
    latent_channels: int,
    directional: bool = True,
    diffusion_target_TC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss terms of every image against the target of Eq. 9, which is formed on the way and never stored.

    Shapes:
        F, x, z, dF_dt, diffusion_target: [T, C].   coefficients, results: [S].
    Dtypes:
        all: float32, bfloat16 or float16 (float64 on the twin). Results and arithmetic: float32, to which the
        coefficients are rounded.
    Args:
        dF_dt_TC: total derivative of F along the path; zero when not given.
        latent_channels: channels of one cell; C is a multiple of it. The direction is compared cell by cell.
        diffusion_target_TC: replaces alpha_hat x + sigma_hat z, where guidance is folded into it.
    Returns:
        (denoising_S, directional_S): mean of (F - target)^2, and mean of 1 - cos(F, target) over the cells,
        zero if not `directional`. An image without tokens gives zeros.
    Derivatives:
        backward for F alone, bitwise repeatable; forward mode through the twin.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    Source: Eqs. 9 and 13.
    """
    fields = {"x": x_TC, "z": z_TC, "dF_dt": dF_dt_TC, "diffusion_target": diffusion_target_TC}
    _check(F_TC, fields, coefficients, plan, latent_channels)
    wide = torch.promote_types(x_TC.dtype, torch.float32)
    coefficients = TargetCoefficients(*(c.to(wide) for c in coefficients))
    tensors = (F_TC, *fields.values(), *coefficients)
    if dispatch.choose(NAME, tensors) == "triton":
        dense = [None if x is None else x.detach().contiguous() for x in tensors[1:]]
        return _TransitionLoss.apply(F_TC, *dense, plan, latent_channels, directional)  # type: ignore[return-value]
    return transition_loss_reference(
        F_TC,
        x_TC,
        z_TC,
        dF_dt_TC,
        coefficients,
        plan.segment_ids,
        plan.num_segments,
        diffusion_target_TC=diffusion_target_TC,
        latent_channels=latent_channels,
        directional=directional,
    )


class _TransitionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        F_TC: Tensor,
        x_TC: Tensor,
        z_TC: Tensor,
        dF_dt_TC: Tensor | None,
        diffusion_target_TC: Tensor | None,
        alpha_hat_S: Tensor,
        sigma_hat_S: Tensor,
        b_over_db_S: Tensor,
        d_alpha_hat_S: Tensor,
        d_sigma_hat_S: Tensor,
        plan: ChunkPlan,
        latent_channels: int,
        directional: bool,
    ) -> tuple[Tensor, Tensor]:
        from tim_kernels.transition_loss.kernel import launch_forward

        F_TC = F_TC.contiguous()
        fields = (x_TC, z_TC, dF_dt_TC, diffusion_target_TC)
        coefficients = TargetCoefficients(alpha_hat_S, sigma_hat_S, b_over_db_S, d_alpha_hat_S, d_sigma_hat_S)
        denoising_S, directional_S, count_S = launch_forward(
            F_TC, fields, coefficients, plan, latent_channels, directional
        )
        ctx.plan, ctx.latent_channels, ctx.directional = plan, latent_channels, directional
        ctx.save_for_backward(F_TC, count_S, *fields, *coefficients)
        if not directional:
            ctx.mark_non_differentiable(directional_S)
        return denoising_S, directional_S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from tim_kernels.transition_loss.kernel import launch_backward

        F_TC, count_S, x_TC, z_TC, dF_dt_TC, diffusion_target_TC, *coefficients = ctx.saved_tensors
        d_denoising_S, d_directional_S = (g.contiguous() for g in gradients)
        d_F = launch_backward(
            d_denoising_S,
            d_directional_S if ctx.directional else None,
            F_TC,
            (x_TC, z_TC, dF_dt_TC, diffusion_target_TC),
            TargetCoefficients(*coefficients),
            count_S,
            ctx.plan,
            ctx.latent_channels,
        )
        return d_F, *([None] * 12)


def _check(
    F_TC: Tensor,
    fields: dict[str, Tensor | None],
    coefficients: TargetCoefficients,
    plan: ChunkPlan,
    latent_channels: int,
) -> None:
    if F_TC.ndim != 2:
        raise ValueError(f"{NAME}: F: expected [tokens, channels], received {list(F_TC.shape)}")
    if latent_channels < 1 or F_TC.shape[1] % latent_channels or not F_TC.shape[1]:
        raise ValueError(
            f"{NAME}: latent_channels: expected a divisor of the {F_TC.shape[1]} channels of a token, "
            f"received {latent_channels}"
        )
    check_plan(NAME, plan, F_TC)
    for name, x in fields.items():
        if x is not None:
            check_shape(NAME, name, x, F_TC.shape)
    vectors = {name.removesuffix("_S"): c for name, c in coefficients._asdict().items()}
    for name, c in vectors.items():
        check_shape(NAME, name, c, (plan.num_segments,))
    tensors = {"F": F_TC, **fields, **vectors}
    check_floating(NAME, tensors)
    check_device(NAME, tensors)
