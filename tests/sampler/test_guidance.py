"""Which steps are guided, and how two predictions combine."""

from __future__ import annotations

import pytest
import torch

from tim_ds.sampler.config import SamplerConfig
from tim_ds.sampler.guidance import combine, is_guided
from tim_ds.sampler.schedule import time_grid


def _guided(config: SamplerConfig, T_max: float = 1.0, T_min: float = 0.0) -> list[bool]:
    times = time_grid(T_max, T_min, config.num_steps).tolist()
    return [is_guided(t, config, T_max) for t in times[:-1]]


@pytest.mark.parametrize(("scale", "expected"), [(0.0, [10.0, -1.0]), (1.0, [4.0, 2.0]), (2.5, [-5.0, 6.5])])
def test_scale_0_is_unconditional_1_conditional_and_beyond_extrapolates(
    scale: float, expected: list[float]
) -> None:
    F_c, F_u = torch.tensor([4.0, 2.0]), torch.tensor([10.0, -1.0])
    assert combine(F_c, F_u, scale).tolist() == expected


@pytest.mark.parametrize("ends", [(1.0, 0.0), (1.57, 0.0), (80.0, 0.01), (100.0, 0.02)])
def test_default_interval_guides_every_step_and_exclusive_all_but_the_first(
    ends: tuple[float, float],
) -> None:
    inclusive = SamplerConfig(num_steps=4, cfg_scale=2.0)
    exclusive = SamplerConfig(num_steps=4, cfg_scale=2.0, cfg_upper="exclusive")
    assert _guided(inclusive, *ends) == [True] * 4
    assert _guided(exclusive, *ends) == [False, True, True, True]


@pytest.mark.parametrize("num_steps", [5, 10, 20, 35])
def test_both_ends_of_the_interval_are_guided_whatever_the_rounding_of_the_grid(num_steps: int) -> None:
    config = SamplerConfig(num_steps=num_steps, cfg_scale=2.0, cfg_interval=(0.2, 0.6))
    step = num_steps // 5
    guided = _guided(config)
    assert [i for i, g in enumerate(guided) if g] == list(range(2 * step, 4 * step + 1))


def test_exclusive_interval_leaves_out_both_ends() -> None:
    config = SamplerConfig(num_steps=4, cfg_scale=2.0, cfg_interval=(0.25, 0.75), cfg_upper="exclusive")
    assert _guided(config) == [False, False, True, False]


def test_exclusive_interval_beyond_1_guides_the_first_step() -> None:
    config = SamplerConfig(num_steps=2, cfg_scale=2.0, cfg_interval=(0.0, 1.001), cfg_upper="exclusive")
    assert _guided(config) == [True, True]


def test_interval_is_relative_to_T_max() -> None:
    config = SamplerConfig(num_steps=4, cfg_scale=2.0, cfg_interval=(0.0, 0.5))
    assert _guided(config, 80.0, 0.01) == [False, False, False, True]
    assert _guided(config, 1.57, 0.0) == [False, False, True, True]


def test_scale_1_guides_nothing() -> None:
    assert _guided(SamplerConfig(num_steps=3)) == [False] * 3
