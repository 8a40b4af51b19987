"""Noise depends on an image's seed and size alone."""

from __future__ import annotations

import pytest
import torch

from tim_ds.errors import RequestError
from tim_ds.sampler.rng import initial_noise, step_noise

GRIDS = ((2, 3), (4, 4), (1, 1))
SEEDS = (11, 12, 13)


def _split(noise: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.split(noise, [h * w for h, w in GRIDS]))


def test_an_images_noise_is_the_same_alone_and_in_any_batch() -> None:
    together = _split(initial_noise(GRIDS, 5, SEEDS))
    steps = step_noise(GRIDS, 5, SEEDS)
    fresh = [_split(next(steps)) for _ in range(3)]
    for i, (grid, seed) in enumerate(zip(GRIDS, SEEDS, strict=True)):
        assert torch.equal(initial_noise([grid], 5, [seed]), together[i])
        alone = step_noise([grid], 5, [seed])
        for step in fresh:
            assert torch.equal(next(alone), step[i])


def test_every_draw_of_a_run_is_different() -> None:
    steps = step_noise(GRIDS, 5, SEEDS)
    draws = [initial_noise(GRIDS, 5, SEEDS).double(), next(steps), next(steps)]
    values = torch.cat(draws).flatten().tolist()
    assert len(set(values)) == len(values) == 3 * 23 * 5


def test_step_noise_continues_each_generator_after_its_initial_noise() -> None:
    generator = torch.Generator().manual_seed(12)
    initial = torch.randn(16, 5, generator=generator)
    fresh = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    assert torch.equal(initial_noise([(4, 4)], 5, [12]), initial)
    assert torch.equal(next(step_noise([(4, 4)], 5, [12])), fresh)


def test_noise_is_standard_normal() -> None:
    noise = torch.cat(
        [initial_noise([(64, 64)], 16, [1]).double(), next(step_noise([(64, 64)], 16, [1]))], dim=1
    )
    # 65,536 draws a column block: the standard error of mean and variance is 0.004 and 0.0055; five of them.
    for block in noise.chunk(2, dim=1):
        assert abs(block.mean().item()) < 0.02
        assert abs(block.var().item() - 1) < 0.028


def test_a_missing_seed_is_refused() -> None:
    for draw in (initial_noise, step_noise):
        with pytest.raises(RequestError, match="expected 3, one an image, received 2"):
            draw(GRIDS, 5, SEEDS[:2])
