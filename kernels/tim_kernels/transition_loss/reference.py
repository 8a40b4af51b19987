"""The definition, in plain PyTorch.

T tokens, S segments, C channels of a token (whole cells of the latent, channel last).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

COSINE_FLOOR = 1e-2
"""Smallest norm by which a cell's vector is divided (the same as the objective's)."""


class TargetCoefficients(NamedTuple):
    """Coefficients of Eq. 9 at each image's (t, r), [S] each.

    target = alpha_hat x + sigma_hat z + b_over_db (d_alpha_hat x + d_sigma_hat z - dF/dt)
    """

    alpha_hat_S: Tensor
    sigma_hat_S: Tensor
    b_over_db_S: Tensor
    d_alpha_hat_S: Tensor
    d_sigma_hat_S: Tensor


@torch.no_grad()
def target_reference(
    x_TC: Tensor,
    z_TC: Tensor,
    dF_dt_TC: Tensor | None,
    diffusion_target_TC: Tensor | None,
    coefficients: TargetCoefficients,
    segment_ids: Tensor,
) -> Tensor:
    """Regression target [T, C], float32 or wider.   Source: Eq. 9."""
    wide = torch.promote_types(x_TC.dtype, torch.float32)
    x_TC, z_TC = x_TC.to(wide), z_TC.to(wide)
    alpha_hat, sigma_hat, b_over_db, d_alpha_hat, d_sigma_hat = (
        c.index_select(0, segment_ids)[:, None] for c in coefficients
    )
    if diffusion_target_TC is None:
        diffusion_target_TC = alpha_hat * x_TC + sigma_hat * z_TC
    slope = d_alpha_hat * x_TC + d_sigma_hat * z_TC
    if dF_dt_TC is not None:
        slope = slope - dF_dt_TC.to(wide)
    return diffusion_target_TC.to(wide) + b_over_db * slope


def transition_loss_reference(
    F_TC: Tensor,
    x_TC: Tensor,
    z_TC: Tensor,
    dF_dt_TC: Tensor | None,
    coefficients: TargetCoefficients,
    segment_ids: Tensor,
    num_segments: int,
    *,
    diffusion_target_TC: Tensor | None,
    latent_channels: int,
    directional: bool,
) -> tuple[Tensor, Tensor]:
    """Per image: mean of (F - target)^2, and mean over the cells of 1 - cos(F, target).

    Below the floor the gradient of the cosine is that of torch's cosine_similarity: the norm that is divided
    by is held at the floor, its derivative is not.
    """
    target_TC = target_reference(x_TC, z_TC, dF_dt_TC, diffusion_target_TC, coefficients, segment_ids)
    F_TC = F_TC.to(target_TC.dtype)
    ones_T = torch.ones(F_TC.shape[0], dtype=F_TC.dtype, device=F_TC.device)
    # An image without tokens has no loss.
    count_S = _sum(ones_T, segment_ids, num_segments).clamp_min(1)
    denoising_S = _sum((F_TC - target_TC).square().mean(-1), segment_ids, num_segments) / count_S
    if not directional:
        return denoising_S, torch.zeros_like(denoising_S)
    cells = (F_TC.shape[0], F_TC.shape[1] // latent_channels, latent_channels)
    cosine = nnf.cosine_similarity(F_TC.reshape(cells), target_TC.reshape(cells), dim=-1, eps=COSINE_FLOOR)
    return denoising_S, _sum((1 - cosine).mean(-1), segment_ids, num_segments) / count_S


def _sum(value_T: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    return value_T.new_zeros(num_segments).index_add(0, segment_ids, value_T)
