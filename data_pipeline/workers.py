"""Loader processes and signals: a scheduler or a terminal signals every process of a job, and a run that is
to finish its step and save needs its loaders for as long."""

from __future__ import annotations

import atexit
import os
import signal
from functools import partial
from multiprocessing.sharedctypes import RawValue
from typing import Any


class OutliveSignals:
    """A `worker_init_fn`: the process ends with its parent, not by a signal that asks the parent to stop.

    At the parent's exit, where loader processes that are left over are terminated and waited for, they listen
    again.
    """

    def __init__(self) -> None:
        self._parent_exits = RawValue("b", 0)
        # After multiprocessing's own, which waits, and so before it.
        atexit.register(partial(setattr, self._parent_exits, "value", 1))

    def __call__(self, worker: int) -> None:
        # A forked process would write its signals into the pipe that its parent reads.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, *_: Any) -> None:
        if self._parent_exits.value:
            os._exit(0)


outlive_signals = OutliveSignals()
