"""For Gaussian data the exact transition is known, and satisfies everything the objective asks for."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch

from tests.objective.networks import TRANSPORTS, CarryingNetwork, GaussianNetwork, random_times
from tim_ds.objective.config import ObjectiveConfig, WeightConfig
from tim_ds.objective.loss import transition_loss
from tim_ds.objective.time_sampling import Times
from tim_ds.packed import ClassCondition, Segments

ROWS = list(TRANSPORTS)


def interior_times(name: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """r < t with t - r not tiny, so that solving x_r = A x_t + B F for the exact F keeps its digits."""
    t, r = random_times(TRANSPORTS[name], 40 * count, seed)
    # Above 1.4 TrigFlow's tan(t - r) exceeds 5 and multiplies rounding; the extreme decades likewise.
    limits = {"trigflow": (0.0, 1.4), "edm_sd1": (0.02, 20.0), "edm_sd0p5": (0.02, 20.0), "ve": (0.05, 20.0)}
    low, high = limits.get(name, (1e-2, 1.0))
    keep = (t - r > 0.1 * t) & (r > low) & (t < high)
    assert keep.sum() >= count
    return t[keep][:count], r[keep][:count]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("steps", [2, 5])
def test_many_steps_equal_one_step(name: str, steps: int) -> None:
    transport = TRANSPORTS[name]
    exact = GaussianNetwork(transport, mean=0.4, deviation=0.7)
    t, r = interior_times(name, 20, seed=11)
    x_t = torch.randn(20, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    one = transport.step(x_t, t, r, exact.F(x_t, t, r))
    torch.testing.assert_close(one, exact.state_at(x_t, t, r), rtol=1e-12, atol=1e-12)
    grid = [t + (r - t) * k / steps for k in range(steps + 1)]
    many = x_t
    for late, early in itertools.pairwise(grid):
        many = transport.step(many, late, early, exact.F(many, late, early))
    # A few roundings a step, amplified by A up to about 100 (VP, VE).
    torch.testing.assert_close(many, one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("estimator", ["jvp", "dde", "paired"])
def test_the_exact_transition_has_no_loss(name: str, estimator: Literal["jvp", "dde", "paired"]) -> None:
    """With x, z replaced by their posterior means (the target is linear in them) Eq. 9 has no residual.

    The whole pipeline takes part: interpolation, derivative with c_noise inside, target, masks, both loss
    terms.
    """
    transport = TRANSPORTS[name]
    exact = GaussianNetwork(transport, mean=-0.3, deviation=0.5)
    t, r = interior_times(name, 6, seed=13)
    r = torch.where(torch.arange(6) < 2, t, r)
    times = Times.from_tensors(transport, t, r)
    segments = Segments.from_grids([(2, 3), (1, 1), (4, 2), (3, 3), (1, 5), (2, 2)])
    t_T1 = segments.expand(t)[:, None]
    x_t = torch.randn(
        segments.num_tokens, 4, generator=torch.Generator().manual_seed(14), dtype=torch.float64
    )
    x, z = exact.posterior(x_t, t_T1)
    torch.testing.assert_close(transport.interpolate(x, z, t_T1), x_t, rtol=1e-12, atol=1e-12)
    config = ObjectiveConfig(
        derivative=estimator, weight=WeightConfig(time_type="constant", adaptive=False), derivative_step=1e-4
    )
    condition = ClassCondition(torch.zeros(6, dtype=torch.int64))
    network = CarryingNetwork(exact) if estimator == "paired" else exact
    terms = transition_loss(network, transport, config, x, z, times, segments, condition, latent_channels=4)
    # Squared residuals. Forward mode and carried: rounding. Difference of half-width 1e-4: truncation (1e-4)^2 F''' and
    # rounding 1e-16 / 1e-4, each amplified by B / B' and squared; VP's c_noise = 999 t does not enter, it is
    # inverted exactly.
    assert terms.denoising_S.max() < (1e-13 if estimator == "dde" else 1e-26)
    assert terms.denoising_S[:2].max() < 1e-28
    # 1 - cos of nearly equal vectors: rounding of 1, and the residual squared.
    assert terms.directional_S.abs().max() < 1e-13


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_transition_has_a_loss(name: str) -> None:
    """The residual test is not vacuous: the exact network of other data fails it."""
    transport = TRANSPORTS[name]
    exact = GaussianNetwork(transport, mean=-0.3, deviation=0.5)
    other = GaussianNetwork(transport, mean=-0.3, deviation=0.6)
    t, r = interior_times(name, 3, seed=15)
    segments = Segments.from_grids([(2, 2)] * 3)
    t_T1 = segments.expand(t)[:, None]
    x_t = torch.randn(12, 2, generator=torch.Generator().manual_seed(16), dtype=torch.float64)
    x, z = exact.posterior(x_t, t_T1)
    config = ObjectiveConfig(derivative="jvp", weight=WeightConfig(time_type="constant", adaptive=False))
    terms = transition_loss(
        other,
        transport,
        config,
        x,
        z,
        Times.from_tensors(transport, t, r),
        segments,
        ClassCondition(torch.zeros(3, dtype=torch.int64)),
        latent_channels=2,
    )
    # VP hides the data above t = 0.7, so not every segment can tell the two apart.
    assert terms.denoising_S.max() > 1e-5
