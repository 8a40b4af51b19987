"""Reading samples by offset: one read a sample, from a disk or a URL, checked before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from struct import Struct
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from data_pipeline import schema
from data_pipeline.errors import DataError
from data_pipeline.index import Index, Row
from data_pipeline.storage import Remote, Storage, open_storage

T = TypeVar("T")

REMOTE_READS = 16
"""Requests under way at once, where a read waits for a network."""

KNOWN_LAYOUTS = 4096
"""Distinct headers of members that a reader keeps parsed."""

DTYPES = {**schema.FLOATS, "I32": torch.int32}
"""safetensors' names of the types that the schema allows."""

HEADER_BYTES = Struct("<Q")
"""How a member begins: the length of its header."""


class _Place(NamedTuple):
    """Where a tensor lies in its member."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    count: int


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

    def copied(self) -> StoredSample:
        """The same with tensors that own their memory."""

        def own(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.clone()

        return replace(
            self,
            latent=self.latent.clone(),
            states=own(self.states),
            flipped=own(self.flipped),
            more_states=tuple(states.clone() for states in self.more_states),
            features=own(self.features),
            flipped_features=own(self.flipped_features),
        )

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
        self.storage = storage or open_storage(index.folder)
        self._layouts: dict[tuple[int, bytes], tuple[_Place, ...]] = {}

    def read(self, sample_id: int) -> StoredSample:
        """Sample `sample_id`, with its checksum and shapes checked.

        The values were found finite when the index was built, and the checksum says that they are the same.

        Raises:
            DataError: naming shard and key, if anything about it is wrong.
        """
        return self._read(self.index.rows([sample_id])[0])

    def read_all(self, sample_ids: Sequence[int]) -> list[StoredSample | DataError]:
        """`read` of each sample, or the error it raised. From a URL, several are fetched at once."""
        return self._each(self._read_or_error, self.index.rows(sample_ids))

    def _each(self, read: Callable[[Row], T], rows: Sequence[Row]) -> list[T]:
        if not isinstance(self.storage, Remote) or len(rows) < 2:
            return [read(row) for row in rows]
        with ThreadPoolExecutor(min(REMOTE_READS, len(rows))) as threads:
            return list(threads.map(read, rows))

    def _read_or_error(self, row: Row) -> StoredSample | DataError:
        try:
            return self._read(row)
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
        row = self.index.rows([sample_id])[0]
        return self._member(self._span(row), row, name)

    def _read(self, row: Row) -> StoredSample:
        index, span = self.index, self._span(row)
        latent, flipped = self._latents(span, row)
        if not index.has_text:
            return StoredSample(latent, None, row.label, flipped)
        states, *more = self.captions(_cut(span, row, "text"), row)
        return StoredSample(latent, states, None, flipped, tuple(more))

    def captions(self, member: memoryview, row: Row) -> tuple[Tensor, ...]:
        """States of every caption in the text member of a sample, as views of it.

        Raises:
            DataError: naming shard and key, if they are not what the index says.
        """
        width, tensors = self.index.text_width, self._tensors(member, row)
        found = [self._checked(tensors, "states", (row.text_length, width), row)]
        while (further := tensors.get(name := schema.variant("states", len(found)))) is not None:
            # The index knows the length of the first caption only.
            found.append(self._checked(tensors, name, (further.shape[0], width), row))
        return tuple(found)

    def _latents(self, span: memoryview, row: Row) -> tuple[Tensor, Tensor | None]:
        """The latent, and that of the mirror image where it is stored."""
        tensors = self._tensors(_cut(span, row, "latent"), row)
        expected = (self.index.channels, row.height, row.width)
        latent = self._checked(tensors, "latent", expected, row)
        return latent, self._checked(tensors, "flipped", expected, row) if "flipped" in tensors else None

    def _checked(self, tensors: dict[str, Tensor], name: str, expected: tuple[int, ...], row: Row) -> Tensor:
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != expected or tensor.dtype not in schema.FLOAT_DTYPES:
            received = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise DataError(
                f"{self.index.name(row.sample_id)}: {name}: the index says a floating {list(expected)}, "
                f"the shard holds {received}"
            )
        return tensor

    def _tensors(self, member: memoryview, row: Row) -> dict[str, Tensor]:
        """All tensors of a member, as views of it.

        A header says where everything lies, and few differ: safetensors parses and checks each of them once.
        """
        size = len(member)
        length = 8 + (HEADER_BYTES.unpack_from(member)[0] if size >= HEADER_BYTES.size else 0)
        # The same header belongs to members of one size; with another, safetensors says what is wrong.
        head = (size, member[: min(length, size)].tobytes())
        places = self._layouts.get(head)
        if places is None:
            tensors = self._parsed(bytes(member), row)
            places = _places(bytes(member[8:length]), length, tensors)
            if places is None:
                return tensors
            if len(self._layouts) == KNOWN_LAYOUTS:
                self._layouts.clear()
            self._layouts[head] = places
        return {
            name: torch.frombuffer(member, dtype=dtype, count=count, offset=offset).view(shape)
            for name, dtype, shape, offset, count in places
        }

    def _parsed(self, member: bytes, row: Row) -> dict[str, Tensor]:
        try:
            return load(member)
        except (SafetensorError, ValueError, KeyError) as error:
            where = self.index.name(row.sample_id)
            raise DataError(f"{where}: not a readable safetensors member ({error})") from error

    def _span(self, row: Row) -> memoryview:
        name, size = self.index.name, row.size
        try:
            span = self.storage.read_range(self.index.shards[row.shard], row.offset, size)
        except OSError as error:
            raise DataError(f"{name(row.sample_id)}: cannot be read ({error})") from error
        if len(span) != size:
            raise DataError(
                f"{name(row.sample_id)}: expected {size} bytes at {row.offset}, received {len(span)}: "
                f"the shard is truncated"
            )
        if crc32(span) != row.crc32:
            raise DataError(f"{name(row.sample_id)}: checksum differs from the index: the shard is damaged")
        return span

    def _member(self, span: memoryview, row: Row, name: str) -> bytes:
        return bytes(_cut(span, row, name))

    def close(self) -> None:
        """Close what this process opened."""
        self.storage.close()


def _cut(span: memoryview, row: Row, name: str) -> memoryview:
    """The bytes of a member within its sample's; empty where it is absent."""
    if name == "latent":
        start, size = row.latent_start, row.latent_size
    elif name == "text":
        start, size = row.text_start, row.text_size
    else:
        start, size = row.meta_start, row.meta_size
    return span[start : start + size]


def _places(header: bytes, start: int, tensors: dict[str, Tensor]) -> tuple[_Place, ...] | None:
    """Where the `tensors` of a member lie whose data begin at byte `start`; None where views will not do:
    a tensor without values, or one that does not begin at a multiple of its width."""
    stored = schema.tensor_places(header, start)
    places = []
    for name, tensor in tensors.items():
        dtype, offset = DTYPES.get(stored[name][0]), stored[name][1]
        if dtype is None or tensor.numel() == 0 or offset % dtype.itemsize:
            return None
        places.append(_Place(name, dtype, tuple(tensor.shape), offset, tensor.numel()))
    return tuple(places)
