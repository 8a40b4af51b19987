"""Disks that refuse: one system call of a save fails, or all from one on."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")
"""Of the os module: what changes a folder, or says that a change is on the disk."""


class _File:
    """A file that is written, whose writes are counted too."""

    def __init__(self, file: Any, count: Callable[[str], None]) -> None:
        self._file = file
        self._count = count

    def write(self, content: Any) -> int:
        self._count("write")
        return self._file.write(content)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class BadDisk:
    """Counts the system calls that write beneath a folder; those that `fails` names raise.

    Args:
        fails: by the number of the call, from 0.
    """

    def __init__(self, fails: Callable[[int], bool], error: int = errno.EIO) -> None:
        self.calls: list[str] = []
        self._fails = fails
        self._error = error

    def _count(self, name: str) -> None:
        number = len(self.calls)
        self.calls.append(name)
        if self._fails(number):
            raise OSError(self._error, f"{os.strerror(self._error)} ({name}, call {number})")

    @contextmanager
    def mounted(self) -> Iterator[BadDisk]:
        plain_open = io.open

        def opened(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if not set("wax+") & set(mode) or not isinstance(path, str | Path):
                return plain_open(path, mode, *arguments, **named)
            self._count("open")
            return _File(plain_open(path, mode, *arguments, **named), self._count)

        def counted(name: str) -> Callable[..., Any]:
            plain = getattr(os, name)

            def call(*arguments: Any, **named: Any) -> Any:
                self._count(name)
                return plain(*arguments, **named)

            return call

        with ExitStack() as stack:
            for name in CALLS:
                stack.enter_context(patch.object(os, name, counted(name)))
            stack.enter_context(patch.object(io, "open", opened))
            yield self
