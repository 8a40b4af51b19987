"""What a run does about its saves: where one cannot be written it says so, goes on, and saves again.

A run that ended because its disk was full would lose every step since its last checkpoint, and the state that
somebody could still have saved by making room. So a failed save is told loudly (log, `events.jsonl`, the
scalars `unsaved_steps` and `failed_saves`) and the next one is tried when it is due. The save that a run ends
with has nothing after it: it is tried twice, and where it fails the run ends with an error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from tim_ds.errors import CheckpointError
from tim_ds.trainer.checkpoint import Piece
from tim_ds.trainer.checkpoint_folder import WITH_NEXT_S, CheckpointFolder
from tim_ds.trainer.events import SAVE_FAILED, SAVE_LEFT_OUT, SAVED_AGAIN, SNAPSHOT_FAILED, Events
from tim_ds.trainer.metrics import MetricsLog
from tim_ds.trainer.run_folder import FolderTakenError, RunFolder
from tim_ds.trainer.world import World

logger = logging.getLogger(__name__)

LAST_TRIES = 2
"""How often the save that a run ends with is tried."""


class Stand(Protocol):
    """Where a run stands (`loop.Progress`)."""

    @property
    def step(self) -> int: ...


@dataclass(eq=False)
class Saves:
    """Checkpoints and snapshots of a run. All ranks call its methods together.

    Args:
        pieces, own: this rank's state, as `CheckpointFolder.start` takes it.
        describe: manifest of a checkpoint.
        save_snapshot: writes the averages that `post_hoc` combines, and waits.
        milestones: steps whose checkpoints must be written, however long the one before takes.
        saved_step: the run continues after this step.
        run_folder, log, events: on rank 0.
    """

    checkpoints: CheckpointFolder
    world: World
    pieces: Callable[[], Iterator[Piece]]
    own: Callable[[], Mapping[str, Tensor]]
    describe: Callable[[Any], Mapping[str, Any]]
    save_snapshot: Callable[[Any], None]
    milestones: Collection[int] = ()
    saved_step: int = 0
    """Step of the last checkpoint that is complete."""
    run_folder: RunFolder | None = None
    log: MetricsLog | None = None
    events: Events | None = None
    failed: int = field(default=0, init=False)
    """Saves since then that could not be written."""
    _step: int = field(default=0, init=False)
    """Of the save that is being written, or was last."""

    def prepare(self) -> None:
        """Have what saves need made beside later steps. Called once, after the first step."""
        self.checkpoints.prepare(self.pieces(), self.own())

    def look(self) -> None:
        """Look after a checkpoint that is being written; called after every step."""
        self._settle()

    def save(self, progress: Stand, *, last: bool) -> str | None:
        """Begin to write the checkpoint of `progress`; the last one of a process is waited for.

        Returns:
            Why the last one is not on the disk; None if it is, and for every other.
        Raises:
            FolderTakenError: on every rank, if another process has begun to train in the folder.
        """
        needed = last or progress.step in self.milestones
        self._settle(wait=True, at_most=math.inf if needed else WITH_NEXT_S)
        if self.checkpoints.busy:
            self._leave_out(progress.step)
            return None
        for _ in range(LAST_TRIES if last else 1):
            problem = self._begin(progress)
            if problem is None and last:
                problem = self._settle(wait=True)
            if problem is None:
                return None
        return problem if last else None

    def snapshot(self, progress: Stand) -> None:
        """Write the averages that `post_hoc` combines, and wait; a step whose snapshot fails has none.

        Raises:
            FolderTakenError: as `save`.
        """
        try:
            self.world.together(self._hold, (CheckpointError,))
            self.save_snapshot(progress)
        except FolderTakenError:
            raise
        except CheckpointError as error:
            self._tell(SNAPSHOT_FAILED, progress.step, str(error))

    def _begin(self, progress: Stand) -> str | None:
        self._step = progress.step
        try:
            self.world.together(self._hold, (CheckpointError,))
            self.checkpoints.start(progress.step, self.pieces(), self.own(), self.describe(progress))
        except FolderTakenError:
            raise
        except CheckpointError as error:
            return self._fail(error)
        return None

    def _hold(self) -> None:
        """On rank 0: a checkpoint must not know of steps that the metrics on the disk do not."""
        try:
            if self.run_folder is not None:
                self.run_folder.hold()
        except OSError as error:
            raise CheckpointError(f"the checkpoint cannot be written: {error}") from error
        for file in (self.log, self.events):
            if file is not None:
                file.flush()

    def _settle(self, *, wait: bool = False, at_most: float = math.inf) -> str | None:
        try:
            complete = self.checkpoints.settle(wait=wait, at_most=at_most)
        except CheckpointError as error:
            return self._fail(error)
        if complete is not None:
            if self.failed:
                self._tell(SAVED_AGAIN, self._step, f"after {self.failed} that failed")
            self.saved_step, self.failed = self._step, 0
        return None

    def _fail(self, error: CheckpointError) -> str:
        self.failed += 1
        self._tell(SAVE_FAILED, self._step, str(error))
        return str(error)

    def _leave_out(self, step: int) -> None:
        self._tell(
            SAVE_LEFT_OUT,
            step,
            f"the checkpoint of step {self._step} is still being written; save less often "
            "(train.checkpoint.every_steps), or to a faster disk",
        )

    def _tell(self, event: str, step: int, reason: str) -> None:
        if not self.world.is_main:
            return
        if event == SAVE_FAILED:
            logger.error(
                "step %d: NOT SAVED: %s. Saved up to step %d; see to the disk before the next save",
                step,
                reason,
                self.saved_step,
            )
        else:
            logger.warning("step %d: %s: %s", step, event, reason)
        if self.events is not None:
            self.events.add(event, step, reason=reason)
