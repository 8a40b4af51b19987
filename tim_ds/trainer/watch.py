"""Who is missing: a thread on every rank that names a hung, dead or failed rank and ends the job.

As soon as a rank has reached the key-value store of the launcher, before it meets the others and before
there is a process group, it writes there every few seconds where it stands: the step, the phase, and the line
of the program. Nothing passes through the collectives, which are what a missing rank blocks. Once all ranks
have written, rank 0 looks at all of them, and the others at rank 0. A rank is

    dead     when it wrote nothing for `dead_after` seconds;
    hung     when no rank has come to another phase, or moved within one, for `hung_after` seconds: the one
             that is furthest behind;
    failed   when it said so on its way out.

Whoever finds one writes it down for all, and every process ends with that sentence and exit code `LOST`. The
host of the store may itself vanish, with its connections open: a question is then never answered nor refused,
and a second thread on every rank ends the process after `dead_after` seconds.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from tim_ds.trainer.meeting import Connection, RankAbsentError
from tim_ds.trainer.world import World

LOST = 70
"""Exit code where another rank is missing (EX_SOFTWARE of sysexits.h); the last checkpoint is whole."""

HUNG_AFTER_S = 1800.0
"""Default: longer than a first step that compiles, a preview, or a save to a slow disk."""
DEAD_AFTER_S = 60.0
"""Default: the thread that writes needs only an instant of the interpreter, whatever the step does."""
LONGEST_INTERVAL_S = 5.0

UNEVEN_PHASES = ("encoders",)
"""Phases that ranks enter a different number of times."""

_VERDICT = "verdict"


@dataclass(eq=False)
class Watch:
    """Watches the ranks from `start` to `close`; without other ranks it does nothing.

    Args:
        hung_after: seconds without progress of any rank.
        dead_after: seconds without a sign of life of one rank.
        before_end: called before the process ends; the time it takes is added.
        end: ends the process, from a thread, whatever the main thread is in.
        world: the ranks, as soon as they have a process group.
    """

    hung_after: float = HUNG_AFTER_S
    dead_after: float = DEAD_AFTER_S
    before_end: Callable[[], None] | None = None
    end: Callable[[int], Any] = os._exit
    world: World = field(default_factory=World)
    _rank: int = 0
    _size: int = 1
    _place: tuple[int, int, str] = (0, 0, "start")
    """Step, phases entered in it, name of the phase."""
    _moves: int = 0
    """Things done within phases."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _question: object | None = None
    """What the store was asked, as long as it has not answered."""
    _main: int = 0
    _count: int = 0

    @property
    def interval(self) -> float:
        return min(LONGEST_INTERVAL_S, self.dead_after / 6, self.hung_after / 6)

    def start(self, connection: Connection) -> None:
        """Begin to watch; called by every rank from its main thread, before it meets the others."""
        self._rank, self._size = connection.rank, connection.size
        self._main = threading.get_ident()
        self._store = connection.own_store("watch")
        self._store.set_timeout(timedelta(seconds=self.dead_after))
        # Before the rank meets the others: who has met them has left a sign, and is dead if no more follow.
        self._write_beat()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        arguments = (self._thread,)
        threading.Thread(target=self._guard, args=arguments, name="watch of the store", daemon=True).start()

    def enter(self, phase: str) -> None:
        """This rank comes to a phase of its step."""
        if phase not in UNEVEN_PHASES:
            step, entered, _ = self._place
            self._place = (step, entered + 1, phase)

    def moved(self) -> None:
        """This rank gets on within its phase, for as long as that takes; the others may wait for it."""
        self._moves += 1

    def begin_step(self, step: int) -> None:
        self._place = (step, 0, "between steps")

    def close(self) -> None:
        """Stop watching. Called by all ranks when none needs another any more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failed(self, error: BaseException) -> None:
        """This rank leaves alone, with an error: tell the others, in time for them to read it.

        An error of the communication is what the others meet when one rank is gone: then the rank that is
        missing is waited for to be named, and this process ends with its name.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if is_communication(error):
            # The thread finds a dead rank in this time, or reads who it was, and ends the process.
            thread.join(self.dead_after + 4 * self.interval)
        self._judge(f"rank {self._rank} failed: {type(error).__name__}: {error}")
        self._stop.set()
        thread.join()
        # Rank 0 usually keeps the store that the others read this from.
        time.sleep(0.0 if self._rank else 3 * self.interval)

    def _run(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        progress: tuple[Any, float] = (None, time.monotonic())
        watched = [0] if self._rank else list(range(1, self._size))
        keys = [_beat(rank) for rank in watched]
        all_came = False
        while not self._stop.wait(self.interval):
            try:
                with self._asking():
                    self._write_beat()
                    told = self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else ""
                    all_came = all_came or self._store.check(keys)
                    beats = self._store.multi_get(keys) if all_came and not told else []
            except (RuntimeError, dist.DistError) as error:
                if self._stop.is_set():
                    return None
                return self._finish(
                    "rank 0, or the launcher, has ended without a word: the key-value store that it keeps "
                    f"does not answer ({str(error).splitlines()[0]})"
                )
            if told:
                return self._finish(told)
            if not all_came:
                continue
            now = time.monotonic()
            for rank, raw in zip(watched, beats, strict=True):
                value = raw.decode()
                if rank not in seen or seen[rank][0] != value:
                    seen[rank] = (value, now)
            lost = [rank for rank in watched if now - seen[rank][1] > self.dead_after]
            if lost:
                told = "; ".join(_described(rank, seen[rank][0]) for rank in lost)
                self._judge(f"no sign of life for {self.dead_after:g} s: {told}")
            elif self._rank == 0:
                values = {rank: json.loads(value) for rank, (value, _) in seen.items()}
                values[0] = self._beat()
                places = {rank: (*value["place"], value["moves"]) for rank, value in values.items()}
                if places != progress[0]:
                    progress = (places, now)
                elif now - progress[1] > self.hung_after:
                    self._judge(_hung(values, self.hung_after))
        return None

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self._question = object()
        try:
            yield
        finally:
            self._question = None

    def _guard(self, thread: threading.Thread) -> None:
        """End this process where the thread waits for the store in vain. Also while `close` waits for it."""
        question, waited = None, 0.0
        while thread.is_alive():
            thread.join(self.interval)
            if self._question is None or self._question is not question:
                question, waited = self._question, 0.0
                continue
            # Not by the clock: a machine that stood still was not asked for so long.
            waited += self.interval
            if waited >= self.dead_after:
                address = os.environ.get("MASTER_ADDR", "unknown")
                return self._finish(
                    f"no sign of life for {self.dead_after:g} s of the host of rank 0, or of the launcher "
                    f"({address}): the key-value store there does not answer"
                )
        return None

    def _beat(self) -> dict[str, Any]:
        step, entered, phase = self._place
        frame = sys._current_frames().get(self._main)
        where = traceback.extract_stack(frame)[-1] if frame is not None else None
        return {
            "count": self._count,
            "place": [step, entered, phase],
            "moves": self._moves,
            "line": f"{where.filename}:{where.lineno} in {where.name}" if where is not None else "",
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def _write_beat(self) -> None:
        self._count += 1
        self._store.set(_beat(self._rank), json.dumps(self._beat()))

    def _judge(self, verdict: str) -> None:
        """Write the verdict down for every rank; the first one stays."""
        with suppress(RuntimeError, dist.DistError), self._asking():
            self._store.compare_set(_VERDICT, "", verdict)

    def _finish(self, verdict: str) -> None:
        """End this process with the verdict."""
        lines = [f"error (rank {self._rank}): {verdict}"]
        frame = sys._current_frames().get(self._main)
        if frame is not None and f"rank {self._rank} " in verdict:
            lines.append("this rank is at\n" + "".join(traceback.format_stack(frame)).rstrip())
        with suppress(OSError):
            print("\n".join(lines), file=sys.stderr, flush=True)
        if self.before_end is not None:
            self.before_end()
        self.end(LOST)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or self.world.shared_error is error:
            self.enter("end")
            try:
                self.world.barrier()
            except Exception as alone:
                self.failed(alone)
                raise
        elif isinstance(error, Exception) and not isinstance(error, RankAbsentError):
            self.failed(error)
        self.close()


def is_communication(error: BaseException) -> bool:
    """Whether an error says that other ranks cannot be reached."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection"))
    )


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _described(rank: int, beat: str | dict[str, Any]) -> str:
    value = json.loads(beat) if isinstance(beat, str) else beat
    step, _, phase = value["place"]
    return (
        f"rank {rank} (process {value['pid']} on {value['host']}), last seen in {phase} after step {step}, "
        f"at {value['line']}"
    )


def _hung(values: dict[int, dict[str, Any]], seconds: float) -> str:
    """The ranks that are furthest behind; where none is, those that are elsewhere than most; or all."""
    places = {rank: tuple(value["place"][:2]) for rank, value in values.items()}
    last = min(places.values())
    chosen = [rank for rank, place in sorted(places.items()) if place == last]
    where = "the others wait for"
    if len(chosen) == len(values):
        line, count = Counter(value["line"] for value in values.values()).most_common(1)[0]
        where = "all in the same phase"
        if len(values) > count > len(values) // 2:
            chosen = [rank for rank in chosen if values[rank]["line"] != line]
            where += f", the others at {line}"
    told = "; ".join(_described(rank, values[rank]) for rank in chosen)
    return f"no rank has advanced for {seconds:g} s, {where}: {told}"
