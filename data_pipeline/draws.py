"""Random draws by counter: what a sample gets depends on (seed, stream, epoch, sample), not on who asks.

Philox is a counter-based generator, so each (epoch, sample) owns a block of the stream that no other draw
reaches. The same sample in the same epoch therefore gets the same numbers on any rank, worker or resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np

from data_pipeline.permutation import derive_key, mix


@lru_cache(maxsize=256)
def _stream_key(stream: str) -> int:
    return int.from_bytes(blake2b(stream.encode(), digest_size=8).digest(), "little")


def generator(seed: int, stream: str, epoch: int, sample_id: int) -> np.random.Generator:
    """Generator of one sample's draws.

    Args:
        seed: of the run, 0 to 2^64 - 1.
        stream: name of the purpose ("noise", "caption_dropout"); different names never share numbers.
        epoch: pass over the data, at least 0.
        sample_id: row in the index, at least 0.

    Raises:
        ValueError: if a number is negative or beyond 64 bits.
    """
    for name, value in (("seed", seed), ("epoch", epoch), ("sample_id", sample_id)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}: expected 0 to 2^64 - 1, received {value}")
    # Philox counts in the lowest word; epoch and sample sit above it, 2^128 blocks from their neighbours.
    counter = np.array([0, 0, sample_id, epoch], dtype=np.uint64)
    key = np.array([seed, _stream_key(stream)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def uniforms(seed: int, streams: Sequence[str], epoch: int, sample_ids: np.ndarray) -> np.ndarray:
    """One draw from [0, 1) for each stream and sample, float64 [streams, samples]: as `generator`, but for
    many samples at once.

    A hash of the sample's number instead of a generator for each, which takes 20 us to set up.
    """
    keys = np.array([derive_key(seed, stream, epoch) for stream in streams])
    words = mix(mix(np.asarray(sample_ids).astype(np.uint64)) ^ keys[:, None])
    return (words >> np.uint64(11)) * 2.0**-53
