"""The time grid: ends, order, and the authors' rounding."""

from __future__ import annotations

import pytest
import torch

from tim_ds.errors import RequestError
from tim_ds.sampler.schedule import time_grid


@pytest.mark.parametrize("num_steps", [1, 2, 7, 250])
@pytest.mark.parametrize("ends", [(1.0, 0.0), (1.57, 0.0), (80.0, 0.01), (1.0, 1e-5)])
def test_grid_falls_evenly_from_exactly_T_max_to_exactly_T_min(
    ends: tuple[float, float], num_steps: int
) -> None:
    times = time_grid(*ends, num_steps)
    assert times.dtype == torch.float64
    assert (times[0].item(), times[-1].item()) == ends
    steps = times[:-1] - times[1:]
    assert len(steps) == num_steps
    # Even to the rounding of a time at T_max.
    assert (steps - (ends[0] - ends[1]) / num_steps).abs().max() <= 4e-16 * ends[0]


@pytest.mark.parametrize("num_steps", [1, 4, 16, 64, 128])
def test_bfloat16_grid_is_exact_for_powers_of_two(num_steps: int) -> None:
    assert torch.equal(time_grid(1.0, 0.0, num_steps, "bfloat16"), time_grid(1.0, 0.0, num_steps))


def test_bfloat16_grid_of_250_steps_is_as_uneven_as_the_authors() -> None:
    times = time_grid(1.0, 0.0, 250, "bfloat16")
    assert torch.equal(times, times.bfloat16().double())
    relative = (times[:-1] - times[1:]) * 250
    # Measured on the authors' code: 0.98 to 1.95 times 1/250.
    assert relative.min() == pytest.approx(0.98, abs=0.005)
    assert relative.max() == pytest.approx(1.95, abs=0.005)


def test_rounding_that_repeats_a_time_is_refused() -> None:
    with pytest.raises(RequestError, match="1000 steps repeat a time"):
        time_grid(1.0, 0.0, 1000, "bfloat16")


@pytest.mark.parametrize("num_steps", [0, -3])
def test_no_steps_are_refused(num_steps: int) -> None:
    with pytest.raises(
        RequestError, match=f"num_steps: expected at least 1 transition, received {num_steps}"
    ):
        time_grid(1.0, 0.0, num_steps)


def test_a_grid_that_does_not_fall_is_refused() -> None:
    with pytest.raises(RequestError, match="T_min < T_max"):
        time_grid(0.0, 0.0, 3)
