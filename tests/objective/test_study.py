"""What the study of derivative and weights changes in a run, and that its noise is where it says."""

from __future__ import annotations

import pytest
import torch

from tests.model.networks import normal, random_network, random_pack, text_config
from tests.objective.study import ADAPTIVE, ESTIMATORS, RECIPE, derivative_of, overrides, with_noise
from tim_ds.config.load import load_recipe
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.derivative import central_difference
from tim_ds.objective.derivative_error import at_precision
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.target import output_and_parts
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import OTFM
from tim_ds.packed import Segments


def test_the_setting_of_the_recipe_is_a_row_of_the_study() -> None:
    row = overrides("exact", 0.75, "kind", "first", None)
    assert load_recipe(RECIPE, row) == load_recipe(RECIPE)


@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_row_changes_what_it_is_named_after(estimator: str, adaptive: str) -> None:
    step = None if estimator == "exact" else 0.001
    changed = load_recipe(RECIPE, overrides(estimator, 0.875, adaptive, "larger", step)).objective
    assert changed.derivative == ("paired" if estimator == "exact" else "dde")
    assert (changed.diffusion_share, changed.consistency_share) == (0.875, 0.025)
    assert (changed.diffusion_time, changed.derivative_step) == ("larger", step)
    assert changed.weight.adaptive == (adaptive != "off")
    assert changed.weight.adaptive_over == ("image" if adaptive == "on" else "kind")


def test_only_the_passes_of_the_difference_are_rounded() -> None:
    network = random_network(text_config(), dtype=torch.float32)
    x, t, r, segments, condition = random_pack(text_config(), dtype=torch.float32)
    moving = tuple(range(1, len(t)))
    times = Times.from_tensors(OTFM(), t, torch.where(torch.arange(len(t)) == 0, t, r))
    images = NoisedPack(OTFM(), x, normal(*x.shape, seed=30).float(), times, segments, condition)
    assert times.transition_indices == moving
    config = ObjectiveConfig(derivative="dde")
    exact, exact_parts = output_and_parts(network, config, images)
    with derivative_of("everywhere"):
        output, parts = output_and_parts(network, config, images)
    with at_precision(network, "bf16 everywhere"):
        expected = central_difference(network, images, moving, None)
    assert exact_parts.dF_dt_TC is not None and parts.dF_dt_TC is not None
    rows = segments.token_index(moving)
    assert torch.equal(parts.dF_dt_TC[rows], expected)
    error = (parts.dF_dt_TC - exact_parts.dF_dt_TC).norm() / exact_parts.dF_dt_TC.norm()
    # Eight bits of F divided by 2e = 0.01: far beyond float32, whose own error here is below 1e-2.
    assert error > 0.1
    # Alone in its pass or with copies beside it, the main stream is float32 and its rounding differs at most.
    torch.testing.assert_close(output.F_TC, exact.F_TC, rtol=1e-4, atol=1e-5)
    assert output.F_TC.requires_grad


def test_white_noise_is_three_times_every_image() -> None:
    segments = Segments.from_lengths([400, 900])
    dF_TC = torch.cat([normal(400, 8, seed=31).float(), 1e3 * normal(900, 8, seed=32).float()])
    noise_TC = with_noise(dF_TC, segments, torch.Generator().manual_seed(0)) - dF_TC
    for dF, noise in zip(dF_TC.split([400, 900]), noise_TC.split([400, 900]), strict=True):
        # 3,200 draws: their mean square is known to 2.5 %, their product with the signal to 1.8 %.
        assert noise.norm() / dF.norm() == pytest.approx(3.0, rel=0.06)
        assert abs((noise * dF).sum() / noise.norm() / dF.norm()) < 0.06
