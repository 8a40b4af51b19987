"""Stopping a run from outside: SIGTERM, SIGUSR1 and Ctrl-C let the step end, save and leave.

A signal that reaches one rank stops all of them after the same step. Nothing is added to the step's
collectives for this, and no device is waited for: a rank that was asked writes the number of the next step
into the key-value store of the process group, and every rank looks there after every step. The gradient's
norm, which every rank reads before the optimiser moves, cannot be known before the writer has taken part in
that next step, and the writer wrote before: so all see the number, and stop one step after the one of the
signal.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch._C._distributed_c10d import Store

from tim_ds.trainer.world import World

STOPPED = 75
"""Exit code of a run that was stopped and that the same command continues (EX_TEMPFAIL of sysexits.h)."""
AT_ONCE = 130
"""Exit code after a second Ctrl-C, as shells number it."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SAME_PRESS_S = 1.0
"""Within this time a second SIGINT is the same press of Ctrl-C: terminals and launchers both pass it on."""

_KEY = "last_step"
_END = b"\0"


class RunStopped(Exception):
    """Raised on every rank when a run that was asked to stop has saved: the same command continues it."""


class StopSignals:
    """What this process was asked to do. Signals are read by a thread: the main thread may be inside a
    collective, where Python runs no handler."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Name of the first signal; None as long as nobody asked."""
        self._pressed: float | None = None

    @property
    def requested(self) -> bool:
        return self.reason is not None

    @contextmanager
    def installed(self) -> Iterator[StopSignals]:
        """Listen to signals; what listened before does so again at the end. For the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python writes every signal's number there from the handler itself, whatever the main thread does.
        earlier_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        earlier = {number: signal.signal(number, _nothing) for number in SIGNALS}
        thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(earlier_fd)
            # Not by closing the pipe: loader processes may hold it open.
            os.write(writer, _END)
            thread.join()
            os.close(writer)
            os.close(reader)

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                if number == _END[0]:
                    return
                if number in SIGNALS:
                    self._take(signal.Signals(number))

    def _take(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if received is signal.SIGINT:
            if self._pressed is not None and now - self._pressed > SAME_PRESS_S:
                _say("second Ctrl-C: ended at once, nothing is saved")
                os._exit(AT_ONCE)
            self._pressed = self._pressed or now
        if self.reason is None:
            self.reason = received.name
            again = "; Ctrl-C once more ends it at once" if received is signal.SIGINT else ""
            _say(f"{received.name}: the run stops after this step or the next, and saves{again}")


def _nothing(*_: object) -> None:
    """A handler has to be there, or the signal acts as the system has it."""


def _say(message: str) -> None:
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


class StopAgreement:
    """Makes a request of any rank stop all ranks after the same step.

    Args:
        signals: requests that reach this rank.
        world: the ranks; every one asks after every step.
    """

    def __init__(self, signals: StopSignals, world: World) -> None:
        self._signals = signals
        self._world = world
        self._store: Store | None = world.store("stop") if world.size > 1 else None
        self.reason = ""
        """Who was asked by what, once `before_first` or `after` said yes."""

    def before_first(self) -> bool:
        """Whether to stop before the first step. A collective."""
        asked = self._world.gather(self._signals.reason)
        self.reason = next((_told(reason, rank) for rank, reason in enumerate(asked) if reason), "")
        return bool(self.reason)

    def after(self, step: int) -> bool:
        """Whether the run stops after `step`, which has just ended here; the same answer on every rank."""
        if self._store is None:
            self.reason = _told(self._signals.reason, 0) if self._signals.reason else ""
            return self._signals.requested
        if not self._store.check([_KEY]):
            if self._signals.reason is not None:
                # Ranks that were asked in the same step write the same number; one reason stays.
                self._store.set(_KEY, f"{step + 1} {_told(self._signals.reason, self._world.rank)}")
            return False
        last, _, self.reason = self._store.get(_KEY).decode().partition(" ")
        return step >= int(last)


def _told(reason: str, rank: int) -> str:
    return f"{reason} on rank {rank}"
