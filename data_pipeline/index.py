"""The index beside the shards: one row a sample, so that order is planned on integers and read by offset.

`index.safetensors` holds one array a column (64 bytes a sample, plus its key) and a JSON header. It is built
in one pass over any webdataset tars that follow `schema.py`, whoever wrote them:

    python -m data_pipeline.index FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from data_pipeline import schema
from data_pipeline.errors import DataError

INDEX_NAME = "index.safetensors"
FORMAT = 1

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
    # Latent cells, caption length in tokens (0 for class data), class label (-1 for text data).
    "height": np.uint16,
    "width": np.uint16,
    "text_length": np.int32,
    "label": np.int32,
    "key_end": np.int64,
}


@dataclass(frozen=True, eq=False)
class Index:
    """All samples of a folder of shards, in shard order; a sample's id is its row."""

    folder: Path
    shards: tuple[str, ...]
    shard_bytes: tuple[int, ...]
    channels: int
    text_width: int
    """Width of a text state; 0 for class data."""
    num_classes: int
    """Classes, whose number is also the null label; 0 for text data."""
    columns: dict[str, np.ndarray]
    key_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.columns["shard"])

    @property
    def has_text(self) -> bool:
        return self.text_width > 0

    @cached_property
    def hash(self) -> str:
        """Hash of every row and of the shards' names and sizes: the identity of the data's order."""
        digest = blake2b(digest_size=16)
        digest.update(json.dumps(self._header(), sort_keys=True).encode())
        for name in COLUMNS:
            digest.update(np.ascontiguousarray(self.columns[name]).data)
        digest.update(np.ascontiguousarray(self.key_bytes).data)
        return digest.hexdigest()

    def key(self, sample_id: int) -> str:
        ends = self.columns["key_end"]
        start = int(ends[sample_id - 1]) if sample_id else 0
        return self.key_bytes[start : int(ends[sample_id])].tobytes().decode()

    def name(self, sample_id: int) -> str:
        """shard:key, as messages name a sample."""
        return f"{self.shards[int(self.columns['shard'][sample_id])]}:{self.key(sample_id)}"

    def grids(self, patch_size: int) -> np.ndarray:
        """(height, width) in tokens of every sample: int64 [N, 2].

        Raises:
            DataError: if a latent is no multiple of `patch_size`.
        """
        cells = np.stack([self.columns["height"], self.columns["width"]], axis=1).astype(np.int64)
        bad = np.flatnonzero((cells % patch_size).any(axis=1))
        if len(bad):
            h, w = cells[bad[0]]
            raise DataError(
                f"{self.folder}: {len(bad)} of {len(self)} latents are no multiple of the patch size "
                f"{patch_size}, first {self.name(int(bad[0]))} with {h}x{w} cells; "
                f"prepare the data with sides that are"
            )
        return cells // patch_size

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "shards": list(self.shards),
            "shard_bytes": list(self.shard_bytes),
            "channels": self.channels,
            "text_width": self.text_width,
            "num_classes": self.num_classes,
        }

    def save(self) -> Path:
        """Write the index beside its shards (aside, then renamed). Returns its path."""
        path = self.folder / INDEX_NAME
        aside = path.with_name(f".{INDEX_NAME}.partial")
        # One metadata entry: safetensors writes several in an order that changes from run to run.
        metadata = {"header": json.dumps({**self._header(), "hash": self.hash})}
        try:
            aside.write_bytes(save({**self.columns, "key_bytes": self.key_bytes}, metadata=metadata))
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        return path


def load_index(folder: Path | str) -> Index:
    """The index of a folder of shards.

    Raises:
        DataError: if it is missing, unreadable, altered, or older than its shards.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    rebuild = f"build it with `python -m data_pipeline.index {folder}`"
    if not path.is_file():
        raise DataError(f"{path}: no index; prepare the data, or if the shards are there {rebuild}")
    try:
        with safe_open(path, framework="numpy") as stored:
            header = json.loads((stored.metadata() or {})["header"])
            if header.get("format") != FORMAT:
                raise DataError(
                    f"{path}: index format {header.get('format')}, expected {FORMAT}; re{rebuild}"
                )
            columns = {name: stored.get_tensor(name) for name in COLUMNS}
            key_bytes = stored.get_tensor("key_bytes")
            index = Index(
                folder=folder,
                shards=tuple(header["shards"]),
                shard_bytes=tuple(header["shard_bytes"]),
                channels=header["channels"],
                text_width=header["text_width"],
                num_classes=header["num_classes"],
                columns=columns,
                key_bytes=key_bytes,
            )
            recorded_hash = header["hash"]
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise DataError(f"{path}: not a readable index ({error!r}); re{rebuild}") from error
    if index.hash != recorded_hash:
        raise DataError(f"{path}: its content does not match its hash; re{rebuild}")
    for name, size in zip(index.shards, index.shard_bytes, strict=True):
        shard = folder / name
        if not shard.is_file():
            raise DataError(f"{shard}: missing, but the index lists it; restore it or re{rebuild}")
        if shard.stat().st_size != size:
            raise DataError(
                f"{shard}: expected {size} bytes, received {shard.stat().st_size}: it changed after the "
                f"index was built; restore it or re{rebuild}"
            )
    return index


@dataclass
class _Row:
    """Members of one sample while its tar is walked: extension -> (first byte, size)."""

    key: str
    members: dict[str, tuple[int, int]]


def build_index(folder: Path | str, *, num_classes: int | None = None, progress: bool = True) -> Index:
    """Index every `*.tar` of `folder` in one pass; nothing is written (see `Index.save`).

    Args:
        folder: of webdataset shards, in any layout that `schema.py` describes.
        num_classes: of class data; null takes the largest label plus one.
        progress: whether to show a bar.

    Raises:
        DataError: if there are no shards, a tar is truncated, or a sample breaks the schema.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder}: expected webdataset shards (*.tar), received none")
    rows: dict[str, list[int]] = {name: [] for name in COLUMNS}
    keys = bytearray()
    channels: dict[int, str] = {}
    widths: dict[int, str] = {}
    for number, path in enumerate(tqdm(paths, desc="index", unit="shard", disable=not progress)):
        _index_shard(path, number, rows, keys, channels, widths)
    if not rows["shard"]:
        raise DataError(f"{folder}: {len(paths)} shards without a single sample")
    for what, found in (("channels of a latent", channels), ("width of the text states", widths)):
        if len(found) > 1:
            listed = ", ".join(f"{n} ({name})" for n, name in sorted(found.items()))
            raise DataError(f"{folder}: expected one {what}, received {listed}")
    columns = {name: np.asarray(rows[name], dtype=dtype) for name, dtype in COLUMNS.items()}
    text_width = next(iter(widths))
    largest = int(columns["label"].max())
    if text_width == 0 and num_classes is not None and largest >= num_classes:
        raise DataError(f"{folder}: label {largest} with num_classes {num_classes}")
    return Index(
        folder=folder,
        shards=tuple(p.name for p in paths),
        shard_bytes=tuple(p.stat().st_size for p in paths),
        channels=next(iter(channels)),
        text_width=text_width,
        num_classes=0 if text_width else (num_classes or largest + 1),
        columns=columns,
        key_bytes=np.frombuffer(bytes(keys), dtype=np.uint8),
    )


def _index_shard(
    path: Path,
    number: int,
    rows: dict[str, list[int]],
    keys: bytearray,
    channels: dict[int, str],
    widths: dict[int, str],
) -> None:
    seen: set[str] = set()
    with open(path, "rb") as stream:
        for row in _walk(path, stream):
            where = f"{path.name}:{row.key}"
            if row.key in seen:
                raise DataError(f"{where}: key given twice, or its members are not next to each other")
            seen.add(row.key)
            _append(rows, keys, row, number, stream, where, channels, widths)


def _append(
    rows: dict[str, list[int]],
    keys: bytearray,
    row: _Row,
    number: int,
    stream: BinaryIO,
    where: str,
    channels: dict[int, str],
    widths: dict[int, str],
) -> None:
    members = row.members
    if schema.LATENT not in members:
        raise DataError(f"{where}: expected a member {schema.LATENT}, received {sorted(members)}")
    if (schema.TEXT in members) == (schema.LABEL in members):
        raise DataError(
            f"{where}: expected either {schema.TEXT} or {schema.LABEL}, received {sorted(members)}"
        )
    offset = min(start for start, _ in members.values())
    end = max(start + size for start, size in members.values())
    stream.seek(offset)
    span = stream.read(end - offset)

    def cut(extension: str) -> tuple[int, int, bytes]:
        if extension not in members:
            return 0, 0, b""
        start, size = members[extension]
        start -= offset
        return start, size, span[start : start + size]

    latent_start, latent_size, latent_bytes = cut(schema.LATENT)
    text_start, text_size, text_bytes = cut(schema.TEXT)
    meta_start, meta_size, _ = cut(schema.META)
    latent = schema.decode_tensor(latent_bytes, "latent", where)
    schema.check_latent(latent, where)
    channels.setdefault(latent.shape[0], where)
    text_length, width, label = 0, 0, -1
    if text_size:
        states = schema.decode_tensor(text_bytes, "states", where)
        schema.check_states(states, where)
        text_length, width = states.shape
    else:
        label = schema.decode_label(cut(schema.LABEL)[2], where)
    widths.setdefault(width, where)
    keys.extend(row.key.encode())
    values = {
        "shard": number,
        "offset": offset,
        "size": end - offset,
        "crc32": zlib.crc32(span),
        "latent_start": latent_start,
        "latent_size": latent_size,
        "text_start": text_start,
        "text_size": text_size,
        "meta_start": meta_start,
        "meta_size": meta_size,
        "height": latent.shape[1],
        "width": latent.shape[2],
        "text_length": text_length,
        "label": label,
        "key_end": len(keys),
    }
    for name, value in values.items():
        rows[name].append(value)


def _walk(path: Path, stream: BinaryIO) -> Iterator[_Row]:
    """Yield one `_Row` a run of members that share a key."""
    current: _Row | None = None
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
                schema.check_key(key)
                if current is None or key != current.key:
                    if current is not None:
                        yield current
                    current = _Row(key, {})
                if extension in current.members:
                    raise DataError(f"{path.name}:{key}: member {extension} given twice")
                current.members[extension] = (info.offset_data, info.size)
                if info.offset_data + info.size > path.stat().st_size:
                    _truncated(path, key)
            # A complete tar ends in two zero blocks; without them the last member may be cut off.
            if path.stat().st_size < tar.offset + 1024:
                _truncated(path, current.key if current else "")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: not a readable tar ({error}); copy or prepare it again") from error
    if current is not None:
        yield current


def _truncated(path: Path, key: str) -> NoReturn:
    raise DataError(f"{path}: truncated tar, damaged at {key!r}; copy or prepare it again")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: build and save the index of a folder."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.index", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--num-classes", type=int, default=None, help="class data: labels are below this number"
    )
    options = parser.parse_args(arguments)
    try:
        index = build_index(options.folder, num_classes=options.num_classes)
        path = index.save()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {len(index)} samples in {len(index.shards)} shards, hash {index.hash}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
