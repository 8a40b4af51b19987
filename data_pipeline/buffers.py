"""Memory that is used again: a fresh page costs about as much as what is read into it."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor

KEPT = 8
"""Blocks that wait to be used again; more than a few appear only where somebody held many packs at once."""


class Buffers:
    """Gives out memory of this process and takes it back when the last tensor that sees it is gone.

    Whoever holds a tensor, or a view of it, holds its memory: then the next request gets other memory.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._largest = 0

    def take(self, size: int) -> Tensor:
        """uint8 [size], not initialised."""
        self._largest = max(self._largest, size, 1)
        block = self._reusable(size)
        # A tensor's storage holds this array, and only this array holds the block.
        lent = np.frombuffer(block, np.uint8, size)
        weakref.finalize(lent, _give_back, self._free, block).atexit = False
        return torch.from_numpy(lent)

    def _reusable(self, size: int) -> np.ndarray:
        while self._free:
            block = self._free.pop()
            if len(block) >= size:
                return block
        # As large as the largest so far, so that blocks soon fit every request.
        return np.empty(self._largest, np.uint8)

    def __getstate__(self) -> dict[str, int]:
        return {}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__()


def _give_back(free: list[np.ndarray], block: np.ndarray) -> None:
    if len(free) < KEPT:
        free.append(block)
