"""A file of JSON lines that outlives a disk which refuses for a while.

What cannot be written is kept in memory, in order, and written when the disk takes it: a run of weeks does
not end, and its record gets no hole, because the disk was full for an hour.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class LineFile:
    """Appends lines. Held by one thread of one process.

    Raises:
        OSError: from the constructor alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._opened(os.O_CREAT)
        self._end = self._flushed_end = os.fstat(self._file).st_size
        self._held: deque[bytes] = deque()
        """Lines that are not in the file."""
        if self._end and os.pread(self._file, 1, self._end - 1) != b"\n":
            # Torn by an earlier process that was killed: the next line would be lost with it.
            self._held.append(b"\n")
        self._unflushed: list[bytes] = []
        """Lines that are, since the last flush: a network disk may refuse them only then."""
        self._refusal: str | None = None

    @property
    def held(self) -> int:
        """Lines that wait for the disk."""
        return len(self._held)

    def add(self, line: Mapping[str, Any]) -> None:
        self._held.append((json.dumps(line) + "\n").encode())
        self.write()

    def write(self, *, flush: bool = False) -> None:
        """Try to write what waits, and with `flush` to have it on the disk."""
        try:
            self._mend()
            while self._held:
                self._append(self._held[0])
                self._unflushed.append(self._held.popleft())
            if flush:
                self._flush()
        except OSError as error:
            reason = error.strerror or str(error)
            if reason != self._refusal:
                logger.error(
                    "%s: cannot be written: %s. Its lines are kept in memory until the disk takes them",
                    self._path,
                    reason,
                )
            self._refusal = reason
        else:
            if self._refusal is not None:
                logger.warning("%s: written again, nothing is missing", self._path)
            self._refusal = None

    def take_up(self) -> None:
        """Have the file again at its path, with all that it held, if it was deleted under the run."""
        if self._is_there():
            return
        with suppress(OSError):
            content = os.pread(self._file, self._end, 0)
            file = self._opened(os.O_CREAT)
            if os.fstat(file).st_size == 0:
                self._held.appendleft(content)
            os.close(self._file)
            self._file, self._end = file, os.fstat(file).st_size
            self._flushed_end, self._unflushed = self._end, []

    def close(self) -> None:
        """Raises nothing."""
        self.write(flush=True)
        if self._held:
            logger.error("%s: %d lines are lost: %s", self._path, len(self._held), self._refusal)
        with suppress(OSError):
            os.close(self._file)

    def _opened(self, flags: int) -> int:
        return os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | flags, 0o666)

    def _is_there(self) -> bool:
        try:
            there, mine = self._path.stat(), os.fstat(self._file)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _mend(self) -> None:
        """Cut off what a write that failed in the middle left."""
        if not self._is_there():
            raise OSError(errno.ENOENT, "it was deleted or replaced under the run")
        size = os.fstat(self._file).st_size
        if size > self._end:
            os.ftruncate(self._file, self._end)
        self._end = min(self._end, size)

    def _append(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)

    def _flush(self) -> None:
        try:
            os.fsync(self._file)
        except OSError:
            # What the disk has of them is not known: they are written again.
            self._held.extendleft(reversed(self._unflushed))
            self._unflushed = []
            self._end = self._flushed_end
            raise
        self._flushed_end, self._unflushed = self._end, []
