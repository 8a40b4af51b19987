"""How many launches a training step queues: what the host's time grows with, counted without a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.host_time import MicroStep, count, stand_ins
from tim_ds.config.load import load_recipe

RECIPES = Path(__file__).parents[1] / "launch" / "recipes"
LAUNCHES_OF_A_BLOCK = {"t2i_xl": 191, "t2i_xl_native": 177}
"""Forward, derivative, recomputation and backward. More are time that the host spends in every block of every
step: a change that adds some says what it buys."""


@pytest.mark.parametrize("name", LAUNCHES_OF_A_BLOCK)
def test_a_block_queues_no_more_launches_than_are_on_record(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    kernels: Counter[str] = Counter()
    with stand_ins(kernels, prepare=False):
        seen = [count(MicroStep(recipe, 1024, depth=depth), kernels) for depth in (1, 2, 3)]
    launches = [x.launches for x in seen]
    assert launches[2] - launches[1] == launches[1] - launches[0] <= LAUNCHES_OF_A_BLOCK[name]
    assert seen[0].operations["mm"] > 20 and seen[0].kernels["forward_kernel"] > 15


def test_launches_do_not_grow_with_the_images_of_a_pack():
    recipe = load_recipe(RECIPES / "t2i_xl.yaml")
    kernels: Counter[str] = Counter()
    with stand_ins(kernels, prepare=False):
        few, many = (count(MicroStep(recipe, side_px, depth=1), kernels) for side_px in (1024, 512))
    assert few.launches == many.launches
