"""Stopped runs continue as if they had not been stopped."""

from __future__ import annotations

import math
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.trainer.cases import ELSEWHERE, run_cases
from tests.trainer.killing import MOMENTS, train_counted, train_until
from tests.trainer.plain import train_plainly
from tests.trainer.ranks import (
    engine_file,
    free_port,
    lines_without_clock,
    recipe,
    run_ranks,
    start_rank,
)
from tim_ds.trainer.checkpoint import find_checkpoints
from tim_ds.trainer.metrics import read_metrics


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def run_and_die(moment: str, world_size: int, out: Path, arguments: tuple[Any, ...]) -> None:
    port = free_port()
    out.mkdir(parents=True)
    ranks = [
        start_rank(train_until, (moment, *arguments), rank, world_size, port, out)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.join(timeout=60)
        if process.is_alive():
            # A rank that waits for one that died.
            process.kill()
            process.join()
    assert -signal.SIGKILL in {process.exitcode for process in ranks}, (out / "output_0.txt").read_text()


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (2, 3)])
def test_killed_at_any_moment_a_run_ends_equal_to_the_bit(
    tmp_path: Path, shards: Path, world_size: int, stage: int
) -> None:
    engine = engine_file(tmp_path, stage)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_ranks(train_until, None, whole, engine, shards, world_size=world_size, out=tmp_path / "out")
    moments = list(MOMENTS) if world_size == 1 else ["with half a file written"]
    for number, moment in enumerate(moments):
        run_and_die(moment, world_size, tmp_path / f"out{number}", (broken, engine, shards))
        # What is there is whole, whatever the moment.
        steps = [checkpoint.step for checkpoint in find_checkpoints(broken / "checkpoints")]
        assert steps == sorted(steps, reverse=True) and all(step % 2 == 0 for step in steps)
    (message, *_) = run_ranks(
        train_until, None, broken, engine, shards, world_size=world_size, out=tmp_path / "last"
    )
    assert "finished at step 7" in message
    assert lines_without_clock(broken) == lines_without_clock(whole)
    assert [line["step"] for line in read_metrics(whole)] == [3, 6, 7]
    assert files_of(broken / "export") == files_of(whole / "export")
    kept = [path.name for path in sorted((whole / "snapshots").glob("step_*"))]
    assert len(kept) == 4 and kept[-1] == "step_000000007"
    for name in kept[-2:]:
        assert files_of(broken / "snapshots" / name) == files_of(whole / "snapshots" / name) != {}
    last = Path("checkpoints") / "step_000000007"
    assert files_of(broken / last) == files_of(whole / last)
    assert len(files_of(whole / last)) == world_size


KILLS, STEPS = 20, 80


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (2, 3)])
def test_killed_at_twenty_random_moments_a_run_ends_equal_to_the_bit(
    tmp_path: Path, shards: Path, world_size: int, stage: int
) -> None:
    """On several ranks a random one is killed; the others, which wait for it, are ended after it."""
    settings = (f"train.steps={STEPS}", "train.log_every=7", "train.checkpoint.every_steps=2")
    engine = engine_file(tmp_path, stage)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    counts = run_ranks(
        train_counted,
        math.inf,
        0,
        whole,
        engine,
        shards,
        *settings,
        world_size=world_size,
        out=tmp_path / "out",
        timeout_s=600,
    )
    assert [len(count.at_steps) for count in counts] == [STEPS] * world_size
    moments = random.Random(0)
    reached, interrupted_saves = [], 0
    for number in range(KILLS):
        victim = moments.randrange(world_size)
        at_steps, in_saves = counts[victim]
        # From the start of the process into its fifth step, in which two saves lie; or within one of the two.
        save = (number % 2) * moments.randint(1, 2)
        whole_time = at_steps[0] + 5 * (at_steps[-1] - at_steps[0]) / (STEPS - 1)
        last = moments.uniform(1, min(in_saves) if save else whole_time)
        out, port = tmp_path / f"out{number}", free_port()
        out.mkdir()
        ranks = []
        for rank in range(world_size):
            until = last if rank == victim else math.inf
            arguments = (until, save, broken, engine, shards, *settings)
            ranks.append(start_rank(train_counted, arguments, rank, world_size, port, out))
        ranks[victim].join(timeout=600)
        assert ranks[victim].exitcode == -signal.SIGKILL, (out / f"output_{victim}.txt").read_text()
        for process in ranks:
            process.kill()
            process.join()
        folder = broken / "checkpoints"
        interrupted_saves += len(list(folder.glob(".tmp-*"))) if folder.is_dir() else 0
        reached.append(find_checkpoints(folder)[0].step if folder.is_dir() else 0)
    print(f"{KILLS} kills, newest checkpoint after each: {reached}; {interrupted_saves} saves interrupted")
    assert reached == sorted(reached), "a kill lost a checkpoint"
    assert reached[-1] >= 6 and interrupted_saves > 1
    out = tmp_path / "last"
    run_ranks(train_counted, math.inf, 0, broken, engine, shards, *settings, world_size=world_size, out=out)
    assert lines_without_clock(broken) == lines_without_clock(whole)
    assert files_of(broken / "export") == files_of(whole / "export")
    last_one = Path("checkpoints") / f"step_{STEPS:09d}"
    assert files_of(broken / last_one) == files_of(whole / last_one)


LEGS = {
    # Up to step 1 on one rank at stage 0, to 3 on two ranks at stages 3 and 2, to 4 on one rank at stage 1.
    "1-2-1": [(1, "1", "zero0"), (2, "2 3", "zero3 zero2"), (1, "4", "zero1")],
    "4-2-1-2": [
        (4, "1 2", "zero3 zero3_nodes"),
        (2, "3", "zero2_offload"),
        (1, "4", "zero0"),
        (2, "5 6", "zero3_offload zero1"),
    ],
}


@pytest.mark.parametrize("legs", ["1-2-1", pytest.param("4-2-1-2", marks=pytest.mark.slow)])
def test_a_run_continues_on_other_ranks_and_stages(tmp_path: Path, shards: Path, legs: str) -> None:
    folder = tmp_path / "continue_elsewhere"
    folder.mkdir()
    task = folder / "stages.task"
    for number, (world_size, steps, engines) in enumerate(LEGS[legs]):
        task.write_text(f"{steps}:{engines}")
        run_ranks(
            run_cases,
            ("continue_elsewhere",),
            tmp_path,
            shards,
            shards,
            world_size=world_size,
            out=tmp_path / f"out{number}",
            timeout_s=600,
        )
    steps_in_all = int(LEGS[legs][-1][1].split()[-1])
    plain = train_plainly(recipe(shards, *ELSEWHERE, f"train.steps={steps_in_all}"))
    lines = read_metrics(folder / "run")
    assert [line["step"] for line in lines] == list(range(1, steps_in_all + 1))
    # The settings of the parameter group, which an engine's own checkpoint would carry, are the recipe's: the
    # rate, and by the weights below AdamW's betas, epsilon and decay, none of which is PyTorch's default.
    assert {line["lr"] for line in lines} == {recipe(shards).train.optimizer.lr}
    # As in test_arrangements: float32 sums in another order.
    assert [line["denoising"] for line in lines] == pytest.approx(plain.denoising, rel=1e-5)
    exported = load_file(folder / "run" / "export" / "tim.safetensors")
    for name, value in plain.ema.items():
        assert exported[name].numpy() == pytest.approx(value.numpy(), abs=1e-5), name
