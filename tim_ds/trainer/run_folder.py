"""The folder of a run while a process trains in it: nobody else does, and it is made again if deleted."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tim_ds.errors import CheckpointError
from tim_ds.trainer.checkpoint_folder import write_flushed
from tim_ds.trainer.world import World

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system without locks says: Lustre and NFS may be mounted so."""


class FolderTakenError(CheckpointError):
    """Another process trains in the folder."""


class RunFolder:
    """Held by rank 0, through a lock that ends with its process.

    Raises:
        FolderTakenError: if another process has it.
        OSError: if it cannot be made or used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._disk = path.stat().st_dev
        self._lock = self._locked()
        self._settings: dict[str, str] = {}

    def write_settings(self, name: str, text: str) -> None:
        """Write a small file, and again where the folder is made again.

        Raises:
            OSError: if it cannot be written.
        """
        write_flushed(self.path / name, text)
        self._settings[name] = text

    def hold(self) -> None:
        """Called before something is saved: whether the folder is still this process's. One that was deleted
        is made again, on the same disk: the folder beneath a disk that was unmounted is none.

        Raises:
            FolderTakenError: if it was replaced, and another process trains there.
            OSError: if it cannot be made or used.
        """
        mine = os.fstat(self._lock)
        try:
            there = (self.path / LOCK_FILE).stat()
        except FileNotFoundError:
            there = None
        if there is not None and (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
            return
        mounted_again = there is not None and there.st_ino == mine.st_ino
        place = next(p for p in (self.path, *self.path.parents) if p.exists())
        if place.stat().st_dev != self._disk and not mounted_again:
            raise OSError(f"{self.path}: its disk is not there any more; mount it again")
        self.path.mkdir(parents=True, exist_ok=True)
        former, self._lock = self._lock, self._locked()
        os.close(former)
        self._disk = self.path.stat().st_dev
        if not mounted_again:
            for name, text in self._settings.items():
                write_flushed(self.path / name, text)
            logger.warning("%s: was deleted under the run; made again", self.path)

    def release(self) -> None:
        with suppress(OSError):
            os.close(self._lock)

    def _locked(self) -> int:
        lock = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                logger.warning(
                    "%s: its file system keeps no locks (%s): a second process is kept from training there "
                    "by nothing",
                    self.path,
                    error.strerror,
                )
                return lock
            os.close(lock)
            if isinstance(error, BlockingIOError):
                raise FolderTakenError(
                    f"{self.path}: another process is training there; wait for it or choose another folder"
                ) from error
            raise
        return lock


@contextmanager
def held_by_this_run(run_dir: Path, world: World) -> Iterator[RunFolder | None]:
    """Keeps a second process from training in the folder. All ranks call it; rank 0 is given the folder.

    Raises:
        CheckpointError: on every rank, if the folder is taken or cannot be used.
    """

    def take() -> RunFolder | None:
        if not world.is_main:
            return None
        try:
            return RunFolder(run_dir)
        except OSError as error:
            raise CheckpointError(f"{run_dir}: cannot be used as a run folder: {error.strerror}") from error

    folder = world.together(take, (CheckpointError,))
    try:
        yield folder
    finally:
        if folder is not None:
            folder.release()
