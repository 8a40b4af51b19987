"""What loader processes hand to the training process, in shared memory that is used again.

torch makes new shared memory for every tensor that a worker sends, and its pages cost several times what it
costs to read and check a pack. Here a worker copies all tensors of an item into one slab, and fills it again
once the training process has let go of everything that came in it. The first parcel in a slab brings the slab
along; the others say which it is.
"""

from __future__ import annotations

import os
import pickle
import weakref
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

ALIGNMENT = 64
"""Tensors begin at multiples of so many bytes of a slab."""

ROOM = 1.125
"""Size of a new slab over that of what it is made for: packs differ a little."""


@dataclass(frozen=True, eq=False)
class Parcel:
    """An item on its way: everything but its tensors pickled, its tensors in a slab."""

    receiver: int
    slab: int
    content: bytes
    places: tuple[tuple[int, int], ...]
    """First byte and size of each tensor."""
    memory: Tensor | None
    """The slab, in its first parcel."""

    def pin_memory(self) -> Any:
        """The item in page-locked memory: torch's thread for that calls it."""
        return self.open().pin_memory()

    def open(self) -> Any:
        """The item, its tensors views of the slab. Once only, in the process that made the `Parcels`."""
        return _receivers[self.receiver].open(self)


class Parcels:
    """Slabs of several workers, and whether somebody in the training process still sees them.

    Args:
        workers: processes that send.
        slabs: of each; an item that finds none free is sent as torch sends it.
    """

    def __init__(self, workers: int, slabs: int) -> None:
        self._slabs = slabs
        self._number = next(_numbers)
        # One byte a slab, set by its worker and cleared by the training process: no lock is needed.
        self._taken = RawArray("B", workers * slabs)
        self._memory: dict[int, np.ndarray] = {}
        _receivers[self._number] = self

    def send(self, item: Any) -> Any:
        """In a worker: `item` as a parcel, or itself where no slab is free."""
        worker = get_worker_info()
        assert worker is not None  # only workers have this object to send with
        first = worker.id * self._slabs
        slab = next((n for n in range(first, first + self._slabs) if not self._taken[n]), None)
        if slab is None:
            return item
        content, buffers = _dump(item)
        places, end = [], 0
        for values in buffers:
            places.append((end, len(values)))
            end += -(-len(values) // ALIGNMENT) * ALIGNMENT
        fresh = None
        if slab not in self._memory or len(self._memory[slab]) < end:
            fresh = torch.empty(max(int(end * ROOM), 1), dtype=torch.uint8).share_memory_()
            self._memory[slab] = fresh.numpy()
        memory = self._memory[slab]
        for (start, size), values in zip(places, buffers, strict=True):
            memory[start : start + size] = values
        self._taken[slab] = 1
        return Parcel(self._number, slab, content, tuple(places), fresh)

    def open(self, parcel: Parcel) -> Any:
        """In the training process: the item of a parcel."""
        if parcel.memory is not None:
            self._memory[parcel.slab] = parcel.memory.numpy()
        # Every tensor's storage holds this array, and nothing else does.
        lent = np.frombuffer(self._memory[parcel.slab].data, np.uint8)
        weakref.finalize(lent, _give_back, self._taken, parcel.slab, os.getpid()).atexit = False
        buffers = [lent[start : start + size] for start, size in parcel.places]
        return pickle.loads(parcel.content, buffers=buffers)

    def __getstate__(self) -> dict[str, Any]:
        return {"_slabs": self._slabs, "_number": self._number, "_taken": self._taken, "_memory": {}}


class InParcels(Dataset[Any]):
    """The items of another data set, sent in parcels by the workers of a loader."""

    def __init__(self, items: Dataset[Any], parcels: Parcels) -> None:
        self._items = items
        self._parcels = parcels

    def __getitem__(self, number: int) -> Any:
        return self._parcels.send(self._items[number])


_numbers = count()
_receivers: weakref.WeakValueDictionary[int, Parcels] = weakref.WeakValueDictionary()
"""Those of this process, for parcels that arrive in a thread of torch's."""


class _Pickler(pickle.Pickler):
    """Leaves the values of tensors out of the pickle."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.requires_grad:
            return NotImplemented
        if obj.device.type != "cpu" or obj.layout is not torch.strided:
            return NotImplemented
        values = obj.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(values.data), obj.dtype, tuple(obj.shape))


def _give_back(taken: Any, slab: int, owner: int) -> None:
    # A forked process has copies of everything; when they go, its parent may still look at the slab.
    if os.getpid() == owner:
        taken[slab] = 0


def _dump(item: Any) -> tuple[bytes, list[np.ndarray]]:
    """The pickle of an item, and the values of its tensors: uint8 [n] each."""
    stream, buffers = BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(item)
    return stream.getvalue(), [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


def _tensor(values: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(values).view(dtype).view(shape)
