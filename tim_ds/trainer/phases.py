"""Where the time of a step goes: seconds of each phase, measured without slowing the step.

On a CUDA device a phase is the time between two events of its stream, read only when the log waits for the
device anyway. Phases of the host (waiting for data, saving) are taken by the clock; they can run beside the
device's, so shares of a step need not add up to one. On a CPU everything is taken by the clock.

What cannot be separated is not split by guess: with `derivative: paired` and `dde` dF/dt is carried by the
forward itself, and the phase is called `forward_and_derivative`. With `jvp` the network's calls without
gradient are timed inside the forward and taken off it. The gradients' reduction over the ranks is part of
`backward`. Under activation checkpointing, so is the second forward of the blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

HOST_PHASES = ("data_wait", "encoders", "save", "preview")
"""Taken by the clock on every device: they wait for the host, or for the device themselves. Encoders run
while data are waited for, and hand their results to the host."""


class PhaseClock:
    """Sums the seconds of phases between two logs.

    A phase inside another is taken off the outer one, so that every second counts once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, str | None, Any, Any]] = []
        """Name, name of the phase around it, start and end."""
        self._open: list[str] = []
        self.entered: Callable[[str], None] | None = None
        """Told the name of every phase when it begins."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        if self.entered is not None:
            self.entered(name)
        start = self._mark(name)
        try:
            yield
        finally:
            self._open.pop()
            self._record(name, outer, start, self._mark(name))

    def watch(self, network: nn.Module, name: str, *, inside: str) -> None:
        """Time the calls of `network` without gradient, in the phase `inside`, as a phase of their own."""
        starts: list[Any] = []

        def before(*_: Any) -> None:
            starts.clear()
            if self._open[-1:] == [inside] and not torch.is_grad_enabled():
                starts.append(self._mark(name))

        def after(*_: Any) -> None:
            if starts:
                self._record(name, inside, starts.pop(), self._mark(name))

        network.register_forward_pre_hook(before)
        network.register_forward_hook(after)

    def _mark(self, name: str) -> Any:
        if self._device.type != "cuda" or name in HOST_PHASES:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _record(self, name: str, outer: str | None, start: Any, end: Any) -> None:
        if isinstance(start, float):
            self._add(name, outer, end - start)
        else:
            self._events.append((name, outer, start, end))

    def _add(self, name: str, outer: str | None, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call. The device must have been waited for."""
        for name, outer, start, end in self._events:
            # The last event may be younger than what the caller waited for.
            end.synchronize()
            self._add(name, outer, 1e-3 * start.elapsed_time(end))
        self._events.clear()
        taken, self._seconds = self._seconds, {}
        return taken


def over_ranks(every: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and largest of every phase over the ranks, from those of each."""
    names = [name for name in dict.fromkeys(name for found in every for name in found)]
    return {
        name: {
            "mean": sum(found.get(name, 0.0) for found in every) / len(every),
            "max": max(found.get(name, 0.0) for found in every),
        }
        for name in names
    }
