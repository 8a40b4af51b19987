"""The transition objective on one pack (Eq. 13): pure, per image, unreduced.

    x_t = alpha_t x + sigma_t z                    where the image is, on its way to r <= t
    F_target = h + B / (dB/dt) (dh/dt - dF/dt)     what F(x_t, t, r) has to be for the step to r    (Eq. 9)
    loss = w(t, r) a d(F, F_target)                                                           (Eqs. 11-13)

h and B are the transport's (`transport.py`), d is the squared error plus 1 - cos, a the adaptive weight.

Letters used in shapes: T image tokens, C channels of a token (patch^2 cells of latent channels), S images,
Z width of aligned features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tim_ds.errors import ConfigError, ShapeError
from tim_ds.objective.alignment import alignment_loss
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.target import output_and_parts
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import TargetCoefficients, Transport
from tim_ds.objective.weighting import adaptive_weight, check_warp_domain, time_weight
from tim_ds.packed import Condition, Network, NetworkOutput, Segments

# Smallest norm by which a cell's vector is divided. Differs from reference (1e-8): there the cosine of a
# zero-initialised output has a gradient of order 1e8, so that the first step is all clipping. Cells of a
# trained network are far above it (norms of order sqrt(channels)), and their cosine is the same.
COSINE_FLOOR = 1e-2


class LossTerms(NamedTuple):
    """Per image, [S]. Only `total_S` carries a gradient; a term that the recipe switches off is zero."""

    total_S: Tensor
    """time_weight * adaptive * (denoising + directional) + repa_weight * alignment."""
    denoising_S: Tensor
    """Mean squared error of F against its target, unweighted."""
    directional_S: Tensor
    """Mean of 1 - cos(F, target) over the cells, unweighted."""
    alignment_S: Tensor
    """Mean of 1 - cos(features), unweighted."""
    weight_S: Tensor
    """The time weight w(t, r)."""
    adaptive_S: Tensor
    """The adaptive weight, 1 if switched off."""


class ImageTerms(Protocol):
    """(denoising_S, directional_S) of F against the target of Eq. 9, which need not be formed in memory.

    Args:
        dF_dt_TC: zero when not given.
        coefficients: [S] each.
        diffusion_target_TC: replaces alpha_hat x + sigma_hat z.
        directional: without it, directional_S is zero.
    """

    def __call__(
        self,
        F_TC: Tensor,
        x_TC: Tensor,
        z_TC: Tensor,
        dF_dt_TC: Tensor | None,
        coefficients: TargetCoefficients,
        segments: Segments,
        *,
        diffusion_target_TC: Tensor | None,
        latent_channels: int,
        directional: bool,
    ) -> tuple[Tensor, Tensor]: ...


def image_terms(
    F_TC: Tensor,
    x_TC: Tensor,
    z_TC: Tensor,
    dF_dt_TC: Tensor | None,
    coefficients: TargetCoefficients,
    segments: Segments,
    *,
    diffusion_target_TC: Tensor | None,
    latent_channels: int,
    directional: bool,
) -> tuple[Tensor, Tensor]:
    """`ImageTerms` in plain PyTorch, in the dtype of the coefficients, at least float32."""
    with torch.no_grad():
        target_TC = coefficients.by_token(segments).target(x_TC, z_TC, dF_dt_TC, diffusion_target_TC)
    F_TC = F_TC.to(target_TC.dtype)
    denoising_S = segments.mean((F_TC - target_TC).square().mean(-1))
    if not directional:
        return denoising_S, torch.zeros_like(denoising_S)
    cells = (F_TC.shape[0], -1, latent_channels)
    cosine = nnf.cosine_similarity(F_TC.reshape(cells), target_TC.reshape(cells), dim=-1, eps=COSINE_FLOOR)
    return denoising_S, segments.mean((1 - cosine).mean(-1))


def transition_loss(
    network: Network,
    transport: Transport,
    config: ObjectiveConfig,
    x_TC: Tensor,
    z_TC: Tensor,
    times: Times,
    segments: Segments,
    condition: Condition,
    *,
    latent_channels: int,
    teacher: Network | None = None,
    null_condition: Condition | None = None,
    features_TZ: Tensor | None = None,
    terms_of_images: ImageTerms = image_terms,
) -> LossTerms:
    """Loss of every image of the pack; an image counts once, however many tokens it has.

    The loss is computed in the dtype of x, at least float32; the network is told its times in theirs.

    Shapes:
        x_TC: clean latent tokens.   z_TC: unit noise.   features_TZ: REPA target, needed if repa_weight > 0.
    Args:
        latent_channels: channels of one latent cell; a token holds patch^2 cells, channel last.
        teacher, null_condition: for the guided target.
        terms_of_images: how the first two terms are computed (a kernel, in training).
    Raises:
        ShapeError: if tokens, segments, times, condition or channels do not fit together.
        ConfigError: if the recipe asks for a term whose input is missing.
        TimeDomainError: if the weight's warp has no meaning on this transport.
    Source: Eq. 13.
    """
    pack = NoisedPack(transport, x_TC, z_TC, times, segments, condition)
    _check(pack, config, latent_channels, features_TZ)

    # F(x_t, t, r), and dF/dt along the path at fixed r (Eq. 10).
    output, parts = output_and_parts(
        network,
        config,
        pack,
        teacher=teacher,
        null_condition=null_condition,
        with_features=features_TZ is not None,
    )
    _check_output(output, pack)

    # How far F is from its target (Eq. 9).
    denoising_S, directional_S = terms_of_images(
        output.F_TC,
        x_TC,
        z_TC,
        parts.dF_dt_TC,
        pack.target_coefficients(),
        segments,
        diffusion_target_TC=parts.diffusion_target_TC,
        latent_channels=latent_channels,
        directional=config.directional,
    )
    distance_S = denoising_S + directional_S
    alignment_S = _alignment(output, features_TZ, segments, distance_S)

    # How much each image counts (Eqs. 11-12, and the adaptive weight), and the sum (Eq. 13).
    is_diffusion_S = torch.tensor(times.is_diffusion).to(times.t_S.device, non_blocking=True)
    weight_S = time_weight(config.weight, times.t_S, times.r_S, is_diffusion_S, transport.sigma_data)
    weight_S = weight_S.to(pack.dtype)
    adaptive_S = adaptive_weight(config.weight, distance_S, is_diffusion_S)
    total_S = weight_S * adaptive_S * distance_S + config.repa_weight * alignment_S
    return LossTerms(
        total_S, denoising_S.detach(), directional_S.detach(), alignment_S.detach(), weight_S, adaptive_S
    )


def _check(
    pack: NoisedPack, config: ObjectiveConfig, latent_channels: int, features_TZ: Tensor | None
) -> None:
    pack.check()
    channels = pack.x_TC.shape[1]
    if latent_channels < 1 or channels % latent_channels:
        raise ShapeError(f"pack: {channels} channels a token are not whole cells of {latent_channels}")
    if (config.repa_weight > 0) != (features_TZ is not None):
        raise ConfigError(
            f"objective.repa_weight: {config.repa_weight}, but encoder features are "
            f"{'given' if features_TZ is not None else 'missing'}"
        )
    check_warp_domain(config.weight, pack.transport)


def _check_output(output: NetworkOutput, pack: NoisedPack) -> None:
    if output.F_TC.shape != pack.x_TC.shape:
        raise ShapeError(f"network: F is {list(output.F_TC.shape)}, expected {list(pack.x_TC.shape)}")


def _alignment(
    output: NetworkOutput, features_TZ: Tensor | None, segments: Segments, like_S: Tensor
) -> Tensor:
    """The REPA term in the dtype of `like_S`; zero where the recipe has none."""
    if features_TZ is None:
        return torch.zeros_like(like_S)
    if output.features_TZ is None:
        raise ConfigError("objective.repa_weight: the network returned no features; set model.z_dim")
    return alignment_loss(output.features_TZ.to(like_S.dtype), features_TZ, segments)


def non_finite_samples(terms: LossTerms, keys: Sequence[str]) -> list[str]:
    """Which samples have a term that is NaN or infinite. Waits for the device.

    Args:
        keys: name of each image of the pack (shard:name), in order.
    Raises:
        ShapeError: unless there is one key an image.
    """
    if len(keys) != terms.total_S.shape[0]:
        raise ShapeError(f"loss of {terms.total_S.shape[0]} images, {len(keys)} keys")
    values = torch.stack([term.detach().to(torch.float64) for term in terms])
    finite = values.isfinite().all(0).tolist()
    return [key for key, good in zip(keys, finite, strict=True) if not good]
