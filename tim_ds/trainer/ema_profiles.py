"""Profiles of averages: how much the weights of every step count in a power-function average, and how others
are fitted from stored ones.

After N steps the average with exponent gamma is sum_i w_i theta_i with w_i = (i^(gamma+1) - (i-1)^(gamma+1))
/ N^(gamma+1): the share of the density (gamma+1) x^gamma / N^(gamma+1) that falls into step i. Its shape does
not depend on N, it needs no start, and its relative width is sigma_rel.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tim_ds.trainer.config import AverageConfig, TrainConfig


class Profile(NamedTuple):
    """A power-function average of the first `steps` steps."""

    steps: float
    gamma: float


class Fit(NamedTuple):
    coefficients: NDArray[np.float64]
    """One a stored profile; they add up to 1."""
    error: float
    """L2 distance of the fitted profile from the wanted one, relative to the norm of the wanted one."""


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the profile whose standard deviation is `sigma_rel` of its length.

    It solves sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the variance of the density, with
    gamma >= 0.
    """
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    # The widest, gamma = 0, comes out of the solver a rounding error below it.
    return max(0.0, float(roots.real.max()))


def decay_at(applied_steps: int, average: AverageConfig) -> float:
    """Share of itself that an average keeps after optimiser step number `applied_steps` (the first is 1)."""
    n = applied_steps
    if average.sigma_rel is not None:
        return (1.0 - 1.0 / n) ** (gamma_of(average.sigma_rel) + 1.0)
    assert average.decay is not None  # AverageConfig has one of the two
    return min(average.decay, (1 + n) / (10 + n)) if average.warmup else average.decay


def share_of_start(average: AverageConfig, steps: int) -> float:
    """Share of an average after so many steps that is still what it began as."""
    if average.decay is not None and not average.warmup:
        return average.decay**steps
    # The first steps decide; later ones only take more away.
    return math.prod(decay_at(n, average) for n in range(1, min(steps, 1000) + 1))


def remark_on_start(config: TrainConfig) -> str | None:
    """What to know of an average that is too slow for the run; None where it is not."""
    average = config.ema.used
    share = share_of_start(average, config.steps)
    if share < 0.05:
        return None
    return (
        f"{average.name}: {share:.0%} of the averaged weights, which are drawn with and exported, will be "
        f"those that the run begins with: {config.steps:,} steps are few for decay {average.decay}; lower "
        "it, or set warmup: true (train.ema.averages)"
    )


def step_weights(profile: Profile) -> NDArray[np.float64]:
    """Weight of every step 1 to `profile.steps`; they add up to 1."""
    edges = np.arange(int(profile.steps) + 1) / profile.steps
    return np.diff(edges ** (profile.gamma + 1.0))


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of the product of two densities, times the longer one's length (a pure number)."""
    short, long = (a, b) if a.steps <= b.steps else (b, a)
    scale = (a.gamma + 1.0) * (b.gamma + 1.0) / (a.gamma + b.gamma + 1.0)
    # min^(ga+gb+1) / (Ta^(ga+1) Tb^(gb+1)) = (short/long)^(gamma of the longer) / long.
    return scale * (short.steps / long.steps) ** long.gamma


def fit_profile(stored: Sequence[Profile], wanted: Profile) -> Fit:
    """The combination of stored profiles that is nearest to `wanted` in L2 among those that add up to 1.

    Adding up to one keeps a weight that never moved exactly as it is.
    """
    longest = max([wanted.steps, *(profile.steps for profile in stored)])

    def product(a: Profile, b: Profile) -> float:
        # In units of the longest profile, so that all products have one scale.
        return inner_product(a, b) * longest / max(a.steps, b.steps)

    gram = np.array([[product(a, b) for b in stored] for a in stored])
    right = np.array([product(a, wanted) for a in stored])
    norm = product(wanted, wanted)
    # Lagrange: the gradient of the distance is a multiple of the constraint's. Neighbouring profiles are
    # nearly parallel, hence least squares with a cut-off and not a plain solution.
    size = len(stored)
    system = np.ones((size + 1, size + 1))
    system[:size, :size] = gram
    system[size, size] = 0.0
    solution = np.linalg.lstsq(system, np.append(right, 1.0), rcond=1e-13)[0]
    coefficients = solution[:size] / solution[:size].sum()
    distance = coefficients @ gram @ coefficients - 2.0 * coefficients @ right + norm
    return Fit(coefficients, float(np.sqrt(max(distance, 0.0) / norm)))
