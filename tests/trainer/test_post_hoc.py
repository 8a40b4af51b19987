from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import Groups
from tests.trainer.plain import PlainRun, train_plainly
from tests.trainer.ranks import recipe
from tim_ds.config.recipe import Recipe, to_dict
from tim_ds.model.export_folder import WEIGHTS_FILE, meta_network, read_export
from tim_ds.trainer.ema import Ema
from tim_ds.trainer.post_hoc import main, reconstruct, stored_averages
from tim_ds.trainer.snapshots import SNAPSHOTS, Snapshots, find_snapshots, most_crowded
from tim_ds.trainer.world import World

STEPS = 400
WANTED = {"between": 0.07, "narrow": 0.05, "wide": 0.15}


def settings_of(*averages: str) -> Recipe:
    entries = ", ".join(["{name: main, decay: 0.99}", *averages])
    return recipe(
        Path("nowhere"),
        f"train.ema={{use: main, averages: [{entries}], snapshots: {{every_steps: 20, keep: 64}}}}",
    )


@pytest.fixture(scope="module")
def wandering(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """Snapshots of weights that walk at random, and the averages that were followed directly."""
    folder = tmp_path_factory.mktemp("wandering")
    stored = settings_of("{name: p5, sigma_rel: 0.05}", "{name: p10, sigma_rel: 0.1}")
    direct = settings_of(*(f"{{name: {name}, sigma_rel: {width}}}" for name, width in WANTED.items()))
    torch.manual_seed(0)
    shapes = meta_network(stored.model).state_dict()
    shards = tuple(
        SimpleNamespace(name=f"network.{name}", start=0, master=torch.randn(value.numel()))
        for name, value in shapes.items()
    )
    engine: Any = SimpleNamespace(shards=shards)
    ema, followed = Ema(engine, stored.train.ema), Ema(engine, direct.train.ema)
    snapshots = Snapshots(folder / SNAPSHOTS, World(), stored.train.ema.snapshots)
    for step in range(1, STEPS + 1):
        for shard in shards:
            shard.master += 0.1 * torch.randn_like(shard.master)
        ema.update(step)
        followed.update(step)
        if step % 20 == 0:
            progress = {"step": step, "applied_steps": step}
            snapshots.save(step, ema, {"progress": progress, "recipe": to_dict(stored)})
    masters = {shard.name: shard.master for shard in shards}
    return folder, {**followed.averages, "masters": masters}


@pytest.mark.parametrize("name", WANTED)
def test_a_width_fitted_afterwards_is_the_one_followed_directly(
    wandering: tuple[Path, dict[str, dict[str, torch.Tensor]]], tmp_path: Path, name: str
) -> None:
    folder, averages = wandering
    error = reconstruct(stored_averages(folder), WANTED[name], tmp_path / "out")
    assert error < 0.06
    export, state = read_export(tmp_path / "out")
    assert export.step == STEPS and export.source.average == f"sigma_rel {WANTED[name]:g}"

    def distance(reference: dict[str, torch.Tensor]) -> float:
        gaps = [state[k.removeprefix("network.")].view(-1) - v for k, v in reference.items()]
        return float(torch.cat(gaps).norm())

    # A walk's steps are independent: what a profile's error leaves of them is small beside the distance
    # between the average and the weights, or another average. Seen: 1 to 3 %.
    assert distance(averages[name]) < 0.05 * distance(averages["masters"])
    assert distance(averages[name]) < 0.2 * min(
        distance(averages[other]) for other in WANTED if other != name
    )


def test_an_average_that_was_stored_comes_back(
    wandering: tuple[Path, dict[str, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    folder, averages = wandering
    reconstruct(stored_averages(folder), 0.05, tmp_path / "out")
    state = load_file(tmp_path / "out" / WEIGHTS_FILE)
    for name, value in averages["narrow"].items():
        # Weights of size 2; the coefficients are right to 1e-5 of a profile.
        assert state[name.removeprefix("network.")].view(-1).numpy() == pytest.approx(value.numpy(), abs=1e-3)


def test_an_earlier_step_uses_nothing_later(
    wandering: tuple[Path, dict[str, dict[str, torch.Tensor]]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    folder, _ = wandering
    command = [str(folder), "--sigma-rel", "0.05", "0.1", "--step", "200", "--out", str(tmp_path)]
    assert main(command) == 0
    assert capsys.readouterr().out.count("from 20 stored averages") == 2
    export, _ = read_export(tmp_path / "sigma_rel_0.05_step_200")
    assert export.step == 200
    assert main(command) == 2
    assert "holds tim.safetensors and export.json already" in capsys.readouterr().err
    assert main([str(folder), "--sigma-rel", "0.1", "--step", "7"]) == 2
    assert "no snapshot of step 7; there are 20, 40" in capsys.readouterr().err


def test_the_snapshot_that_is_missed_least_goes_first() -> None:
    steps = list(range(10, 1010, 10))
    while len(steps) > 12:
        steps.pop(most_crowded(steps))
    assert (steps[0], steps[-1]) == (10, 1000)
    factors = [later / earlier for earlier, later in pairwise(steps)]
    # An even division of a factor of 100 into eleven is 1.52 each; steps are multiples of 10.
    assert max(factors) <= 2.01 and min(factors) > 1.2


@pytest.fixture(scope="module")
def plain(shards: Path) -> PlainRun:
    return train_plainly(recipe(shards))


@pytest.mark.parametrize("world_size", [1, 2])
def test_further_averages_change_nothing_of_the_one_in_use(
    groups: Groups, plain: PlainRun, world_size: int
) -> None:
    run = Path(groups.results(world_size, "train_every_stage")[0]["zero3_averages"])
    exported = load_file(run / "export" / WEIGHTS_FILE)
    for name, value in plain.ema.items():
        # As in test_arrangements: float32 sums in another order.
        assert exported[name].numpy() == pytest.approx(value.numpy(), abs=1e-5), name
    assert json.loads((run / "export" / "export.json").read_text())["source"]["average"] == "main"


def test_two_ranks_store_what_one_rank_stores_each_its_own_shards(groups: Groups, tmp_path: Path) -> None:
    runs = {n: Path(groups.results(n, "train_every_stage")[0]["zero3_averages"]) for n in (1, 2)}
    states = {}
    for ranks, run in runs.items():
        snapshots = find_snapshots(run)
        assert [s.step for s in snapshots] == [1, 2, 3, 4]
        files = sorted(snapshots[-1].path.glob("rank_*.safetensors"))
        sizes = [path.stat().st_size for path in files]
        assert len(files) == ranks and max(sizes) < 1.1 * sum(sizes) / ranks
        reconstruct(stored_averages(run), 0.15, tmp_path / str(ranks))
        states[ranks] = load_file(tmp_path / str(ranks) / WEIGHTS_FILE)
    moved = 0.0
    for name, value in states[1].items():
        # The coefficients of four steps add up to less than 10 in size, times 1e-6 between the arrangements.
        assert states[2][name].numpy() == pytest.approx(value.numpy(), abs=1e-5), name
        moved = max(moved, float((value - load_file(runs[1] / "export" / WEIGHTS_FILE)[name]).abs().max()))
    assert moved > 1e-3
