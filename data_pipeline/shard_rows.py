"""What one shard holds: its samples, checked against the schema, as rows of the index."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from zlib_ng.zlib_ng import crc32

from data_pipeline import schema
from data_pipeline.errors import DataError

TRUNCATED = "truncated tar: what follows is lost; copy or prepare it again"

COLUMNS: dict[str, Any] = {
    "shard": np.int32,
    # First byte of the sample in its shard, and how many: one read fetches the whole sample.
    "offset": np.int64,
    "size": np.int32,
    "crc32": np.uint32,
    # Member positions inside that span; a size of 0 means that the member is absent.
    "latent_start": np.int32,
    "latent_size": np.int32,
    "text_start": np.int32,
    "text_size": np.int32,
    "meta_start": np.int32,
    "meta_size": np.int32,
    # Values of a latent inside that span, and `latent_checksum` of them: a read needs to parse nothing.
    # `flipped_at` is 0 without a stored mirror image, `latent_at` where a picture lies there.
    "latent_at": np.int32,
    "latent_crc32": np.uint32,
    "flipped_at": np.int32,
    "flipped_crc32": np.uint32,
    # Of the whole text member.
    "text_crc32": np.uint32,
    # Latent cells, caption length in tokens (0 for class data), class label (-1 for text data).
    "height": np.uint16,
    "width": np.uint16,
    "text_length": np.int32,
    "label": np.int32,
    "key_end": np.int64,
}

VALUES: tuple[str, ...] = ("latent_at", "latent_crc32", "flipped_at", "flipped_crc32")
"""Columns of the values of a latent and of its mirror image."""


@dataclass
class _Row:
    """Members of one sample while its tar is walked: extension -> (first byte, size)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: str | None = None


@dataclass
class ShardRows:
    """What one tar holds. `channels`, `widths` and `dtypes` have one entry a row; `key_end` cuts `keys`."""

    columns: dict[str, np.ndarray]
    keys: np.ndarray
    channels: np.ndarray
    widths: np.ndarray
    dtypes: np.ndarray
    """safetensors' name of the latent's type; empty for a picture, and where the mirror image has another."""
    bad: list[tuple[str, str]]
    forms: dict[tuple[str, ...], str]
    """What samples leave to encode (`Index.online`), and one sample for each."""
    size: int
    """Bytes of the tar."""
    num_retries: int = 0
    """Requests for it that had to be made again."""

    def __len__(self) -> int:
        return len(self.channels)

    def key(self, row: int) -> str:
        ends = self.columns["key_end"]
        return self.keys[int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes().decode()

    def keep(self, kept: np.ndarray) -> None:
        """Drop the rows that are not `kept`."""
        ends = self.columns["key_end"]
        sizes = np.diff(ends, prepend=0)
        self.keys = self.keys[np.repeat(kept, sizes)]
        self.columns = {name: column[kept] for name, column in self.columns.items()}
        self.columns["key_end"] = np.cumsum(sizes[kept])
        self.channels, self.widths, self.dtypes = self.channels[kept], self.widths[kept], self.dtypes[kept]


def read_shard(name: str, stream: BinaryIO) -> ShardRows:
    """All samples of an open shard. What breaks the schema is left out, and named in `bad`."""
    rows: dict[str, list[int]] = {column: [] for column in COLUMNS}
    keys = bytearray()
    shapes: list[tuple[int, int]] = []
    dtypes: list[str] = []
    bad: list[tuple[str, str]] = []
    forms: dict[tuple[str, ...], str] = {}
    seen: set[str] = set()
    total = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    for row in _walk(stream, total):
        where = f"{name}:{row.key}"
        problem = row.problem
        if problem is None and row.key in seen:
            problem = "key given twice, or its members are not next to each other"
        seen.add(row.key)
        if problem is None:
            try:
                values, shape, dtype, online = _check_row(row, stream, where)
            except DataError as error:
                problem = str(error).removeprefix(f"{where}: ")
            else:
                keys.extend(row.key.encode())
                values["key_end"] = len(keys)
                for column, value in values.items():
                    rows[column].append(value)
                shapes.append(shape)
                dtypes.append(dtype)
                forms.setdefault(online, where)
        if problem is not None:
            bad.append((where, problem))
    rows["shard"] = [0] * len(shapes)
    channels, widths = np.array(shapes, dtype=np.int64).reshape(-1, 2).T
    columns = {column: np.asarray(rows[column], dtype=kind) for column, kind in COLUMNS.items()}
    return ShardRows(
        columns,
        np.frombuffer(bytes(keys), dtype=np.uint8),
        channels,
        widths,
        np.array(dtypes, dtype="U4"),
        bad,
        forms,
        size=total,
    )


class _Span:
    """The bytes of a sample, read at once, and its members in them."""

    def __init__(self, members: Mapping[str, tuple[int, int]], stream: BinaryIO) -> None:
        self.members = members
        self.offset = min(start for start, _ in members.values())
        self.size = max(start + size for start, size in members.values()) - self.offset
        stream.seek(self.offset)
        self.content = stream.read(self.size)

    def cut(self, extension: str) -> tuple[int, int, bytes]:
        """Where a member begins in the span, its size and its bytes; empty if there is none."""
        if extension not in self.members:
            return 0, 0, b""
        start, size = self.members[extension]
        start -= self.offset
        return start, size, self.content[start : start + size]


def _check_row(
    row: _Row, stream: BinaryIO, where: str
) -> tuple[dict[str, int], tuple[int, int], str, tuple[str, ...]]:
    """Columns of a sample; its channels and width of states (0 for class data); type of its latent (empty for
    a picture); what is still to be encoded.

    Raises:
        DataError: if it breaks the schema.
    """
    members = row.members
    picture = None if schema.LATENT in members else schema.picture_of(members)
    if schema.LATENT not in members and picture is None:
        raise DataError(f"{where}: expected a member {schema.LATENT}, received {sorted(members)}")
    with_caption = schema.CAPTION in members and not {schema.TEXT, schema.LABEL} & set(members)
    if (schema.TEXT in members) == (schema.LABEL in members) and not with_caption:
        raise DataError(
            f"{where}: expected either {schema.TEXT} or {schema.LABEL}, received {sorted(members)}"
        )
    span = _Span(members, stream)
    latent_start, latent_size, latent_bytes = span.cut(picture or schema.LATENT)
    text_start, text_size, text_bytes = span.cut(schema.CAPTION if with_caption else schema.TEXT)
    meta_start, meta_size, meta_bytes = span.cut(schema.META)
    if picture is not None:
        shape = schema.planned_latent(schema.decode_meta(meta_bytes, where), where)
        direct, dtype = {name: 0 for name in VALUES}, ""
    else:
        shape, direct, dtype = _check_latent(latent_bytes, latent_start, where)
    if max(shape[1:]) >= 1 << 16:
        raise DataError(f"{where}: latent: expected sides below 65536 cells, received {list(shape)}")
    form, text_length, width, label = "", 0, 0, -1
    if with_caption:
        form = "caption"
        schema.decode_caption(text_bytes, where)
        width = schema.planned_text_width(schema.decode_meta(meta_bytes, where), where)
    elif schema.TEXT in members:
        form, text_length, width = _check_text(text_bytes, meta_bytes, where)
    else:
        label = schema.decode_label(span.cut(schema.LABEL)[2], where)
    values = {
        "offset": span.offset,
        "size": span.size,
        "crc32": crc32(span.content),
        "latent_start": latent_start,
        "latent_size": latent_size,
        "text_start": text_start,
        "text_size": text_size,
        "meta_start": meta_start,
        "meta_size": meta_size,
        **direct,
        "text_crc32": crc32(text_bytes),
        "height": shape[1],
        "width": shape[2],
        "text_length": text_length,
        "label": label,
    }
    online = tuple(part for part in ("picture" if picture is not None else "", form) if part)
    return values, (shape[0], width), dtype, online


def _check_latent(stored: bytes, start: int, where: str) -> tuple[tuple[int, int, int], dict[str, int], str]:
    """Shape [C, h, w] of a stored latent, where its values and its mirror image's lie, and its type."""
    tensors = schema.decode_tensors(stored, where)
    latent = schema.take_tensor(tensors, "latent", where)
    schema.check_latent(latent, where)
    if "flipped" in tensors:
        schema.check_latent(tensors["flipped"], f"{where}: flipped")
        if tensors["flipped"].shape != latent.shape:
            raise DataError(
                f"{where}: flipped: expected the shape of the latent {list(latent.shape)}, "
                f"received {list(tensors['flipped'].shape)}"
            )
    shape = (latent.shape[0], latent.shape[1], latent.shape[2])
    return shape, *_latent_places(stored, start, shape[1:])


def _check_text(stored: bytes, meta: bytes, where: str) -> tuple[str, int, int]:
    """What is still to be encoded of a caption (`ids`, or nothing), its length, width of its states."""
    tensors = schema.decode_tensors(stored, where)
    if "ids" in tensors:
        captions = schema.take_variants(tensors, "ids", where)
        for ids in captions:
            schema.check_ids(ids, where)
        width = schema.planned_text_width(schema.decode_meta(meta, where), where)
        return "ids", len(captions[0]), width
    captions = schema.take_variants(tensors, "states", where)
    for states in captions:
        schema.check_states(states, where)
    return "", len(captions[0]), captions[0].shape[1]


def latent_checksum(values: bytes | memoryview, height: int, width: int) -> int:
    """CRC-32 of a latent's values, which vouches for its height and width too: it starts from them."""
    return crc32(values, height << 16 | width)


def _latent_places(member: bytes, start: int, size: tuple[int, int]) -> tuple[dict[str, int], str]:
    """`VALUES` of a latent member that begins at byte `start` of its sample; the type of the latent, empty
    where the mirror image has another."""
    begin = 8 + int.from_bytes(member[:8], "little")
    places = schema.tensor_places(member[8:begin], begin)
    columns: dict[str, int] = {}
    for name in ("latent", "flipped"):
        _, first, end = places.get(name, ("", 0, 0))
        columns[f"{name}_at"] = start + first if end else 0
        columns[f"{name}_crc32"] = latent_checksum(member[first:end], *size) if end else 0
    dtypes = {places[name][0] for name in ("latent", "flipped") if name in places}
    return columns, dtypes.pop() if len(dtypes) == 1 else ""


def _walk(stream: BinaryIO, total: int) -> Iterator[_Row]:
    """Yield one `_Row` a run of members that share a key. A broken tar ends in a row that says so."""
    current: _Row | None = None
    broken: str | None = None
    try:
        # The caller reads payloads from the same stream between members: tarfile seeks before each header.
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, base = info.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if current is None or key != current.key:
                    if current is not None:
                        yield current
                    current = _Row(key)
                    try:
                        schema.check_key(key)
                    except DataError as error:
                        current.problem = str(error)
                if extension in current.members:
                    current.problem = f"member {extension} given twice"
                current.members[extension] = (info.offset_data, info.size)
                if info.offset_data + info.size > total:
                    current.problem = TRUNCATED
            # A complete tar ends in two zero blocks; without them the last member may be cut off.
            if total < tar.offset + 1024:
                broken = TRUNCATED
    except (tarfile.TarError, EOFError) as error:
        broken = f"not a readable tar ({error}); copy or prepare it again"
    if current is not None:
        if broken is not None and current.problem is None:
            current.problem = broken
        yield current
    elif broken is not None:
        yield _Row("", problem=broken)
