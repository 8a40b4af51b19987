"""The index beside the shards: one row a sample, so that order is planned on integers and read by offset.

`index.safetensors` holds one array a column (88 bytes a sample, plus its key), a table of the sizes that
occur, and a JSON header. Loading maps it into memory: rows are paged in as they are read. It is built in one
pass over any webdataset tars that follow `schema.py`, whoever wrote them:

    python -m data_pipeline.index FOLDER
    python -m data_pipeline.index URL --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from data_pipeline.command import command
from data_pipeline.errors import DataError
from data_pipeline.packing import LengthGroups
from data_pipeline.remote_shards import RemoteShard, find_shards
from data_pipeline.shard_rows import COLUMNS, ShardRows, read_shard
from data_pipeline.storage import Remote, is_url

logger = logging.getLogger(__name__)

INDEX_NAME = "index.safetensors"
FORMAT = 3

MAX_BAD_SHARE = 0.01
"""Share of samples that may break the schema before the index is refused ..."""

MIN_BAD_LIMIT = 8
"""... but never before this many: a small set must not be lost to one bad sample."""

BAD_LISTED = 100
"""Bad samples that the index names; all are counted."""

FETCH_BYTES = 1 << 24
"""Bytes of one request while an index is fetched."""

SIZES_AT_ONCE = 16
"""Shards at a URL that are asked for their size at once."""

BAD_STOP = 100_000
"""Bad samples after which the pass ends at once, whatever the share."""

DTYPES: dict[str, Any] = {
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "I32": np.int32,
    "I64": np.int64,
}
"""safetensors' names of the types that an index uses."""


class Row(NamedTuple):
    """What a read of one sample needs, as plain integers; see `COLUMNS`."""

    sample_id: int
    shard: int
    offset: int
    size: int
    crc32: int
    latent_start: int
    latent_size: int
    text_start: int
    text_size: int
    meta_start: int
    meta_size: int
    height: int
    width: int
    text_length: int
    label: int


@dataclass(frozen=True, eq=False)
class Index:
    """All samples of a folder of shards, in shard order; a sample's id is its row."""

    folder: Path | str
    """Where the shards are; a string for a URL."""
    shards: tuple[str, ...]
    shard_bytes: tuple[int, ...]
    channels: int
    text_width: int
    """Width of a text state; 0 for class data."""
    num_classes: int
    """Classes, whose number is also the null label; 0 for text data."""
    columns: dict[str, np.ndarray]
    key_bytes: np.ndarray
    shapes: np.ndarray
    """Sizes that occur, int64 [M, 3]: height and width in latent cells, samples; sorted by the first two."""
    members: np.ndarray
    """Sample ids sorted by size, those of the first row of `shapes` first: uint32 [N]."""
    num_bad: int = 0
    """Samples (or broken ends of shards) that the index leaves out because they break the schema."""
    bad: tuple[tuple[str, str], ...] = ()
    """(shard:key, reason) of the first of them."""
    latent_dtype: str = ""
    """safetensors' name of the type of every latent; empty where they differ or are not stored."""
    online: tuple[str, ...] = ()
    """What is encoded while training: `picture`, and `ids` or `caption`; empty where all of it was before."""
    stored: tuple[Path, str] | None = None
    """Local file that the arrays are mapped from, and the hash it records; None for an index just built."""

    def __len__(self) -> int:
        return len(self.columns["shard"])

    @property
    def has_text(self) -> bool:
        return self.text_width > 0

    @property
    def hash(self) -> str:
        """Hash of every row and of the shards' names and sizes: the identity of the data's order."""
        return self.stored[1] if self.stored is not None else self.compute_hash()

    def compute_hash(self) -> str:
        """`hash` from the content, which is read once from end to end."""
        digest = blake2b(digest_size=16)
        digest.update(json.dumps(self._header(), sort_keys=True).encode())
        for _, array in self._arrays():
            # In pieces: a mapped file must not be drawn into memory as a whole.
            for start in range(0, len(array), 1 << 22):
                digest.update(np.ascontiguousarray(array[start : start + (1 << 22)]).data)
        return digest.hexdigest()

    def key(self, sample_id: int) -> str:
        ends = self.columns["key_end"]
        start = int(ends[sample_id - 1]) if sample_id else 0
        return self.key_bytes[start : int(ends[sample_id])].tobytes().decode()

    def name(self, sample_id: int) -> str:
        """shard:key, as messages name a sample."""
        return f"{self.shards[int(self.columns['shard'][sample_id])]}:{self.key(sample_id)}"

    def names(self, sample_ids: np.ndarray) -> tuple[str, ...]:
        """`name` of many samples at once."""
        ends = self.columns["key_end"]
        starts = np.where(sample_ids > 0, ends[sample_ids - 1], 0).tolist()
        shards, keys = self.columns["shard"][sample_ids].tolist(), self.key_bytes.data
        return tuple(
            f"{self.shards[shard]}:{str(keys[start:end], 'utf-8')}"
            for shard, start, end in zip(shards, starts, ends[sample_ids].tolist(), strict=True)
        )

    def rows(self, sample_ids: Sequence[int]) -> list[Row]:
        """The rows of samples. One look-up a column: numpy takes a microsecond for each."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        columns = [self.columns[name][ids].tolist() for name in Row._fields[1:]]
        return list(map(Row._make, zip(ids.tolist(), *columns, strict=True)))

    def grids(self, sample_ids: np.ndarray, patch_size: int) -> tuple[tuple[int, int], ...]:
        """(height, width) of samples in tokens."""
        sides = (self.columns[name][sample_ids] // patch_size for name in ("height", "width"))
        return tuple(zip(*(side.tolist() for side in sides), strict=True))

    def groups(self, patch_size: int) -> LengthGroups:
        """The samples grouped by size, those of the fewest tokens first. Reads the table of sizes alone.

        Raises:
            DataError: if a latent is no multiple of `patch_size`.
        """
        cells, counts = self.shapes[:, :2], self.shapes[:, 2]
        starts = np.cumsum(counts) - counts
        bad = (cells % patch_size).any(axis=1)
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            h, w = cells[first]
            raise DataError(
                f"{self.folder}: {counts[bad].sum()} of {len(self)} latents are no multiple of the patch "
                f"size {patch_size}, one is {self.name(int(self.members[starts[first]]))} with {h}x{w} "
                f"cells; prepare the data with sides that are"
            )
        lengths = (cells // patch_size).prod(axis=1)
        order = np.argsort(lengths, kind="stable")
        return LengthGroups(lengths[order], counts[order], starts[order], self.members)

    def same_size(self, sample_id: int) -> np.ndarray:
        """Ids of the samples of the size of `sample_id`, itself included."""
        return self.of_shape(self._shape_of(sample_id))

    def of_shape(self, shape: int) -> np.ndarray:
        """Ids of the samples of row `shape` of `shapes`."""
        end = int(self.shapes[: shape + 1, 2].sum())
        return self.members[end - int(self.shapes[shape, 2]) : end]

    def smaller_shapes(self, sample_id: int) -> list[int]:
        """Rows of `shapes` with no more cells than this sample's, nearest first, its own left out."""
        own = self._shape_of(sample_id)
        cells = self.shapes[:, 0] * self.shapes[:, 1]
        rows = np.flatnonzero(cells <= cells[own])
        return [int(row) for row in rows[np.argsort(-cells[rows], kind="stable")] if row != own]

    def _shape_of(self, sample_id: int) -> int:
        height, width = (int(self.columns[name][sample_id]) for name in ("height", "width"))
        return int(np.flatnonzero((self.shapes[:, 0] == height) & (self.shapes[:, 1] == width))[0])

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "shards": list(self.shards),
            "shard_bytes": list(self.shard_bytes),
            "channels": self.channels,
            "text_width": self.text_width,
            "num_classes": self.num_classes,
            "num_bad": self.num_bad,
            "bad": [list(entry) for entry in self.bad],
            "latent_dtype": self.latent_dtype,
            **({"online": list(self.online)} if self.online else {}),
        }

    def _arrays(self) -> list[tuple[str, np.ndarray]]:
        """Everything that is stored, widest type first as safetensors aligns it."""
        arrays = [*self.columns.items(), ("key_bytes", self.key_bytes), ("members", self.members)]
        arrays.append(("shapes", self.shapes))
        return sorted(arrays, key=lambda item: (-item[1].dtype.itemsize, item[0]))

    def save(self, folder: Path | None = None) -> Path:
        """Write the index (aside, then renamed), by default beside its shards. Returns its path.

        Raises:
            DataError: if the shards lie at a URL and no folder is given.
        """
        if folder is None and isinstance(self.folder, Path):
            folder = self.folder
        if folder is None:
            raise DataError(f"{self.folder}: the index of shards at a URL needs a folder of its own")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / INDEX_NAME
        aside = path.with_name(f".{INDEX_NAME}.partial")
        try:
            with open(aside, "wb") as stream:
                stream.write(encode_header(self._arrays(), {**self._header(), "hash": self.hash}))
                for _, array in self._arrays():
                    array.tofile(stream)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        return path

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A spawned worker maps the file itself: a pickled map would carry every row.
        if self.stored is not None:
            return _map_index, (self.stored[0], self.folder)
        return super().__reduce_ex__(protocol)


def encode_header(arrays: Sequence[tuple[str, np.ndarray]], header: dict[str, Any]) -> bytes:
    """The head of a safetensors file whose tensors follow in this order, `header` as its metadata."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"header": json.dumps(header)}}
    end = 0
    for name, array in arrays:
        start, end = end, end + array.nbytes
        entries[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def load_index(location: Path | str, *, kept_in: Path | str | None = None, verify: bool = False) -> Index:
    """The index of a folder or URL of shards.

    The file is mapped, not read: this costs the same at any number of samples. A row that was altered is
    found when its sample is read, by its checksum. The index of a URL is kept in `cache_folder()`, and
    fetched again when the one at the URL has another header, hash included.

    Args:
        location: folder, or URL that fsspec reads.
        kept_in: folder or URL of the index, where it is not beside the shards.
        verify: compare the whole content with the recorded hash, and the sizes of shards at a URL, too.

    Raises:
        DataError: if it is missing, unreadable, altered, or older than its shards.
    """
    home = location if kept_in is None else kept_in
    rebuild = f"build it with `{_command(location, kept_in)}`"
    folder = str(location).rstrip("/") if is_url(location) else Path(location)
    if is_url(home):
        path = _fetch(Remote(str(home)), rebuild)
    else:
        path = Path(home) / INDEX_NAME
        if not path.is_file():
            raise DataError(
                f"{path}: no index; prepare the data (python -m data_pipeline.prepare, or for the embedded "
                f"handwriting python -m data_pipeline.handwriting), or if the shards are there {rebuild}"
            )
    index = _map_index(path, folder)
    if isinstance(folder, Path):
        for name, size in zip(index.shards, index.shard_bytes, strict=True):
            _check_shard(folder / name, size, rebuild)
    elif verify:
        _check_remote_shards(index, rebuild)
    if verify and index.compute_hash() != index.hash:
        raise DataError(f"{home}/{INDEX_NAME}: its content does not match its hash; re{rebuild}")
    return index


def _command(location: Path | str, kept_in: Path | str | None) -> str:
    """What builds an index."""
    out = "" if kept_in is None else f" --out {kept_in}"
    return f"python -m data_pipeline.index {location}{out or (' --out FOLDER' if is_url(location) else '')}"


def _check_shard(path: Path, expected: int, rebuild: str) -> None:
    try:
        size = os.stat(path).st_size
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing, but the index lists it; restore it or re{rebuild}") from error
    _check_size(path, expected, size, rebuild)


def _check_size(path: Path | str, expected: int, size: int, rebuild: str) -> None:
    if size != expected:
        raise DataError(
            f"{path}: expected {expected} bytes, received {size}: it changed after the index was built; "
            f"restore it or re{rebuild}"
        )


def _check_remote_shards(index: Index, rebuild: str) -> None:
    remote = Remote(str(index.folder))
    threads = ThreadPoolExecutor(SIZES_AT_ONCE)
    sizes = [threads.submit(remote.size, name) for name in index.shards]
    try:
        for name, expected, size in zip(index.shards, index.shard_bytes, sizes, strict=True):
            where = f"{index.folder}/{name}"
            try:
                _check_size(where, expected, size.result(), rebuild)
            except FileNotFoundError as error:
                raise DataError(
                    f"{where}: missing, but the index lists it; restore it or re{rebuild}"
                ) from error
            except OSError as error:
                raise DataError(f"{where}: cannot be asked for its size ({error})") from error
    finally:
        threads.shutdown(cancel_futures=True)


def _map_index(path: Path, folder: Path | str) -> Index:
    """The index in the file `path`, for the shards in `folder`."""
    rebuild = f"rebuild it with `{_command(folder, None)}`"
    try:
        with open(path, "rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            total = os.fstat(stream.fileno()).st_size
            if not 8 < start <= total:
                raise ValueError(f"{total} bytes, a header of {start}")
            entries = json.loads(stream.read(start - 8))
        header = json.loads(entries.pop("__metadata__")["header"])
        if header.get("format") != FORMAT:
            raise DataError(f"{path}: index format {header.get('format')}, expected {FORMAT}; {rebuild}")
        arrays: dict[str, np.ndarray] = {}
        for name, entry in entries.items():
            first, end = (start + int(place) for place in entry["data_offsets"])
            if end > total:
                raise ValueError(f"{name} ends at byte {end} of {total}")
            dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
            # Plain views of one kind: np.memmap's own class is slow to index one row at a time.
            mapped = np.memmap(path, dtype, "r", first, shape) if end > first else np.empty(shape, dtype)
            arrays[name] = mapped.view(np.ndarray)
        return Index(
            folder=folder,
            shards=tuple(header["shards"]),
            shard_bytes=tuple(header["shard_bytes"]),
            channels=header["channels"],
            text_width=header["text_width"],
            num_classes=header["num_classes"],
            columns={name: arrays[name] for name in COLUMNS},
            key_bytes=arrays["key_bytes"],
            shapes=np.array(arrays["shapes"]),
            members=arrays["members"],
            num_bad=header["num_bad"],
            bad=tuple((name, reason) for name, reason in header["bad"]),
            latent_dtype=header["latent_dtype"],
            online=tuple(header.get("online", ())),
            stored=(path, header["hash"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable index ({error!r}); {rebuild}") from error


def cache_folder() -> Path:
    """Where the indexes of URLs are kept: `$XDG_CACHE_HOME/tim_ds`, by default `~/.cache/tim_ds`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tim_ds"


def _fetch(remote: Remote, rebuild: str) -> Path:
    """Local copy of the index at a URL, fetched unless the copy at hand has the same header."""
    where = f"{remote.location}/{INDEX_NAME}"
    try:
        total = remote.size(INDEX_NAME)
        length = int.from_bytes(remote.read_range(INDEX_NAME, 0, 8), "little")
        if not 0 < length < total:
            raise DataError(f"{where}: not a readable index ({total} bytes, a header of {length})")
        head = bytes(remote.read_range(INDEX_NAME, 0, 8 + length))
        # The header holds the hash of the content: equal headers, equal content.
        name = blake2b(head, digest_size=16).hexdigest()
        path = cache_folder() / f"{name}.{INDEX_NAME}"
        if path.is_file() and path.stat().st_size == total:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # One name a process: ranks of a machine may fetch at once, and any rename leaves the same bytes.
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(aside, "wb") as stream:
                while stream.tell() < total:
                    piece = remote.read_range(
                        INDEX_NAME, stream.tell(), min(FETCH_BYTES, total - stream.tell())
                    )
                    if not piece:
                        raise DataError(f"{where}: ends at byte {stream.tell()}, expected {total}")
                    stream.write(piece)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        return path
    except FileNotFoundError as error:
        raise DataError(
            f"{where}: no index; upload the one that was built beside the shards, or {rebuild} and name "
            f"that folder in data.index"
        ) from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error})") from error


def build_index(
    location: Path | str | Sequence[str],
    *,
    num_classes: int | None = None,
    progress: bool = True,
    processes: int = 1,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Index:
    """Index webdataset tars in one pass; nothing is written (see `Index.save`).

    A sample that breaks the schema is left out and recorded in `Index.bad`; so is the end of a truncated tar,
    and a sample whose channels or width of states differ from those of most.

    Shards at URLs are streamed, a few blocks at a time, and give the index that they would on a disk.

    Args:
        location: folder whose `*.tar` follow `schema.py`, or URLs of such shards (`find_shards`).
        num_classes: of class data; null takes the largest label plus one.
        progress: whether to show a bar.
        processes: that read shards side by side.
        max_bad_share: share of bad samples above which the index is refused; the first 8 are always allowed,
            except with 0.

    Raises:
        DataError: if there are no shards, no usable sample, or too many bad ones, or if a shard at a URL
            cannot be read.
    """
    folder, names = _shards_of(location)
    parts: list[ShardRows] = []
    num_bad = 0
    with ExitStack() as stack:
        if processes > 1:
            pool = stack.enter_context(ProcessPoolExecutor(processes))
            found = pool.map(partial(_index_shard, folder), names)
        else:
            found = map(partial(_index_shard, folder), names)
        for part in tqdm(found, total=len(names), desc="index", unit="shard", disable=not progress):
            parts.append(part)
            num_bad += len(part.bad)
            if num_bad > BAD_STOP:
                break
    names = names[: len(parts)]
    retries = sum(part.num_retries for part in parts)
    if retries:
        logger.warning("%s: %d requests failed or took too long, and were made again", folder, retries)
    _keep_the_most_common(names, parts)
    samples, bad = sum(map(len, parts)), [entry for part in parts for entry in part.bad]
    _check_bad(folder, samples, bad, max_bad_share)
    forms = {form: where for part in parts for form, where in part.forms.items()}
    if len(forms) > 1:
        listed = "; ".join(f"{where} leaves {' and '.join(f) or 'nothing'}" for f, where in forms.items())
        raise DataError(f"{folder}: samples differ in what they leave to encode while training: {listed}")
    text_width = next(int(part.widths[0]) for part in parts if len(part))
    columns = _merge_columns(parts)
    largest = int(columns["label"].max())
    if text_width == 0 and num_classes is not None and largest >= num_classes:
        raise DataError(f"{folder}: label {largest} with num_classes {num_classes}")
    shapes, members = group_by_size(columns["height"], columns["width"])
    dtypes = {str(dtype) for part in parts for dtype in np.unique(part.dtypes)}
    return Index(
        folder=folder,
        shards=names,
        shard_bytes=tuple(part.size for part in parts),
        channels=next(int(part.channels[0]) for part in parts if len(part)),
        text_width=text_width,
        num_classes=0 if text_width else (num_classes or largest + 1),
        columns=columns,
        key_bytes=np.concatenate([part.keys for part in parts]),
        shapes=shapes,
        members=members,
        num_bad=len(bad),
        bad=tuple(bad[:BAD_LISTED]),
        latent_dtype=dtypes.pop() if len(dtypes) == 1 else "",
        online=next(iter(forms)),
    )


def _shards_of(location: Path | str | Sequence[str]) -> tuple[Path | str, tuple[str, ...]]:
    """Where shards lie, and their names, sorted."""
    if not isinstance(location, Path | str):
        return find_shards(location)
    if is_url(location):
        return find_shards([str(location)])
    folder = Path(location)
    names = tuple(path.name for path in sorted(folder.glob("*.tar")))
    if not names:
        received = "a folder without any" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: expected a folder of webdataset shards (*.tar), received {received}")
    return folder, names


def group_by_size(heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`Index.shapes` and `Index.members` of samples with these sizes in latent cells."""
    codes, inverse, counts = np.unique(
        (heights.astype(np.uint32) << 16) | widths, return_inverse=True, return_counts=True
    )
    if len(codes) <= 1 << 16:
        # numpy sorts 16-bit integers in linear time.
        inverse = inverse.astype(np.uint16)
    members = np.argsort(inverse, kind="stable").astype(np.uint32)
    return np.stack([codes >> 16, codes & 0xFFFF, counts], axis=1).astype(np.int64), members


def _keep_the_most_common(names: Sequence[str], parts: Sequence[ShardRows]) -> None:
    """Move samples with other channels, or another width of states, than most samples to the bad ones."""
    counts: Counter[tuple[int, int]] = Counter()
    for part in parts:
        counts.update(zip(part.channels.tolist(), part.widths.tolist(), strict=True))
    if len(counts) < 2:
        return
    channels, width = max(counts, key=lambda pair: (counts[pair], pair))
    for name, part in zip(names, parts, strict=True):
        other = (part.channels != channels) | (part.widths != width)
        for row in np.flatnonzero(other).tolist():
            found = f"{part.channels[row]} channels and states of width {part.widths[row]}"
            part.bad.append(
                (
                    f"{name}:{part.key(row)}",
                    f"expected {channels} channels and {width}, received {found}",
                )
            )
        if other.any():
            part.keep(~other)


def _check_bad(folder: Path | str, samples: int, bad: Sequence[tuple[str, str]], share: float) -> None:
    total = samples + len(bad)
    if total == 0:
        raise DataError(f"{folder}: its shards hold no sample at all")
    limit = max(MIN_BAD_LIMIT, int(share * total)) if share > 0 else 0
    if samples == 0 or len(bad) > limit:
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in bad[:5])
        raise DataError(
            f"{folder}: {len(bad)} of {total} samples break the schema (allowed: {limit}); "
            f"the first:\n  {listed}"
        )


def _merge_columns(parts: Sequence[ShardRows]) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for name, dtype in COLUMNS.items():
        # One column at a time, each freed in its parts: the peak is one copy of the table, not two.
        pieces = [part.columns.pop(name) for part in parts]
        if name == "shard":
            pieces = [np.full(len(part), number) for number, part in enumerate(parts)]
        if name == "key_end":
            before = np.cumsum([0, *(len(part.keys) for part in parts[:-1])])
            pieces = [piece + first for piece, first in zip(pieces, before, strict=True)]
        columns[name] = np.concatenate(pieces).astype(dtype, copy=False)
    return columns


def _index_shard(folder: Path | str, name: str) -> ShardRows:
    """Raises DataError if it lies at a URL and cannot be read."""
    if isinstance(folder, Path):
        with open(folder / name, "rb") as stream:
            return read_shard(name, stream)
    try:
        with RemoteShard(Remote(folder), name) as shard:
            # tarfile asks for a typed file object; this one reads and seeks like any.
            part = read_shard(name, cast(BinaryIO, shard))
            part.num_retries = shard.num_retries
            return part
    except FileNotFoundError as error:
        raise DataError(f"{folder}/{name}: missing") from error
    except OSError as error:
        # Not a truncated tar: left out, its samples would be missing from every run on this index.
        raise DataError(f"{folder}/{name}: cannot be read ({error}); try again") from error


@command(DataError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Build and save the index of shards, or verify the one that is there."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.index", description=main.__doc__)
    parser.add_argument(
        "location",
        nargs="+",
        help="folder of webdataset shards, or URLs: of a folder that its server lists, of shards, or of many "
        "at once, as in https://host/part-{000000..000127}.tar",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where the index goes (default: beside local shards; needed for a URL); data.index names it",
    )
    parser.add_argument(
        "--num-classes", type=int, default=None, help="class data: labels are below this number"
    )
    parser.add_argument("--processes", type=int, default=1, help="that read shards side by side")
    parser.add_argument(
        "--max-bad",
        type=float,
        default=MAX_BAD_SHARE,
        metavar="SHARE",
        help="of samples, above which to refuse",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the stored index with its hash; build nothing"
    )
    options = parser.parse_args(arguments)
    first, several = options.location[0], len(options.location) > 1
    if options.verify:
        if several:
            raise DataError("--verify: expected the one folder or URL of the shards")
        index = load_index(first, kept_in=options.out, verify=True)
        path: Path | str = f"{options.out or first}/{INDEX_NAME}"
    else:
        if options.out is None and is_url(first):
            raise DataError("--out: required for shards at a URL; data.index then names that folder")
        index = build_index(
            options.location if several else first,
            num_classes=options.num_classes,
            processes=options.processes,
            max_bad_share=options.max_bad,
        )
        path = index.save(options.out)
    print(f"{path}: {len(index)} samples in {len(index.shards)} shards, hash {index.hash}")
    if not options.verify and options.out is not None:
        print(f"for the recipe: data.shards={index.folder} data.index={options.out}")
    for name, reason in index.bad:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if index.num_bad:
        print(f"{index.num_bad} samples left out, {len(index.bad)} of them listed", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
