"""DeepSpeed's own AdamW on the host, which is compiled when it is first used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainer.cases import OFFLOADED
from tests.trainer.plain import train_plainly
from tests.trainer.ranks import recipe, run_ranks
from tests.trainer.test_arrangements import check_same
from tim_ds.trainer.engine import start_world, stop_world
from tim_ds.trainer.run import train


def _train(shards: Path, folder: Path) -> None:
    world = start_world()
    for name, (stage, zero) in OFFLOADED.items():
        file = folder / f"{name}.json"
        if world.is_main:
            settings = {"zero_optimization": {"stage": stage, **zero}, "zero_force_ds_cpu_optimizer": True}
            file.write_text(json.dumps(settings))
        world.barrier()
        # Stopped and continued: its count of steps is restored too.
        for steps in (2, 4):
            train(recipe(shards, f"train.steps={steps}"), folder / name, file, world)
    stop_world(world)


@pytest.mark.slow
def test_the_compiled_optimiser_trains_like_a_plain_loop(tmp_path: Path, shards: Path) -> None:
    run_ranks(_train, shards, tmp_path, world_size=2, out=tmp_path / "out", timeout_s=600)
    plain = train_plainly(recipe(shards))
    for name in OFFLOADED:
        check_same(tmp_path / name, plain)
