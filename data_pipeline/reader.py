"""Reading samples by offset: one `pread` a sample, checked before it is used."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline import schema
from data_pipeline.errors import DataError
from data_pipeline.index import Index


@dataclass(frozen=True, eq=False)
class StoredSample:
    """One sample as it was stored. latent: [C, h, w]; states: [n, E] or None."""

    latent: Tensor
    states: Tensor | None
    label: int | None


class ShardReader:
    """Reads the samples of an index. Holds one file descriptor a shard, opened on first use.

    Descriptors are opened by the process that reads, so a reader may be handed to forked or spawned workers.
    """

    def __init__(self, index: Index) -> None:
        self.index = index
        self._files: dict[int, int] = {}
        self._pid = os.getpid()

    def read(self, sample_id: int) -> StoredSample:
        """Sample `sample_id` with its checksum, shapes and values checked.

        Raises:
            DataError: naming shard and key, if anything about it is wrong.
        """
        index, columns = self.index, self.index.columns
        where = index.name(sample_id)
        span = self._span(sample_id, where)
        latent = schema.decode_tensor(self._member(span, sample_id, "latent"), "latent", where)
        schema.check_latent(latent, where)
        expected = [index.channels, int(columns["height"][sample_id]), int(columns["width"][sample_id])]
        if list(latent.shape) != expected:
            raise DataError(
                f"{where}: latent: the index says {expected}, the shard holds {list(latent.shape)}"
            )
        if not index.has_text:
            return StoredSample(latent, None, int(columns["label"][sample_id]))
        states = schema.decode_tensor(self._member(span, sample_id, "text"), "states", where)
        schema.check_states(states, where)
        expected = [int(columns["text_length"][sample_id]), index.text_width]
        if list(states.shape) != expected:
            raise DataError(
                f"{where}: text states: the index says {expected}, the shard holds {list(states.shape)}"
            )
        return StoredSample(latent, states, None)

    def read_meta(self, sample_id: int) -> dict[str, Any]:
        """The JSON member of a sample (empty when it has none).

        Raises:
            DataError: naming shard and key, if it is damaged.
        """
        where = self.index.name(sample_id)
        data = self._member(self._span(sample_id, where), sample_id, "meta")
        return schema.decode_meta(data, where) if data else {}

    def _span(self, sample_id: int, where: str) -> bytes:
        columns = self.index.columns
        size, offset = int(columns["size"][sample_id]), int(columns["offset"][sample_id])
        try:
            span = os.pread(self._file(int(columns["shard"][sample_id])), size, offset)
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error})") from error
        if len(span) != size:
            raise DataError(
                f"{where}: expected {size} bytes at {offset}, received {len(span)}: the shard is truncated"
            )
        if zlib.crc32(span) != int(columns["crc32"][sample_id]):
            raise DataError(f"{where}: checksum differs from the index: the shard is damaged")
        return span

    def _member(self, span: bytes, sample_id: int, name: str) -> bytes:
        columns = self.index.columns
        start = int(columns[f"{name}_start"][sample_id])
        return span[start : start + int(columns[f"{name}_size"][sample_id])]

    def _file(self, shard: int) -> int:
        if self._pid != os.getpid():
            # A forked worker inherits the parent's descriptors; it opens its own so that close() stays local.
            self._files, self._pid = {}, os.getpid()
        if shard not in self._files:
            self._files[shard] = os.open(self.index.folder / self.index.shards[shard], os.O_RDONLY)
        return self._files[shard]

    def close(self) -> None:
        """Close the descriptors that this process opened."""
        if self._pid == os.getpid():
            for descriptor in self._files.values():
                os.close(descriptor)
        self._files = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index, "_files": {}, "_pid": -1}


def image_tokens(latent: Tensor, patch_size: int) -> Tensor:
    """Latent [C, H, W] -> float32 tokens [h*w, p*p*C], row-major.

    The last axis runs (row in patch, col in patch, channel), as `PackedBatch.latents_TC` states.
    """
    channels, height, width = latent.shape
    p = patch_size
    x = latent.to(torch.float32).reshape(channels, height // p, p, width // p, p)
    return x.permute(1, 3, 2, 4, 0).reshape((height // p) * (width // p), p * p * channels)


def same_grid(grids: np.ndarray, sample_id: int) -> np.ndarray:
    """Ids of the samples with the grid of `sample_id`, itself included."""
    return np.flatnonzero((grids == grids[sample_id]).all(axis=1))
