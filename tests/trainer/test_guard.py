"""Steps that are not finite: refused on every rank at every stage, located, counted, limited."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.trainer.cases import LOW_PRECISION, OFFLOADED
from tests.trainer.conftest import POISONED_SAMPLE, Groups
from tests.trainer.plain import PlainRun, train_plainly
from tests.trainer.ranks import recipe
from tim_ds.trainer.metrics import read_metrics

STAGES = range(4)


@pytest.fixture(scope="module")
def plain(poisoned_shards: Path) -> PlainRun:
    """A plain loop that leaves the poisoned step out."""
    run = train_plainly(recipe(poisoned_shards))
    assert len(run.skipped) == 1 and len(run.denoising) == 3
    return run


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_skips_its_step_and_names_its_sample(
    groups: Groups, plain: PlainRun, stage: int, world_size: int
) -> None:
    groups.results(world_size, "meet_poison")
    lines = read_metrics(groups.folder_of(world_size, "meet_poison") / f"zero{stage}")
    skips = [line for line in lines if "skipped" in line]
    assert skips == [
        {
            "step": plain.skipped[0],
            "skipped": "loss is not finite",
            "samples": [f"shard-000000.tar:{POISONED_SAMPLE:04d}"],
        }
    ]
    assert (lines[-1]["applied_steps"], lines[-1]["skipped_steps"]) == (3, 1)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_is_as_if_it_had_not_been(
    groups: Groups, plain: PlainRun, stage: int, world_size: int
) -> None:
    # Weights, optimiser, average and learning rate: a difference in any would show in the exported average.
    groups.results(world_size, "meet_poison")
    run = groups.folder_of(world_size, "meet_poison") / f"zero{stage}"
    exported = load_file(run / "export" / "tim.safetensors")
    for name, value in plain.ema.items():
        # Another order of float32 sums over the steps, as in test_arrangements.
        assert exported[name].numpy() == pytest.approx(value.numpy(), abs=1e-5), name
    applied = [line["denoising"] for line in read_metrics(run) if line.get("images")]
    assert applied == pytest.approx(plain.denoising, rel=1e-5)


@pytest.mark.parametrize(
    "engine", [*(f"zero{stage}" for stage in STAGES), *OFFLOADED, *(f"{p} {s}" for p, s in LOW_PRECISION)]
)
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(groups: Groups, engine: str) -> None:
    for found in groups.results(2, "meet_poisoned_gradient"):
        assert found[engine]["applied"] == (True, False, True, True)
        assert found[engine]["kept"], "the refused step moved the weights"
        assert found[engine]["same_as_without"], "the refused step left something behind"


def test_such_a_gradient_is_counted_and_located_in_its_step(groups: Groups) -> None:
    """No loss says which image it was: the samples of the step on all ranks are named."""
    (samples, same) = (found["samples"] for found in groups.results(2, "meet_poisoned_gradient_in_a_run"))
    lines = read_metrics(groups.folder_of(2, "meet_poisoned_gradient_in_a_run") / "run")
    (skip,) = [line for line in lines if "skipped" in line]
    assert skip["step"] == 2
    # DeepSpeed calls the norm of a gradient that is not a number infinite.
    assert skip["skipped"] in [f"gradient norm is {n} although every loss is finite" for n in ("inf", "nan")]
    assert sorted(skip["samples"]) == sorted(samples) == sorted(same) and len(samples) > 4
    assert (lines[-1]["applied_steps"], lines[-1]["skipped_steps"]) == (2, 1)


def test_the_limit_ends_the_run_with_a_checkpoint_and_a_reason(groups: Groups) -> None:
    for found in groups.results(2, "give_up"):
        first, second = found["messages"]
        assert first.startswith("train.max_skipped_steps: 2 steps in a row were skipped, up to step 2")
        assert "shard-000000.tar:" in first and "and" in first
        # Started again, it does not train its way past the limit unnoticed.
        assert second.startswith("train.max_skipped_steps: 3 steps in a row were skipped, up to step 3")
        assert found["steps"]["run"] == [3, 2]
        # The first step was applied, the next two were not.
        assert found["gradients"].startswith(
            "train.max_skipped_steps: 2 steps in a row were skipped, up to step 3: gradient norm is "
        )
        assert found["steps"]["gradients"] == [3]
