"""Stopping a run from outside: SIGTERM, SIGUSR1, Ctrl-C, and a launcher that ends, let the step end, save and
leave.

A signal that reaches one rank stops all of them after the same step. Nothing is added to the step's
collectives for this, and no device is waited for: a rank that was asked writes the number of the next step
into the key-value store of the process group, and every rank looks there after every step. The gradient's
norm, which every rank reads before the optimiser moves, cannot be known before the writer has taken part in
that next step, and the writer wrote before: so all see the number, and stop one step after the one of the
signal.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from torch._C._distributed_c10d import Store

from tim_ds.trainer.world import World

STOPPED = 75
"""Exit code of a run that was stopped and that the same command continues (EX_TEMPFAIL of sysexits.h)."""
AT_ONCE = 130
"""Exit code after a second Ctrl-C, as shells number it."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SAME_PRESS_S = 1.0
"""Within this time a second SIGINT is the same press of Ctrl-C: terminals and launchers both pass it on."""

LOOK_EVERY_S = 2.0
"""How often a rank looks whether its launcher is still there."""

REMOTE = "deepspeed.launcher.launch"
"""The launcher that is on every host of a run."""
LAUNCHERS = ("deepspeed", "deepspeed.launcher.runner", REMOTE)
"""Programs and modules that start ranks and should be there as long as these run. A shell is none of them: a
run may outlive the terminal that started it. Nor is torchrun: the ranks' key-value store ends with it, which
the watch notices."""

_KEY = "last_step"
_END = b"\0"


class RunStopped(Exception):
    """Raised on every rank when a run that was asked to stop has saved: the same command continues it."""


class StopSignals:
    """What this process was asked to do. Signals are read by a thread: the main thread may be inside a
    collective, where Python runs no handler."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """Name of the first signal, or what else asked; None as long as nothing did."""
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
        arguments = (reader, launchers())
        thread = threading.Thread(target=self._listen, args=arguments, name="signals", daemon=True)
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

    def _listen(self, reader: int, above: list[int]) -> None:
        while True:
            while not select.select([reader], [], [], LOOK_EVERY_S if above else None)[0]:
                if (gone := ended(above)) is not None:
                    above = []
                    self._ask("end of the launcher", f"the launcher (process {gone}) has ended")
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
        again = "; Ctrl-C once more ends it at once" if received is signal.SIGINT else ""
        self._ask(received.name, received.name, again)

    def _ask(self, reason: str, told: str, more: str = "") -> None:
        if self.reason is None:
            self.reason = reason
            _say(f"{told}: the run stops after this step or the next, and saves{more}")


def launchers(process: int | None = None) -> list[int]:
    """What a process was started by and should be there as long as it runs, nearest first: deepspeed is two
    processes, one above the other; where it starts several hosts the second is elsewhere, and what is here of
    it is the connection that it came by. Empty without a launcher, and on systems without /proc."""
    found: list[int] = []
    above = _parent(process or os.getpid())
    while above is not None and _is_launcher(above):
        found.append(above)
        above = _parent(above)
    if found and _runs(found[-1], REMOTE):
        return found + _connection(above)
    return found


def _connection(process: int | None) -> list[int]:
    """From a process up to the ssh session without a terminal that it is part of; empty where there is none.
    A shell between the two may stay when the session ends."""
    found: list[int] = []
    while process is not None and process > 1:
        found.append(process)
        program = _arguments(process)[0]
        if program.startswith(b"sshd") and program.rstrip().endswith(b"@notty"):
            return found
        process = _parent(process)
    return []


def ended(above: list[int], process: int | None = None) -> int | None:
    """Which of the launchers of a process has ended: its children have another parent then."""
    child = process or os.getpid()
    for launcher in above:
        if _parent(child) != launcher:
            return launcher
        child = launcher
    return None


def _parent(process: int) -> int | None:
    try:
        # After the name of the program, which may hold anything: state, parent.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _is_launcher(process: int) -> bool:
    return any(_runs(process, launcher) for launcher in LAUNCHERS)


def _runs(process: int, program: str) -> bool:
    # Interpreter, its options, program or module; what the program is given comes later.
    return any(PurePath(os.fsdecode(argument)).name == program for argument in _arguments(process)[:4])


def _arguments(process: int) -> list[bytes]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]


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
