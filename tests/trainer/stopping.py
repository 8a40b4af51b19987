"""Ranks that are signalled, that hang, that die and that fail, for the tests of signals and watch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import deepspeed
import pytest

from tests.trainer.cases import AVERAGES
from tests.trainer.ranks import RECIPE
from tim_ds.trainer import cli
from tim_ds.trainer.cli import main
from tim_ds.trainer.loop import Loop

SETTINGS = (
    "train.steps=6",
    "train.log_every=3",
    "train.checkpoint.every_steps=4",
    AVERAGES.replace("every_steps: 1", "every_steps: 2"),
)
LIMITS = ("--hung-after", "15", "--dead-after", "6")


def train_main(run_dir: Path, engine: Path, shards: Path, *settings: str) -> int:
    """The command line on a small run."""
    recipe = run_dir.parent / f"{run_dir.name}.yaml"
    recipe.write_text(RECIPE.replace("SHARDS", str(shards)))
    arguments = ["--ds", str(engine), "--run", str(run_dir), *LIMITS]
    try:
        return main([str(recipe), *SETTINGS, *arguments, *settings])
    except SystemExit as error:
        return int(error.code or 0)


def at_step(step: int, rank: int, what: Any) -> None:
    """Do something on one rank before the backward passes of a step."""
    plain = Loop._step

    def acting(self: Loop, micro_batches: Any) -> None:
        if self.world.rank == rank and self.progress.step + 1 == step:
            what()
        plain(self, micro_batches)

    Loop._step = acting


def train_signalled(
    number: int, step: int, rank: int, run_dir: Path, engine: Path, shards: Path, *settings: str
) -> int:
    def signalled() -> None:
        # To the loader processes as well, as schedulers do it.
        os.kill(os.getpid(), number)
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(child), number)

    at_step(step, rank, signalled)
    return train_main(run_dir, engine, shards, *settings)


def hang() -> None:
    time.sleep(1000)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ZeroDivisionError("one rank divided by zero")


WAYS = {"hangs": hang, "dies": die, "fails": fail}


def train_missing(what: str, rank: int, run_dir: Path, engine: Path, shards: Path) -> int:
    """One rank goes missing in the third step."""
    at_step(3, rank, WAYS[what])
    return train_main(run_dir, engine, shards)


def start_missing(what: str, rank: int, run_dir: Path, engine: Path, shards: Path) -> int:
    """One rank goes missing when all have met, before it has joined the process group."""
    plain = deepspeed.init_distributed

    def acting(**settings: Any) -> None:
        if os.environ["RANK"] == str(rank):
            WAYS[what]()
        plain(**settings)

    deepspeed.init_distributed = acting
    return train_main(run_dir, engine, shards, "--hung-after=8")


def end_missing(what: str, rank: int, run_dir: Path, engine: Path, shards: Path) -> int:
    """One rank goes missing when its run is over, and the others wait for it."""
    plain = cli.train

    def acting(*arguments: Any, **named: Any) -> str:
        message = plain(*arguments, **named)
        if os.environ["RANK"] == str(rank):
            WAYS[what]()
        return message

    cli.train = acting
    return train_main(run_dir, engine, shards)


def press_twice(run_dir: Path, engine: Path, shards: Path) -> int:
    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1000)
        pytest.fail("still alive")

    at_step(2, 0, press)
    return train_main(run_dir, engine, shards)
