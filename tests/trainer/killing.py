"""Runs that end without warning: kill -9 at a chosen moment, steps and saves included."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.trainer.cases import AVERAGES
from tests.trainer.ranks import recipe
from tim_ds.trainer import checkpoint_folder as folder_module
from tim_ds.trainer.checkpoint_folder import CheckpointFolder
from tim_ds.trainer.engine import start_world, stop_world
from tim_ds.trainer.loop import Loop
from tim_ds.trainer.run import train

SETTINGS = (
    "train.steps=7",
    # Neither divides the other: an interval of the log is cut by a checkpoint.
    "train.log_every=3",
    "train.checkpoint.every_steps=2",
    # Some snapshots are later than the checkpoint that a run continues from, and some are thinned out.
    AVERAGES.replace("every_steps: 1", "every_steps: 1, keep: 4"),
)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after_micro_step(count: int) -> None:
    """Between the backward of one micro-step and the next."""
    from tim_ds.trainer.engine import Engine

    plain, seen = Engine.backward, [0]

    def backward(self: Engine, loss: Any, *, last: bool) -> None:
        plain(self, loss, last=last)
        seen[0] += 1
        if seen[0] == count:
            _die()

    Engine.backward = backward


def _after_step(count: int) -> None:
    """After an optimiser step, before its checkpoint."""
    plain, seen = Loop._step, [0]

    def step(self: Loop, micro_batches: Any) -> None:
        plain(self, micro_batches)
        seen[0] += 1
        if seen[0] == count:
            _die()

    Loop._step = step


def _in(name: str, when: Callable[..., bool], *, before: bool) -> None:
    """In a function of the module that writes, before or after its work, at the first call that fits."""
    plain = getattr(folder_module, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if before and when(*args):
            _die()
        result = plain(*args, **kwargs)
        if when(*args):
            _die()
        return result

    setattr(folder_module, name, dying)


def _half_a_file() -> None:
    plain = folder_module.write_rank_file

    def half(path: Path, tensors: Any) -> Any:
        record = plain(path, tensors)
        os.truncate(path, record.bytes // 2)
        _die()
        return record

    folder_module.write_rank_file = half


MOMENTS: dict[str, Callable[[], None]] = {
    "in the third micro-step": lambda: _after_micro_step(3),
    "after the third step": lambda: _after_step(3),
    "with half a file written": _half_a_file,
    "before the manifest": lambda: _in(
        "write_flushed", lambda path, _: path.name == "manifest.json", before=True
    ),
    "before latest": lambda: _in("write_flushed", lambda path, _: "latest" in path.name, before=True),
    "after the save": lambda: _in("write_flushed", lambda path, _: "latest" in path.name, before=False),
}


class Counts(NamedTuple):
    """What a run counted: calls of the trainer's functions."""

    at_steps: list[int]
    in_saves: list[int]
    """Calls from the beginning of a save to the end of its thread, other threads' included."""


class _Calls:
    """Counts calls of the trainer's functions, in every thread, to kill the process at one of them.

    A count is a moment that a seed can choose and that is the same whatever else the machine does; counting
    calls rather than steps lets it fall anywhere, saves and their threads included.

    Args:
        last: the call at which the process dies.
        save: counted from the beginning of this save of the process on; 0: from its own.
    """

    def __init__(self, last: float = math.inf, save: int = 0) -> None:
        self.count = 0
        self.found = Counts([], [])
        self._saves: list[int] = []
        self._last = last
        self._save = save

    def __enter__(self) -> _Calls:
        threading.setprofile(self._seen)
        sys.setprofile(self._seen)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _seen(self, frame: Any, event: str, _: Any) -> None:
        if event == "return" and frame.f_code is CheckpointFolder._write.__code__:
            self.found.in_saves.append(self.count - self._saves[-1])
        if event not in ("call", "c_call") or "tim_ds/trainer" not in frame.f_code.co_filename:
            return
        self.count += 1
        if event == "call" and frame.f_code is Loop._step.__code__:
            self.found.at_steps.append(self.count)
        if event == "call" and frame.f_code is CheckpointFolder.start.__code__:
            self._saves.append(self.count)
        if len(self._saves) >= self._save:
            begun = self._saves[self._save - 1] if self._save else 0
            if self.count - begun >= self._last:
                _die()


def train_counted(
    last: float, save: int, run_dir: Path, engine: Path, shards: Path, *settings: str
) -> Counts:
    """Train the run, or continue it, and die at call number `last` from the beginning of save `save` on."""
    with _Calls(last, save) as calls:
        world = start_world()
        train(recipe(shards, *settings), run_dir, engine, world)
    stop_world(world)
    return calls.found


def train_until(moment: str | None, run_dir: Path, engine: Path, shards: Path) -> str:
    """Train the run, or continue it, and die at `moment`."""
    if moment is not None:
        MOMENTS[moment]()
    world = start_world()
    message = train(recipe(shards, *SETTINGS), run_dir, engine, world)
    stop_world(world)
    return message
