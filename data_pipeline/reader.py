"""Reading samples by offset: one read a sample, from a disk or a URL, checked before it is used."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from data_pipeline import schema
from data_pipeline.errors import DataError
from data_pipeline.index import Index
from data_pipeline.storage import Remote, Storage, open_storage

T = TypeVar("T")

REMOTE_READS = 16
"""Requests under way at once, where a read waits for a network."""


@dataclass(frozen=True, eq=False)
class StoredSample:
    """One sample as it was stored. latent, flipped: [C, h, w]; states: [n, E], one a caption."""

    latent: Tensor
    states: Tensor | None
    """Of the first caption; None for class data."""
    label: int | None
    flipped: Tensor | None = None
    """Latent of the mirror image, where the shards hold it."""
    more_states: tuple[Tensor, ...] = ()
    """Of further captions, where the shards hold them."""
    features: Tensor | None = None
    """[tokens, Z] of an image encoder that runs while training."""
    flipped_features: Tensor | None = None
    """The same of the mirror image."""

    @property
    def num_bytes(self) -> int:
        tensors = (
            self.latent,
            self.flipped,
            self.states,
            *self.more_states,
            self.features,
            self.flipped_features,
        )
        return sum(t.nbytes for t in tensors if t is not None)


class ShardReader:
    """Reads the samples of an index. It may be handed to forked or spawned workers."""

    def __init__(self, index: Index, storage: Storage | None = None) -> None:
        self.index = index
        self._storage = storage or open_storage(index.folder)

    def read(self, sample_id: int) -> StoredSample:
        """Sample `sample_id`, with its checksum and shapes checked.

        The values were found finite when the index was built, and the checksum says that they are the same.

        Raises:
            DataError: naming shard and key, if anything about it is wrong.
        """
        return self._decode(sample_id, self._span(sample_id))

    def read_all(self, sample_ids: Sequence[int]) -> list[StoredSample | DataError]:
        """`read` of each sample, or the error it raised. From a URL, several are fetched at once."""
        return self._each(self._read_or_error, sample_ids)

    def _each(self, read: Callable[[int], T], sample_ids: Sequence[int]) -> list[T]:
        if not isinstance(self._storage, Remote) or len(sample_ids) < 2:
            return [read(i) for i in sample_ids]
        with ThreadPoolExecutor(min(REMOTE_READS, len(sample_ids))) as threads:
            return list(threads.map(read, sample_ids))

    def _read_or_error(self, sample_id: int) -> StoredSample | DataError:
        try:
            return self.read(sample_id)
        except DataError as error:
            return error

    def read_meta(self, sample_id: int) -> dict[str, Any]:
        """The JSON member of a sample (empty when it has none).

        Raises:
            DataError: naming shard and key, if it is damaged.
        """
        data = self.read_member(sample_id, "meta")
        return schema.decode_meta(data, self.index.name(sample_id)) if data else {}

    def read_member(self, sample_id: int, name: str) -> bytes:
        """Bytes of a member: `latent` (or the picture in its place), `text` (or the caption) or `meta`.

        Raises:
            DataError: naming shard and key, if the sample is damaged.
        """
        return self._member(self._span(sample_id), sample_id, name)

    def _decode(self, sample_id: int, span: bytes) -> StoredSample:
        index, columns = self.index, self.index.columns
        tensors = self._tensors(span, sample_id, "latent")
        expected = (index.channels, int(columns["height"][sample_id]), int(columns["width"][sample_id]))
        latent = self._checked(tensors, "latent", expected, sample_id)
        flipped = self._checked(tensors, "flipped", expected, sample_id) if "flipped" in tensors else None
        if not index.has_text:
            return StoredSample(latent, None, int(columns["label"][sample_id]), flipped)
        tensors = self._tensors(span, sample_id, "text")
        expected = (int(columns["text_length"][sample_id]), index.text_width)
        states = self._checked(tensors, "states", expected, sample_id)
        more: list[Tensor] = []
        while (further := tensors.get(f"states.{len(more) + 1}")) is not None:
            # The index knows the length of the first caption only.
            name, expected = f"states.{len(more) + 1}", (further.shape[0], index.text_width)
            more.append(self._checked(tensors, name, expected, sample_id))
        return StoredSample(latent, states, None, flipped, tuple(more))

    def _checked(
        self, tensors: dict[str, Tensor], name: str, expected: tuple[int, ...], sample_id: int
    ) -> Tensor:
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != expected or tensor.dtype not in schema.FLOAT_DTYPES:
            received = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise DataError(
                f"{self.index.name(sample_id)}: {name}: the index says a floating {list(expected)}, "
                f"the shard holds {received}"
            )
        return tensor

    def _tensors(self, span: bytes, sample_id: int, name: str) -> dict[str, Tensor]:
        try:
            return load(self._member(span, sample_id, name))
        except (SafetensorError, ValueError, KeyError) as error:
            where = self.index.name(sample_id)
            raise DataError(f"{where}: not a readable safetensors member ({error})") from error

    def _span(self, sample_id: int) -> bytes:
        index, columns = self.index, self.index.columns
        size, offset = int(columns["size"][sample_id]), int(columns["offset"][sample_id])
        shard = index.shards[int(columns["shard"][sample_id])]
        try:
            span = self._storage.read_range(shard, offset, size)
        except OSError as error:
            raise DataError(f"{index.name(sample_id)}: cannot be read ({error})") from error
        if len(span) != size:
            raise DataError(
                f"{index.name(sample_id)}: expected {size} bytes at {offset}, received {len(span)}: "
                f"the shard is truncated"
            )
        if zlib.crc32(span) != int(columns["crc32"][sample_id]):
            raise DataError(f"{index.name(sample_id)}: checksum differs from the index: the shard is damaged")
        return span

    def _member(self, span: bytes, sample_id: int, name: str) -> bytes:
        columns = self.index.columns
        start = int(columns[f"{name}_start"][sample_id])
        return span[start : start + int(columns[f"{name}_size"][sample_id])]

    def close(self) -> None:
        """Close what this process opened."""
        self._storage.close()


def image_tokens(latent: Tensor, patch_size: int) -> Tensor:
    """Latent [C, H, W] -> float32 tokens [h*w, p*p*C], row-major.

    The last axis runs (row in patch, col in patch, channel), as `PackedBatch.latents_TC` states. A view where
    the layout allows; copy it into place.
    """
    channels, height, width = latent.shape
    p = patch_size
    # Converted first: a copy that transposes and converts at once takes three times as long.
    x = latent.to(torch.float32)
    if p == 1:
        return x.reshape(channels, height * width).T
    x = x.reshape(channels, height // p, p, width // p, p)
    return x.permute(1, 3, 2, 4, 0).reshape((height // p) * (width // p), p * p * channels)
