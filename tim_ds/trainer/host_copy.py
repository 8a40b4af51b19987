"""Host memory for the copy of a rank's state, from which a checkpoint is written while the run goes on.

New memory costs far more than the copy itself: the kernel clears every page when it is touched first, and on
a GPU's host it is page-locked besides. A run has a thread do that beside its steps, before a save needs it.
The memory is made once, in slabs, with huge pages where the kernel gives them.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SLAB_BYTES = 1 << 28
"""Pieces share memory of at most this size. PyTorch rounds page-locked memory up to a power of two, which
costs a slab little and a piece up to twice its size."""
TOUCHED_BYTES = 1 << 24
"""Touched in one call, which leaves Python's lock to others: a few milliseconds."""
ALIGNMENT = 64
BEHIND_NICE = 15

CGROUPS = Path("/sys/fs/cgroup")
# By the controllers field of /proc/self/cgroup: folder, and where limit, use and what of it can be reclaimed
# are told. Version 2 leaves the field empty.
_CGROUP_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class Place(NamedTuple):
    """What the memory for one tensor has to be."""

    shape: torch.Size
    dtype: torch.dtype
    locked: bool
    """Page-locked, for a tensor of a GPU."""

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


Layout = Mapping[str, Place]
"""By key of the tensor."""


class HostNeed(NamedTuple):
    """What one rank says before memory is made."""

    host: str
    lacking: int
    """Bytes that its copy needs and does not have yet."""
    available: int | None
    """Bytes that its host can give; None where the system does not tell."""


@dataclass(frozen=True, slots=True)
class Room:
    """Whether the host of a rank has room for the copies of all its ranks."""

    lacking: int
    available: int | None
    first: bool
    """Whether this rank is the first of its host, which speaks for it."""

    @property
    def enough(self) -> bool:
        return self.available is None or self.lacking <= self.available

    @classmethod
    def of(cls, needs: list[HostNeed], rank: int) -> Room:
        mine = [number for number, need in enumerate(needs) if need.host == needs[rank].host]
        told = [need.available for number in mine if (need := needs[number]).available is not None]
        return cls(
            lacking=sum(needs[number].lacking for number in mine),
            available=min((value for value in told if value is not None), default=None),
            first=mine[0] == rank,
        )

    def __str__(self) -> str:
        return f"{self.lacking:,} bytes of host memory are needed, {self.available or 0:,} are available"


class HostCopy:
    """The memory of one rank.

    Args:
        device: of the rank. Tensors of a GPU are copied into page-locked memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layout: Layout = {}
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def need(self, layout: Layout) -> HostNeed:
        """What has to be made for `layout`. Waits for memory that is being made."""
        self.wait()
        lacking = 0 if self._layout == layout else _bytes_of(layout)
        return HostNeed(socket.gethostname(), lacking, available_bytes())

    def make(self, layout: Layout, *, behind: bool = False) -> None:
        """Make the memory for `layout`, in place of what there is.

        Args:
            behind: by a thread; the call returns at once.
        """
        self.wait()
        self._layout, self._buffers = {}, {}
        if behind:
            self._thread = threading.Thread(target=self._make_behind, args=(layout,), name="host memory")
            self._thread.start()
        else:
            self._make(layout)

    def wait(self) -> None:
        """Until no thread makes memory."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def stop(self) -> None:
        """Let a thread that makes memory end early."""
        self._stop.set()

    def fill(self, values: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """A copy of `values`, valid until the next one; None where there is no memory for it."""
        self.wait()
        if self._layout != layout_of(values):
            return None
        for key, value in values.items():
            self._buffers[key].copy_(value.detach(), non_blocking=True)
        return dict(self._buffers)

    def _make_behind(self, layout: Layout) -> None:
        # On Linux a thread has a priority of its own: where cores are scarce, the step goes first.
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BEHIND_NICE)
        self._make(layout)

    def _make(self, layout: Layout) -> None:
        buffers: dict[str, Tensor] = {}
        try:
            with ExitStack() as stack:
                if self._device.type == "cuda":
                    # A thread begins on the first GPU.
                    stack.enter_context(torch.cuda.device(self._device))
                for offsets, size, locked in _slabs(layout):
                    if self._stop.is_set():
                        return
                    slab = self._slab(size, locked=locked)
                    for key, offset in offsets.items():
                        place = layout[key]
                        flat = slab[offset : offset + place.nbytes]
                        buffers[key] = flat.view(place.dtype).view(place.shape)
        except (MemoryError, OSError, RuntimeError) as error:
            logger.warning("no host memory for the copy of a checkpoint: %s", str(error).splitlines()[0])
            return
        self._layout, self._buffers = layout, buffers

    def _slab(self, size: int, *, locked: bool) -> Tensor:
        if locked:
            # Locking touches it.
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A kernel without huge pages says so.
            with suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        slab = torch.frombuffer(memory, dtype=torch.uint8)
        for start in range(0, size, TOUCHED_BYTES):
            if self._stop.is_set():
                return slab
            # One byte a page: all of it would pass through the caches that the step uses.
            slab[start : start + TOUCHED_BYTES : mmap.PAGESIZE].zero_()
        return slab


def layout_of(values: Mapping[str, Tensor]) -> Layout:
    return {key: Place(value.shape, value.dtype, value.is_cuda) for key, value in values.items()}


def _bytes_of(layout: Layout) -> int:
    return sum(place.nbytes for place in layout.values())


def _slabs(layout: Layout) -> Iterator[tuple[dict[str, int], int, bool]]:
    """Offsets of the tensors, slab by slab, the size of each slab, and whether it is page-locked."""
    for locked in (False, True):
        offsets: dict[str, int] = {}
        end = 0
        for key, place in layout.items():
            if place.locked is not locked:
                continue
            size = -(-place.nbytes // ALIGNMENT) * ALIGNMENT
            if offsets and end + size > SLAB_BYTES:
                yield offsets, end, locked
                offsets, end = {}, 0
            offsets[key] = end
            end += size
        if offsets:
            yield offsets, end, locked


def available_bytes() -> int | None:
    """Host memory that this process can still take: what the system has, or what the limits of its control
    groups leave (containers, jobs of a scheduler), whichever is less; None where neither is told."""
    told = []
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                told.append(1024 * int(line.split()[1]))
    with suppress(OSError):
        told += _left_by_groups(Path("/proc/self/cgroup").read_text())
    return min(told, default=None)


def _left_by_groups(groups: str) -> Iterator[int]:
    """Bytes that each memory limit of these control groups, and of those around them, leaves."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in _CGROUP_FILES:
            continue
        mount, limit, use, reclaimable = _CGROUP_FILES[controllers]
        group = PurePosixPath(path.lstrip("/"))
        for place in (group, *group.parents):
            folder = CGROUPS / mount / place
            # Absent where no limit is set ("max" is no number), and of groups outside a container.
            with suppress(OSError, ValueError):
                left = int((folder / limit).read_text()) - int((folder / use).read_text())
                statistics = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                yield left + int(statistics.get(reclaimable, 0))
