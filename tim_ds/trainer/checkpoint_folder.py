"""The checkpoints of a run: written behind it, the newest few kept, the newest undamaged one found.

A checkpoint is written aside, by a thread of every rank, flushed to the disk and renamed; `latest` is
replaced last. Killing the run at any moment leaves the previous checkpoint usable. The folder has to be on a
disk that all ranks share.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tim_ds.errors import CheckpointError
from tim_ds.model.weights import sync_folder
from tim_ds.trainer.checkpoint import (
    ASIDE,
    FORMAT,
    MANIFEST,
    PREFIX,
    Checkpoint,
    Piece,
    find_checkpoints,
    rank_file_name,
    remove_checkpoint,
    remove_folder,
)
from tim_ds.trainer.host_copy import HostCopy, Room, layout_of
from tim_ds.trainer.rank_file import FileRecord, check_rank_file, write_rank_file
from tim_ds.trainer.world import World

logger = logging.getLogger(__name__)

LATEST = "latest"
DAMAGED = "damaged-"

LEAVE_S = 60.0
"""How long a rank that ends with an error lets a checkpoint that is being written become complete."""

WITH_NEXT_S = 10.0
"""How long a save that falls due waits for one that is still being written, before it is left out."""

_ABANDONED = "not written, because its rank failed or left"

SPARE_BYTES = 1 << 20
"""Room asked for beside the tensors: manifest, headers, folder entries."""


@dataclass(eq=False)
class _Writing:
    """A checkpoint that is being written, on this rank."""

    final: Path
    aside: Path
    needed: int
    manifest: Mapping[str, Any]
    read: threading.Event = field(default_factory=threading.Event)
    """Set when the tensors of this rank may change again."""
    done: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when the main rank need not wait for the files of the others any more."""
    problem: str | None = None


class CheckpointFolder:
    """Writes checkpoints of a run and keeps the last few. All ranks call its methods together.

    `start` copies this rank's pieces to host memory and returns; a thread writes them while the run goes on.
    The copy is made into the same memory each time: as many bytes as the pieces have. `prepare` has that
    memory made before the first save. Where the host has no room for it, a save is written from the pieces
    themselves while the step waits.

    Args:
        keep: newest checkpoints that stay.
        milestones: steps whose checkpoints always stay.
        strict: a damaged checkpoint is an error, where else the one before is used.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep: int,
        milestones: tuple[int, ...] = (),
        strict: bool = False,
    ) -> None:
        self.folder = folder
        self._world = world
        self._keep = keep
        self._milestones = frozenset(milestones)
        self._strict = strict
        self._host = HostCopy(world.device)
        self._writing: _Writing | None = None
        self.passed_over: list[str] = []
        """What was wrong with the checkpoints that `newest` set aside."""

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is complete and undamaged, the same on every rank.

        Every file is read once for this. What interrupted saves left is removed, damaged checkpoints are set
        aside with a warning.

        Raises:
            CheckpointError: on every rank, if there are checkpoints and none can be read; with `strict`, if
                the newest is damaged.
        """
        found = self._world.together(self._find, (CheckpointError,))
        found = self._world.from_main(found)
        self.passed_over.clear()
        for number, checkpoint in enumerate(found):
            problems = self._damage(checkpoint)
            if not problems:
                return checkpoint
            told = "; ".join(problems)
            if self._strict:
                self._world.raise_everywhere(
                    CheckpointError(
                        f"{told}. train.checkpoint.strict refuses to go on from an older checkpoint; move "
                        f"{checkpoint.path} away, or set it to false, to continue after "
                        + (f"step {found[number + 1].step}" if found[number + 1 :] else "no step at all")
                    )
                )
            if number + 1 == len(found):
                self._world.raise_everywhere(
                    CheckpointError(
                        f"{told}. No older checkpoint is left; restore one, or move {self.folder} away to "
                        "begin anew"
                    )
                )
            self.passed_over.append(told)
            self._world.together(
                partial(self._go_back, checkpoint, found[number + 1], told), (CheckpointError,)
            )
        return None

    def _go_back(self, damaged: Checkpoint, before: Checkpoint, told: str) -> None:
        if not self._world.is_main:
            return
        try:
            kept_as = _set_aside(damaged)
            self._point_to(before.path)
        except OSError as error:
            raise CheckpointError(
                f"{told}. It cannot be set aside, so that the run could go on from {before.path}: {error}"
            ) from error
        logger.warning(
            "%s; the run goes back %d steps, to %s; the damaged one is kept as %s",
            told,
            damaged.step - before.step,
            before.path,
            kept_as,
        )

    def _find(self) -> list[Checkpoint]:
        if not self._world.is_main or not self.folder.is_dir():
            return []
        _sweep(self.folder)
        return find_checkpoints(self.folder, strict=self._strict)

    def _damage(self, checkpoint: Checkpoint) -> list[str]:
        """What is wrong with the files of a checkpoint; the ranks share the reading."""
        problems = []
        for name, record in checkpoint.files[self._world.rank :: self._world.size]:
            try:
                check_rank_file(checkpoint.path / name, record)
            except CheckpointError as error:
                problems.append(str(error))
        return [problem for part in self._world.gather(problems) for problem in part]

    def prepare(self, pieces: Iterator[Piece], own: Mapping[str, Tensor]) -> None:
        """Have a thread make the memory of later copies. The pieces are those that `start` will be given."""
        layout = layout_of(_tensors(pieces, own))
        room = Room.of(self._world.gather(self._host.need(layout)), self._world.rank)
        if room.enough:
            self._host.make(layout, behind=True)
        elif room.first:
            logger.warning("%s: %s to copy a checkpoint; it is not made ahead", self.folder, room)

    def save(
        self, step: int, pieces: Iterator[Piece], own: Mapping[str, Tensor], manifest: Mapping[str, Any]
    ) -> Path:
        """Write the checkpoint of `step` from every rank's pieces, and wait for it. Nothing is copied.

        Raises:
            CheckpointError: as `settle`.
        """
        self.settle(wait=True)
        tensors = _tensors(pieces, own)
        writing = self._launch(step, tensors, sum(self._world.gather(_bytes_of(tensors))), manifest)
        self.settle(wait=True)
        return writing.final

    def start(
        self, step: int, pieces: Iterator[Piece], own: Mapping[str, Tensor], manifest: Mapping[str, Any]
    ) -> Path:
        """Copy every rank's pieces to the host and begin to write the checkpoint of `step`. Waits for the one
        before, if that is still being written, and for memory that is still being made.

        Raises:
            CheckpointError: on every rank, if there is no room on the disk; or as `settle`.
        """
        self.settle(wait=True)
        tensors = _tensors(pieces, own)
        layout = layout_of(tensors)
        told = self._world.gather((_bytes_of(tensors), self._host.need(layout)))
        room = Room.of([need for _, need in told], self._world.rank)
        if room.enough and told[self._world.rank][1].lacking:
            self._host.make(layout)
        copied = self._host.fill(tensors)
        writing = self._launch(
            step, tensors if copied is None else copied, sum(size for size, _ in told), manifest
        )
        if copied is None:
            if room.enough:
                logger.warning("%s: not copied; the step waits for the disk", writing.final)
            elif room.first:
                logger.warning("%s: %s to copy it; the step waits for the disk", writing.final, room)
            writing.read.wait()
        return writing.final

    def _launch(
        self, step: int, tensors: Mapping[str, Tensor], payload: int, manifest: Mapping[str, Any]
    ) -> _Writing:
        """Begin to write `tensors`, of `payload` bytes on all ranks, which stay as they are until `read`."""
        final = self.folder / f"{PREFIX}{step:09d}"
        aside = self.folder / f"{ASIDE}{final.name}"
        if self._world.device.type == "cuda":
            torch.cuda.current_stream(self._world.device).synchronize()
        needed = payload + SPARE_BYTES
        self._begin(final, aside, needed)
        writing = self._writing = _Writing(final, aside, needed, manifest)
        # Not a daemon: a process that ends waits for its file.
        threading.Thread(target=self._write, args=(writing, tensors), name=f"write {final.name}").start()
        return writing

    def settle(self, *, wait: bool = False, at_most: float = math.inf) -> Path | None:
        """Look after a checkpoint that is being written: called every step, it costs a message only while
        there is one.

        Args:
            wait: until it is on the disk, or for `at_most` seconds.
        Returns:
            The checkpoint that has become complete since the last call; None where none has.
        Raises:
            CheckpointError: on every rank, if one could not write (full disk, no permission). Nothing of the
                attempt is left, and earlier checkpoints are untouched.
        """
        writing = self._writing
        if writing is None:
            return None
        begun = time.monotonic()
        while True:
            late = time.monotonic() - begun >= at_most
            states = self._world.gather((writing.done.is_set(), writing.problem, late))
            if any(problem for _, problem, _ in states):
                writing.cancelled.set()
            if all(done for done, *_ in states):
                break
            # Rank 0's clock decides for all.
            if not wait or states[0][-1]:
                return None
            writing.done.wait(0.2)
        self._writing = None
        self._raise(writing, [problem for _, problem, _ in states if problem])
        return writing.final

    @property
    def busy(self) -> bool:
        """Whether `settle` knows of a checkpoint that is being written; the same on every rank."""
        return self._writing is not None

    def leave(self) -> None:
        """Called by one rank alone, on its way out with an error: gives a checkpoint that is being written a
        while to become complete, and then up."""
        self._host.stop()
        writing = self._writing
        if writing is not None and not writing.done.wait(LEAVE_S):
            writing.cancelled.set()

    def _begin(self, final: Path, aside: Path, needed: int) -> None:
        problem = None
        if self._world.is_main:
            try:
                # Nothing is being written now, so all that is there was left.
                _sweep(self.folder)
                aside.mkdir(parents=True)
                free = shutil.disk_usage(aside).free
                if free < needed:
                    aside.rmdir()
                    problem = f"the disk has {free:,} bytes left"
            except OSError as error:
                problem = str(error)
        problem = self._world.from_main(problem)
        self._raise(_Writing(final, aside, needed, {}), [problem] if problem else [])

    def _write(self, writing: _Writing, tensors: Mapping[str, Tensor]) -> None:
        """In a thread of every rank. The ranks meet on the disk: messages belong to the run itself."""
        rank = self._world.rank
        try:
            record = write_rank_file(writing.aside / rank_file_name(rank), tensors)
            writing.read.set()
            write_flushed(writing.aside / _receipt(rank), json.dumps(record.as_json()))
            if self._world.is_main:
                self._finish(writing, self._receipts(writing))
        except OSError as error:
            writing.problem = f"rank {rank}: {error}"
        except Exception as error:
            logger.exception("%s: a thread that writes failed", writing.final)
            writing.problem = f"rank {rank}: {type(error).__name__}: {error}"
        finally:
            writing.read.set()
            writing.done.set()

    def _receipts(self, writing: _Writing) -> dict[str, FileRecord]:
        """What every rank wrote, when all have; on the main rank."""
        found: dict[str, FileRecord] = {}
        for rank in range(self._world.size):
            path = writing.aside / _receipt(rank)
            while not path.exists():
                if writing.cancelled.wait(0.05):
                    raise OSError(f"{path}: {_ABANDONED}")
                if not writing.aside.is_dir():
                    # Its rank may have written it: it will not write it again.
                    raise OSError(f"{writing.aside}: deleted while it was written")
            content = ""
            while not content.endswith("}"):
                # On a network disk, the name can be seen before the content.
                content = path.read_text()
                if writing.cancelled.wait(0 if content else 0.05):
                    raise OSError(f"{path}: {_ABANDONED}")
            found[rank_file_name(rank)] = FileRecord.from_json(json.loads(content))
        return found

    def _finish(self, writing: _Writing, files: Mapping[str, FileRecord]) -> None:
        aside, final = writing.aside, writing.final
        listed = {name: record.as_json() for name, record in files.items()}
        content = {"format": FORMAT, **writing.manifest, "files": listed}
        write_flushed(aside / MANIFEST, json.dumps(content, indent=1) + "\n")
        for rank in range(self._world.size):
            (aside / _receipt(rank)).unlink()
        sync_folder(aside)
        if final.exists():
            # A damaged checkpoint, before which the run resumed, or a save of this step that is repeated.
            remove_folder(final)
        os.rename(aside, final)
        # Until this is on the disk, nothing that came before may go.
        sync_folder(self.folder)
        try:
            self._point_to(final)
            self._retire(final)
        except (OSError, CheckpointError) as error:
            logger.warning("%s: complete; what follows a save was not done: %s", final, error)

    def _point_to(self, newest: Path) -> None:
        latest = self.folder / f"{ASIDE}{LATEST}"
        write_flushed(latest, newest.name + "\n")
        os.replace(latest, self.folder / LATEST)
        sync_folder(self.folder)

    def _retire(self, newest: Path) -> None:
        complete = [c for c in find_checkpoints(self.folder) if c.step not in self._milestones]
        for old in complete[self._keep :]:
            if old.path == newest:
                continue
            remove_checkpoint(old)

    def _raise(self, writing: _Writing, problems: list[str]) -> None:
        """On every rank, if there are problems; removes what was written."""
        if not problems:
            return
        problems = [problem for problem in problems if not problem.endswith(_ABANDONED)] or problems
        if self._world.is_main:
            shutil.rmtree(writing.aside, ignore_errors=True)
        self._world.barrier()
        self._world.raise_everywhere(
            CheckpointError(
                f"{writing.final}: the checkpoint cannot be written, {writing.needed:,} bytes needed, "
                f"{_free_told(self.folder)} free: {'; '.join(problems)}. Earlier checkpoints are whole"
            )
        )


def _sweep(folder: Path) -> None:
    """Delete what interrupted saves and deletions left, and name what stays."""
    for leftover in folder.glob(f"{ASIDE}*"):
        try:
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning("%s: left by an interrupted save, and cannot be deleted: %s", leftover, error)


def _tensors(pieces: Iterator[Piece], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a rank's file holds, by the keys that it has there."""
    return {piece.key: piece.values for piece in pieces} | {f"own/{n}": value for n, value in own.items()}


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())


def _receipt(rank: int) -> str:
    return f"rank_{rank:05d}.written"


def _set_aside(checkpoint: Checkpoint) -> Path:
    """Keep a damaged checkpoint for whoever wants to look at it, where it is not taken for one."""
    place = checkpoint.path.with_name(f"{DAMAGED}{checkpoint.path.name}")
    shutil.rmtree(place, ignore_errors=True)
    os.rename(checkpoint.path, place)
    return place


def _free_told(folder: Path) -> str:
    """For a message: a disk that fails may not tell."""
    try:
        return f"{free_bytes(folder):,}"
    except OSError:
        return "unknown"


def free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_flushed(path: Path, text: str) -> None:
    """Write a small text file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
