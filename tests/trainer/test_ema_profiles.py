from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.trainer.ranks import recipe
from tim_ds.config.load import load_recipe
from tim_ds.trainer.config import WIDEST_SIGMA_REL, AverageConfig
from tim_ds.trainer.ema_profiles import (
    Profile,
    decay_at,
    fit_profile,
    gamma_of,
    inner_product,
    remark_on_start,
    share_of_start,
    step_weights,
)

ROOT = Path(__file__).parents[2]


def test_warm_up_shortens_the_memory_of_the_first_steps() -> None:
    average = AverageConfig(decay=0.99, warmup=True)
    assert [decay_at(n, average) for n in (1, 2, 10)] == [2 / 11, 3 / 12, 11 / 20]
    assert decay_at(10_000, average) == 0.99
    assert decay_at(1, AverageConfig(decay=0.99)) == 0.99


@pytest.mark.parametrize(
    "average",
    [AverageConfig(decay=0.99), AverageConfig(decay=0.999, warmup=True), AverageConfig(sigma_rel=0.1)],
)
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_what_is_left_of_the_start_is_what_the_average_keeps_of_it(
    average: AverageConfig, steps: int
) -> None:
    # Begun as 1, of weights that are 0 ever after.
    kept = 1.0
    for n in range(1, steps + 1):
        kept *= decay_at(n, average)
    # Forty roundings of float64.
    assert share_of_start(average, steps) == pytest.approx(kept, rel=1e-13)


def test_an_average_too_slow_for_the_run_is_remarked_on() -> None:
    remark = remark_on_start(recipe(Path("data"), "train.ema={averages: [{decay: 0.9999}]}").train)
    assert remark is not None and "100% of the averaged weights" in remark and "4 steps are few" in remark
    for enough in ("{decay: 0.9999}", "{decay: 0.9999, warmup: true}", "{sigma_rel: 0.1}"):
        steps = 100_000 if enough == "{decay: 0.9999}" else 100
        settings = recipe(Path("data"), f"train.ema={{averages: [{enough}]}}", f"train.steps={steps}")
        assert remark_on_start(settings.train) is None


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_what_a_recipe_exports_has_forgotten_its_start(path: Path) -> None:
    assert remark_on_start(load_recipe(path, []).train) is None


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25, WIDEST_SIGMA_REL])
def test_gamma_gives_the_width_that_was_asked_for(sigma_rel: float) -> None:
    # Mean and variance of the density (gamma + 1) x^gamma on [0, 1], by hand.
    gamma = gamma_of(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    # A difference of squares near one: 1e-9 of relative room at the narrowest.
    assert np.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-9)
    assert gamma >= 0


def test_gamma_of_the_usual_widths() -> None:
    # Stated by Karras et al. 2024, section 3.1: gamma 16.97 and 6.94 for widths of 5 % and 10 %.
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.2, WIDEST_SIGMA_REL])
def test_updates_step_by_step_are_the_closed_form(sigma_rel: float) -> None:
    weights = np.random.default_rng(0).standard_normal(50)
    average = AverageConfig(sigma_rel=sigma_rel)
    running = 1e6  # What an average begins with is forgotten at the first step.
    for n, value in enumerate(weights, start=1):
        decay = decay_at(n, average)
        running = decay * running + (1 - decay) * value
    expected = step_weights(Profile(len(weights), gamma_of(sigma_rel))) @ weights
    # Float64, 50 additions.
    assert running == pytest.approx(expected, rel=1e-12)


def test_the_widest_profile_is_the_mean() -> None:
    assert step_weights(Profile(7, gamma_of(WIDEST_SIGMA_REL))) == pytest.approx(np.full(7, 1 / 7), rel=1e-9)


def test_inner_products_are_the_integral() -> None:
    a, b = Profile(1000, gamma_of(0.1)), Profile(700, gamma_of(0.05))
    # The sum over 1000 steps is a midpoint rule: off by about gamma^2 / (24 * 700^2).
    fine_a, fine_b = step_weights(a), np.pad(step_weights(b), (0, 300))
    for x, y, expected in ((a, b, fine_a @ fine_b), (b, a, fine_a @ fine_b), (a, a, fine_a @ fine_a)):
        assert inner_product(x, y) == pytest.approx(1000 * expected, rel=1e-3)


def stored(steps: range) -> list[Profile]:
    return [Profile(n, gamma_of(width)) for n in steps for width in (0.05, 0.10)]


def test_a_stored_profile_is_its_own_fit() -> None:
    profiles = stored(range(100, 1001, 100))
    fit = fit_profile(profiles, profiles[-2])
    # The system's condition number is 1e10: float64 leaves six digits.
    assert fit.error < 1e-4
    assert fit.coefficients.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.15])
def test_the_stated_error_is_that_of_the_profile(sigma_rel: float) -> None:
    profiles = stored(range(250, 8001, 250))
    wanted = Profile(8000, gamma_of(sigma_rel))
    fit = fit_profile(profiles, wanted)
    truth = step_weights(wanted)
    combined = sum(
        c * np.pad(step_weights(p), (0, 8000 - int(p.steps)))
        for c, p in zip(fit.coefficients, profiles, strict=True)
    )
    relative = np.linalg.norm(combined - truth) / np.linalg.norm(truth)
    # 32 snapshots of two widths, as the paper has: a few percent within, and near, the stored widths.
    assert fit.error < 0.05
    # Steps are discrete, the fit is not: the two differ by the width of a step, 1/8000.
    assert relative == pytest.approx(fit.error, abs=5e-4)


def test_more_snapshots_fit_better() -> None:
    wanted = Profile(1000, gamma_of(0.07))
    errors = [fit_profile(stored(range(s, 1001, s)), wanted).error for s in (500, 250, 125)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]
