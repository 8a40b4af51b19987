"""Copies of the power-function averages through a run, for `post_hoc`: `RUN/snapshots/step_000001000`.

Each is a folder in the format of a checkpoint, written shard by shard as a checkpoint is: no rank gathers
anything. It holds the averages alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tim_ds.errors import CheckpointError
from tim_ds.trainer.checkpoint import Checkpoint, find_checkpoints, remove_checkpoint
from tim_ds.trainer.checkpoint_folder import CheckpointFolder
from tim_ds.trainer.config import SnapshotConfig
from tim_ds.trainer.ema import Ema
from tim_ds.trainer.world import World

SNAPSHOTS = "snapshots"


class Snapshots:
    """Writes snapshots of a run and thins them out. All ranks call `save` together."""

    def __init__(self, folder: Path, world: World, config: SnapshotConfig) -> None:
        self._folder = folder
        self._world = world
        self._config = config
        # Retention is this class's own.
        self._writer = CheckpointFolder(folder, world, keep=sys.maxsize)

    def drop_after(self, step: int) -> None:
        """Remove what a run that continues after `step` will write again, and what interrupted saves left."""
        if self._folder.is_dir():
            self._writer.newest()
        if self._world.is_main and self._folder.is_dir():
            for snapshot in find_checkpoints(self._folder):
                if snapshot.step > step:
                    remove_checkpoint(snapshot)
        self._world.barrier()

    def save(self, step: int, ema: Ema, manifest: dict[str, Any]) -> None:
        """Write the snapshot of `step`.

        Raises:
            CheckpointError: on every rank, if one cannot write.
        """
        self._writer.save(step, ema.pieces(power_only=True), {}, manifest)
        self._world.together(self._thin_out, (CheckpointError,))

    def _thin_out(self) -> None:
        if self._world.is_main:
            kept = sorted(find_checkpoints(self._folder), key=lambda snapshot: snapshot.step)
            while len(kept) > self._config.keep:
                remove_checkpoint(kept.pop(most_crowded([snapshot.step for snapshot in kept])))


def most_crowded(steps: Sequence[int]) -> int:
    """Which of ascending `steps` is missed least: the one, neither first nor last, whose neighbours are
    nearest in relative time.

    A power-function profile looks the same at every length, so snapshots serve best when each is a constant
    factor later than the one before.
    """
    return min(range(1, len(steps) - 1), key=lambda i: (steps[i + 1] / steps[i - 1], i))


def find_snapshots(run_dir: Path) -> list[Checkpoint]:
    """The complete snapshots of a run, oldest first; empty if there are none.

    Raises:
        CheckpointError: if there are snapshots and none can be read.
    """
    folder = run_dir / SNAPSHOTS
    return sorted(find_checkpoints(folder), key=lambda snapshot: snapshot.step) if folder.is_dir() else []
