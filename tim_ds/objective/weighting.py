"""Weights of an image's loss: by its times (Eqs. 11-12) and by its own size. Neither carries a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tim_ds.errors import TimeDomainError
from tim_ds.objective.config import WeightConfig
from tim_ds.objective.transport import Transport

# The authors' code has the literal 10e-6; the paper does not mention the adaptive weight.
ADAPTIVE_FLOOR = 1e-5

WARP_DOMAINS = {"tangent": "below pi/2", "odds": "up to 1"}


def check_warp_domain(config: WeightConfig, transport: Transport) -> None:
    """Raises TimeDomainError if the warp of `config` has no meaning at some time of `transport`.

    tan(t) needs t < pi/2: beyond, it wraps round and the weight turns NaN. t / (1 - t) needs t <= 1; at t = 1
    the weight is its limit, 0.
    """
    if config.time_type == "constant" or config.warp == "identity":
        return
    valid = transport.T_max < math.pi / 2 if config.warp == "tangent" else transport.T_max <= 1
    if not valid:
        raise TimeDomainError(
            f"objective.weight.warp: {config.warp} is valid for t {WARP_DOMAINS[config.warp]}, times of "
            f"{transport.name} reach {transport.T_max}; use identity"
        )


def time_weight(
    config: WeightConfig, t_S: Tensor, r_S: Tensor, is_diffusion_S: Tensor, sigma_data: float
) -> Tensor:
    """w(t, r) of every image; 1 for the images drawn as diffusion samples.

    With delta = tau(t) - tau(r) (or tau(t) alone) and s = sigma_data: reciprocal 1 / (delta + s), sqrt
    (delta + s)^(-1/2) (Eq. 12 under the tangent warp), square (delta + s)^(-2), soft_min_snr 1 / (delta^2 +
    s^2).

    Shapes:
        t_S, r_S: [S].   is_diffusion_S: bool [S].
    Source: Eqs. 11-12 and the authors' code.
    """
    delta_S = _warp(config, t_S)
    if config.of_interval:
        delta_S = delta_S - _warp(config, r_S)
    match config.time_type:
        case "constant":
            weight_S = torch.ones_like(t_S)
        case "reciprocal":
            weight_S = 1 / (delta_S + sigma_data)
        case "sqrt":
            weight_S = torch.rsqrt(delta_S + sigma_data)
        case "square":
            weight_S = (delta_S + sigma_data) ** -2
        case "soft_min_snr":
            weight_S = 1 / (delta_S**2 + sigma_data**2)
    return torch.where(is_diffusion_S, torch.ones_like(weight_S), weight_S)


def _warp(config: WeightConfig, t_S: Tensor) -> Tensor:
    match config.warp:
        case "identity":
            return t_S
        case "tangent":
            return torch.tan(t_S)
        case "odds":
            return t_S / (1 - t_S)


def adaptive_weight(config: WeightConfig, loss_S: Tensor, is_diffusion_S: Tensor) -> Tensor:
    """1 / (L + 1e-5), detached, with L each image's loss or the mean of its kind; 1 if switched off.

    Over images, the gradient becomes that of log L.

    Shapes:
        loss_S: [S].   is_diffusion_S: bool [S].
    Source: the authors' code, over images.
    """
    if not config.adaptive:
        return torch.ones_like(loss_S)
    L_S = loss_S.detach()
    if config.adaptive_over == "kind":
        L_S = mean_of_kind(L_S, is_diffusion_S)
    return 1 / (L_S + ADAPTIVE_FLOOR)


def mean_of_kind(loss_S: Tensor, is_diffusion_S: Tensor) -> Tensor:
    """For every image the mean of `loss_S` over the images of its kind (diffusion or transition) in the pack.

    As the adaptive weight's denominator it brings both kinds to one scale, and leaves the images of a kind
    their proportions: one whose target is noisy is not turned down for it. The pack is what one network call
    trains, whose images follow from the data, the seed and the step alone: the mean is the same on any number
    of ranks and after a resume. Accumulated packs and those of other ranks do not enter, so the fewer images
    a pack holds, the closer it comes to the image's own loss. Losses that are not finite are left out, so
    that one bad image does not spread.

    Shapes:
        loss_S: [S].   is_diffusion_S: bool [S].
    """
    finite_S = loss_S.isfinite()
    values_S = torch.where(finite_S, loss_S, torch.zeros_like(loss_S))
    mean_S = torch.zeros_like(loss_S)
    for kind_S in (is_diffusion_S, ~is_diffusion_S):
        counted_S = (kind_S & finite_S).to(loss_S.dtype)
        mean = (values_S * counted_S).sum() / counted_S.sum().clamp(min=1)
        mean_S = torch.where(kind_S, mean, mean_S)
    return mean_S
