"""What a run prints when nobody reads it any more: the launcher, the connection, the terminal or the `tee`
that did has ended, or the disk of a log is full. A run is worth more than its words: they are dropped, where
Python would raise in the middle of a step."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


class _Unread(io.FileIO):
    def write(self, data: bytes, /) -> int:  # type: ignore[override]  # any buffer, as the base class has it
        try:
            return super().write(data)
        except OSError:
            # EPIPE of a pipe, EIO of a terminal that was closed, ENOSPC.
            return memoryview(data).nbytes


@contextmanager
def outlasting_readers() -> Iterator[None]:
    """Standard output and error of this process go on without a reader. What a test or a notebook has put in
    their place stays."""
    earlier = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _outlasting(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _outlasting(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = earlier


def _outlasting(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = _Unread(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        # python -u has no buffer in between.
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]  # as Python's own
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
