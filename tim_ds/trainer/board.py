"""TensorBoard's file of a run, which outlives a disk that refuses for a while."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tim_ds.eval.board import keep_board_thread_quiet

logger = logging.getLogger(__name__)

MAX_KEPT = 100_000
"""Scalars that are kept for a disk that refuses; of more, the oldest are in `metrics.jsonl` alone."""


class _Scalar(NamedTuple):
    tag: str
    value: float
    step: int


class Board:
    """Writes scalars and pictures. Scalars that a disk did not take are written, into a file of their own,
    when it takes them; pictures are not kept: `previews/` has them.

    Args:
        purge_step: what an earlier process wrote from this step on is not shown any more.
    Raises:
        OSError: from the constructor alone.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self._folder = folder
        self._unflushed: deque[_Scalar] = deque(maxlen=MAX_KEPT)
        self._refused = False
        keep_board_thread_quiet()
        self._writer: Any = self._opened(purge_step)

    def scalar(self, tag: str, value: float, step: int) -> None:
        self._unflushed.append(_Scalar(tag, value, step))
        self._try(lambda writer: writer.add_scalar(tag, value, step))

    def image(self, tag: str, image: Any, step: int) -> None:
        """uint8 [height, width, 3]."""
        self._try(lambda writer: writer.add_image(tag, image, step, dataformats="HWC"))

    def flush(self) -> None:
        """Put it on the disk; go on in a new file if the disk refused before."""
        if self._writer is None:
            self._begin_anew()
        self._try(lambda writer: writer.flush())
        if self._writer is not None:
            self._unflushed.clear()
            if self._refused:
                logger.warning("%s: written again", self._folder)
            self._refused = False

    def close(self) -> None:
        """Raises nothing."""
        if self._writer is not None:
            self._try(lambda writer: writer.close())

    def _begin_anew(self) -> None:
        """A record that was torn ends what is read of its file."""
        with suppress(OSError):
            self._writer = self._opened(self._unflushed[0].step if self._unflushed else None)
            for scalar in self._unflushed:
                self._writer.add_scalar(*scalar)

    def _opened(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=30)

    def _try(self, action: Callable[[Any], object]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            if not self._refused:
                logger.error(
                    "%s: cannot be written: %s. Scalars are kept, and written with a later save",
                    self._folder,
                    error.strerror or error,
                )
            self._refused = True
            writer, self._writer = self._writer, None
            with suppress(OSError):
                writer.close()
