"""Permutations that are computed element by element: where position q goes needs no table and no history.

A Feistel network over the smallest square a * a >= n of an even a, keyed by a hash; a value that falls
outside [0, n) is passed through again until it falls inside, which keeps the map a bijection of [0, n). Only
integer operations that wrap at 64 bits: the same everywhere.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np

ROUNDS = 8
"""Four already scatter a large domain; eight also spread domains of 2 to 5 evenly over all orders."""

_HALF = np.uint64(32)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@lru_cache(maxsize=256)
def derive_key(seed: int, stream: str, epoch: int) -> np.uint64:
    """Key of the permutations of one purpose in one epoch."""
    digest = blake2b(f"{seed}/{stream}/{epoch}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def mix(values: np.ndarray) -> np.ndarray:
    """Scatter an array of 64-bit words: a bijection whose outputs look independent (the finaliser of
    SplitMix64)."""
    x = values ^ (values >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def permute(positions: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray | np.uint64) -> np.ndarray:
    """Where each position goes under the permutation of [0, size) that its key names.

    Shapes:
        positions: int [n]; sizes: int [n] or one; keys: uint64 [n] or one.

    Returns:
        int64 [n], `permute(q, size, key)` in [0, size), distinct for distinct q of the same size and key.

    Raises:
        ValueError: if a position lies outside its domain.
    """
    x = np.asarray(positions).astype(np.uint64)
    n = np.broadcast_to(np.asarray(sizes), x.shape).astype(np.uint64)
    key = np.broadcast_to(np.asarray(keys, dtype=np.uint64), x.shape)
    if bool((x >= n).any()):
        raise ValueError("positions: expected values from 0 to size - 1")
    # Even, because an odd side gives even permutations only: each round would be a product of odd cycles.
    side = 2 * np.ceil(np.sqrt(n.astype(np.float64)) / 2).astype(np.uint64)
    out = _feistel(x, side, key)
    outside = np.flatnonzero(out >= n)
    while len(outside):
        out[outside] = _feistel(out[outside], side[outside], key[outside])
        outside = outside[out[outside] >= n[outside]]
    return out.astype(np.int64)


def _feistel(x: np.ndarray, side: np.ndarray, key: np.ndarray) -> np.ndarray:
    left, right = x // side, x % side
    with np.errstate(over="ignore"):
        for number in range(1, ROUNDS + 1):
            word = mix(key + np.uint64(number) * _GOLDEN + (right << np.uint64(20)))
            # The high half times the side, shifted: a draw from [0, side) without a division.
            moved = left + (((word >> _HALF) * side) >> _HALF)
            left, right = right, np.where(moved >= side, moved - side, moved)
    return left * side + right
