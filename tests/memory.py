"""Peak memory of a piece of work: of the process on Linux, and of the tensors that are made."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rose at most during `work`."""
    # Freed memory that the allocator kept would be used again without a trace.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made within it and are alive, now and at the most.

    Args:
        apart_from: tensors that exist anyway; views of them are not counted.
        collects: whether to look for garbage at every peak; slow.
    """

    def __init__(self, apart_from: Iterable[Tensor] = (), *, collects: bool = True) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._collects = collects
        self._alive: dict[int, object] = {x.untyped_storage()._cdata: x for x in apart_from}
        # What follows is collected often, at a cost that grows with what is looked at.
        if collects:
            gc.collect()
            gc.freeze()

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        if self._collects:
            gc.unfreeze()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        if self.now > self.peak and self._collects:
            # Triton's interpreter leaves cycles behind, which hold tensors that a device would have freed.
            gc.collect()
        self.peak = max(self.peak, self.now)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
