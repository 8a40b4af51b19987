"""How kernels are launched: what decides their speed, and nothing of a result but the order of its sums.

`SCHEDULES` is what runs. Nothing is chosen at run time, and no length decides how a kernel is compiled:
`python -m tim_kernels.bench --tune` times `CANDIDATES` on a device, compares what they compute, and says
which entry of `SCHEDULES` to change to what. All of them are compiled ahead of time
(`python -m tim_kernels.aot --candidates`), so that none can fail on the device first.

`use_schedule` and `use_stages` put others in force within a block, for that and for tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple


class Rows(NamedTuple):
    """Of a kernel that works on one row at a time."""

    stages: int
    """One row is worked on while `stages` - 1 are under way to shared memory; 1: each is read in its turn."""
    columns_per_warp: int
    """A program has the fewest warps, a power of two, that leave each no more columns of a row."""


class Heads(NamedTuple):
    """Of a kernel that works on some heads of one token at a time."""

    stages: int
    elements: int
    """Most of a program at a time: it takes as many heads as fit."""
    num_warps: int


class Tile(NamedTuple):
    """Of attention's tangent: queries and keys at a time, stages of the pipeline along the keys, warps."""

    rows: int
    keys: int
    stages: int
    num_warps: int


class Run(NamedTuple):
    """Of all kernels that go along rows, and of the chunks that sums over a segment are cut into."""

    rows: int
    """Most rows of a program; small packs are cut finer."""


Schedule = Rows | Heads | Tile | Run

RUN, WIDE_TILE = "rows of a program", "varlen_attention_jvp wide"

SCHEDULES: dict[str, Schedule] = {
    # Two warps for 1152 columns: the last 128 of a bfloat16 row are then two a thread, and 32 bits is the
    # least that an asynchronous copy to shared memory takes.
    "modulated_layer_norm forward": Rows(3, 640),
    "modulated_layer_norm backward": Rows(3, 640),
    "modulated_layer_norm_jvp": Rows(3, 640),
    "gated_residual forward": Rows(1, 512),
    "gated_residual backward": Rows(1, 512),
    "gated_residual_jvp": Rows(1, 512),
    # 36 elements a thread; half of it where sums are kept in registers too. One warp: every sum stays within
    # it. Tokens wait in shared memory, because registers have no room for them.
    "qk_norm_rope forward": Heads(3, 1152, 1),
    "qk_norm_rope backward": Heads(3, 576, 1),
    "qk_norm_rope_jvp": Heads(3, 576, 1),
    # 128 queries share what is read of the keys.
    "varlen_attention_jvp": Tile(128, 32, 3, 8),
    # Heads too wide for the registers of 128 queries, and float32.
    WIDE_TILE: Tile(64, 16, 2, 8),
    # The partial sums of 32 rows, written and read once, are 4 % of the bytes of the norm's backward.
    RUN: Run(32),
}

_STAGES = (1, 2, 3, 4)
_NORM = tuple(Rows(*x) for x in product(_STAGES, (640, 320)))
_RESIDUAL = tuple(Rows(*x) for x in product((1, 2, 3), (512,)))
_HEADS_SUMMED = (*(Heads(x, 576, 1) for x in _STAGES), Heads(1, 1152, 2), Heads(3, 1152, 2))

CANDIDATES: dict[str, tuple[Schedule, ...]] = {
    "qk_norm_rope backward": _HEADS_SUMMED,
    "modulated_layer_norm backward": _NORM,
    "varlen_attention_jvp": (
        Tile(128, 32, 3, 8), Tile(128, 32, 2, 8), Tile(128, 64, 2, 8), Tile(128, 64, 3, 8),
        Tile(64, 32, 3, 4), Tile(64, 64, 2, 4), Tile(64, 64, 3, 4), Tile(64, 64, 2, 8),
    ),
    "qk_norm_rope forward": (
        *(Heads(*x, 1) for x in product(_STAGES, (1152, 576))), Heads(3, 1152, 2), Heads(1, 1152, 2)
    ),
    "modulated_layer_norm forward": _NORM,
    RUN: (Run(16), Run(32), Run(64), Run(128)),
    "qk_norm_rope_jvp": _HEADS_SUMMED,
    "modulated_layer_norm_jvp": _NORM,
    "gated_residual forward": _RESIDUAL,
    "gated_residual backward": _RESIDUAL,
    "gated_residual_jvp": _RESIDUAL,
}  # fmt: skip
"""What is timed for each entry, today's among it; the most telling first."""

_forced: dict[str, Schedule] = {}


def schedule_of(kernel: str) -> Any:
    """The schedule in force for a kernel, of the kind that stands in `SCHEDULES`."""
    return _forced[kernel] if kernel in _forced else SCHEDULES[kernel]


@contextmanager
def use_schedule(kernel: str, schedule: Schedule) -> Iterator[None]:
    """Launch a kernel this way within the block; an inner block wins.

    Raises:
        ValueError: if there is no such kernel, or the schedule is not of its kind.
    """
    if kernel not in SCHEDULES or type(schedule) is not type(SCHEDULES[kernel]):
        known = ", ".join(f"{name!r} ({type(x).__name__})" for name, x in SCHEDULES.items())
        raise ValueError(f"use_schedule: expected one of {known}, received {kernel!r} and {schedule}")
    before = dict(_forced)
    _forced[kernel] = schedule
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextmanager
def use_stages(stages: int) -> Iterator[None]:
    """Run every pipeline with so many stages within the block.

    Stages move loads, no sum: results are the same bits with any number, or, where the compiler lays a kernel
    out otherwise (the heads' backward), differ by a rounding. A larger difference is a fault of the pipeline.
    """
    before = dict(_forced)
    _forced.update(
        {
            kernel: schedule_of(kernel)._replace(stages=stages)
            for kernel, schedule in SCHEDULES.items()
            if not isinstance(schedule, Run)
        }
    )
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
