"""Classifier-free guidance: how two predictions are combined, and in which steps."""

from __future__ import annotations

from torch import Tensor

from tim_ds.sampler.config import SamplerConfig

# A time of the grid such as 0.6 carries a rounding error of some 1e-16; an end of the interval that names it
# must still include it. Far below any step (1 / 10,000 steps = 1e-4).
_INCLUSIVE_SLACK = 1e-9


def combine(F_c: Tensor, F_u: Tensor, scale: float) -> Tensor:
    """F_u + scale * (F_c - F_u): 0 is unconditional, 1 conditional, beyond 1 guided."""
    return F_u + scale * (F_c - F_u)


def is_guided(t: float, config: SamplerConfig, T_max: float) -> bool:
    """Whether the step that starts at `t` is guided.

    With `cfg_upper: inclusive` a step is guided when low <= t / T_max <= high, so the default interval (0, 1)
    guides every step. With `exclusive` both bounds are strict, low * T_max < t < high * T_max, as in the
    authors' code: there the default interval never guides the first step, t = T_max. No step starts at T_min,
    hence a low bound of 0 never excludes a step, for transports with T_min > 0 neither.
    """
    if config.cfg_scale == 1.0:
        return False
    low, high = config.cfg_interval
    if config.cfg_upper == "exclusive":
        return low * T_max < t < high * T_max
    return low - _INCLUSIVE_SLACK <= t / T_max <= high + _INCLUSIVE_SLACK
