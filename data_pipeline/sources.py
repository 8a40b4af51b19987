"""Where pictures, captions and labels come from: five layouts, one numbered list of items each.

A source is listed once, in an order that depends on its names alone, and read by number afterwards. So a run
can be cut into fixed parts, started again, or spread over processes without anybody passing state around.

| kind | what lies there |
|---|---|
| folder | pictures with `.txt` or `.json` beside them |
| list | a `.jsonl` or `.parquet` file: path (parquet: or picture), caption(s) or label, further columns; or a
         folder as Hugging Face has them: `metadata.jsonl` beside the pictures, or parquet files alone |
| webdataset | `*.tar` shards with jpg/png/webp/... and txt/json/cls members |
| tim_toy | the toy set of TiM: `data_info.jsonl` (`image_file`, `bucket`, `captions`) and its pictures |
| tim_latents | latents of TiM: `<wnid>/<name>.safetensors`, each `latent` [2, C, h, w] and `label` |
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline import schema
from data_pipeline.errors import DataError
from data_pipeline.pictures import Refused
from data_pipeline.resolution import parse_size

logger = logging.getLogger(__name__)

KINDS = ("folder", "list", "webdataset", "tim_toy", "tim_latents")

PICTURE_ENDINGS = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jp2", "jfif", "mpo",
    "ppm",
)  # fmt: skip
"""Endings that count as pictures; what the bytes are is found by looking at them."""

PATH_KEYS = ("path", "image", "image_file", "image_path", "file_name", "file")
CAPTION_KEYS = ("captions", "caption", "text", "prompt")
LABEL_KEYS = ("label", "class", "cls")

TOY_LIST = "data_info.jsonl"

METADATA = "metadata"
"""Stem of the list that Hugging Face's image folders have beside their pictures."""

MISSING = "file missing"
UNREADABLE = "file cannot be read"
ESCAPES = "path leaves the source"
NO_PICTURE = "no picture"
BAD_ROW = "unreadable row"
BAD_CAPTION = "caption is not UTF-8"
BAD_SIDECAR = "unreadable json"
BAD_LATENT = "unreadable latent"
BAD_LABEL = "no class label"
BAD_BUCKET = "unreadable bucket"


@dataclass(frozen=True, eq=False)
class Item:
    """One source item as it was found, nothing decoded but its latent.

    Shapes:
        latent, flipped: [C, h, w] (tim_latents), the picture and its mirror image.
    """

    source: str
    """Stable name within the source: a relative path, shard:key, or list:line."""
    picture: bytes | None = None
    captions: tuple[str, ...] = ()
    label: int | None = None
    class_name: str | None = None
    """Label by name, to be looked up in the source's `classes`."""
    bucket: tuple[int, int] | None = None
    """(height, width) that the source prescribes."""
    latent: Tensor | None = None
    flipped: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Further columns, as `--keep` names them."""


class Source(Protocol):
    """A numbered list of items."""

    kind: str

    def __len__(self) -> int: ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their labels; empty if labels are numbers, or absent."""
        ...

    def fingerprint(self) -> str:
        """Hash of the items' names, in order: the same list gives the same hash."""
        ...

    def read(self, number: int) -> Item:
        """Item `number`.

        Raises:
            Refused: if it cannot be used.
        """
        ...


def detect_kind(path: Path) -> str:
    """The layout of `path`.

    Raises:
        DataError: if it does not exist or looks like none.
    """
    if path.suffix.lower() in (".jsonl", ".parquet") and (path.is_file() or "*" in path.name):
        return "tim_toy" if path.name == TOY_LIST else "list"
    if path.is_file() and path.suffix.lower() == ".tar":
        return "webdataset"
    if path.is_file() and path.suffix.lower() == ".csv":
        raise DataError(
            f"{path}: lists are .jsonl or .parquet; a .csv with a heading becomes one by\n"
            '  python -c \'import csv, json, sys; sys.stdin.reconfigure(encoding="utf-8-sig", newline=""); '
            "[print(json.dumps(r)) for r in csv.DictReader(sys.stdin)]' "
            f"< {shlex.quote(str(path))} > {shlex.quote(str(path.with_suffix('.jsonl')))}"
        )
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder, a .jsonl, .parquet or .tar file; received no such path")
    if (path / TOY_LIST).is_file():
        return "tim_toy"
    if any(path.glob("*.tar")):
        return "webdataset"
    if next(path.glob("*/*.safetensors"), None) is not None:
        return "tim_latents"
    return "folder" if _list_in(path) is None else "list"


def _list_in(folder: Path) -> Path | None:
    """The list of a folder in one of Hugging Face's layouts, as a file or a pattern; None for another folder.

    Raises:
        DataError: if there are several, or the only one is a .csv.
    """

    def near(pattern: str) -> list[Path]:
        found = [*folder.glob(pattern), *folder.glob(f"*/{pattern}")]
        return sorted(path for path in found if path.is_file() and not path.name.startswith("."))

    lists = near(f"{METADATA}.jsonl") + near(f"{METADATA}.parquet")
    if not lists and not any(next(folder.glob(p), None) for p in ("*.txt", "*.json", "*/*.txt", "*/*.json")):
        for table in near(f"{METADATA}.csv")[:1]:
            detect_kind(table)
    tables = [] if lists else near("*.parquet")
    if len(lists) > 1:
        raise DataError(f"{folder}: several lists, {_names(lists, folder)}; give one of them")
    if tables and any(
        path.suffix.lower()[1:] in PICTURE_ENDINGS for p in ("*", "*/*") for path in folder.glob(p)
    ):
        # What came with the pictures, such as img2dataset's tables of addresses.
        return None
    if len(lists + tables) <= 1:
        return next(iter(lists + tables), None)
    patterns = {path.parent / f"{path.name.partition('-')[0]}-*.parquet" for path in tables}
    if len(patterns) == 1 and all("-" in path.name for path in tables):
        return patterns.pop()
    raise DataError(
        f"{folder}: parquet files of several names, {_names(tables, folder)}; give one of them, or those "
        "of one split as a pattern in quotes, such as 'FOLDER/train-*.parquet'"
    )


def _names(paths: list[Path], folder: Path) -> str:
    shown = [path.relative_to(folder).as_posix() for path in paths[:4]]
    return ", ".join(shown) + (", ..." if len(paths) > 4 else "")


def open_source(
    path: Path, kind: str = "auto", *, root: Path | None = None, keep: tuple[str, ...] = ()
) -> Source:
    """List the source at `path`.

    Args:
        path: a folder, a list file, or a pattern of parquet files.
        kind: one of `KINDS`, or `auto`.
        root: folder that the paths of a list start from and must stay in (default: the list's own).
        keep: names of further columns to carry into the samples' json.

    Raises:
        DataError: if it is not there, not readable or empty.
    """
    kind = detect_kind(path) if kind == "auto" else kind
    if kind == "list" and path.is_dir():
        found = _list_in(path)
        if found is None:
            raise DataError(f"{path}: no list in this folder; expected a {METADATA}.jsonl, or parquet files")
        path = found
    source: Source
    if kind == "folder":
        source = FolderSource(path, keep)
    elif kind == "list" and path.suffix.lower() == ".parquet":
        source = ParquetSource(path, root or path.parent, keep)
    elif kind == "list":
        source = JsonlSource(path, root or path.parent, keep)
    elif kind == "webdataset":
        source = WebdatasetSource(path, keep)
    elif kind == "tim_toy":
        source = ToySource(path, root, keep)
    elif kind == "tim_latents":
        source = LatentSource(path)
    else:
        raise DataError(f"--source: expected auto or one of {', '.join(KINDS)}, received {kind!r}")
    if len(source) == 0:
        raise DataError(f"{path}: no items for a source of kind {kind!r}; is --source right?")
    return source


def hash_file(path: Path) -> str:
    """BLAKE2b of a file in 128 bits."""
    digest = blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


class _Lister:
    """Hash of names in order."""

    def __init__(self) -> None:
        self._digest = blake2b(digest_size=16)

    def add(self, *parts: object) -> None:
        self._digest.update("\x00".join(map(str, parts)).encode(errors="surrogateescape") + b"\x01")

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _walk_files(root: Path, endings: tuple[str, ...]) -> list[str]:
    """Relative names beneath `root` with one of the endings, sorted; hidden files and folders are skipped."""
    if not root.is_dir():
        raise DataError(f"{root}: expected a folder")
    found: list[str] = []
    links: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prefix = os.path.relpath(folder, root)
        links += [
            os.path.join(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))
        ]
        for name in files:
            if not name.startswith(".") and name.rpartition(".")[2].lower() in endings:
                found.append(name if prefix == "." else f"{prefix}/{name}")
    if links:
        named = ", ".join(_display(os.path.relpath(link, root)) for link in links[:4])
        logger.warning(
            "%s: folders that are links are not entered: %s%s", root, named, ", ..." if len(links) > 4 else ""
        )
    # By bytes: the order must not depend on a locale.
    return sorted(found, key=os.fsencode)


def _display(name: str) -> str:
    """A file name that can be written as UTF-8, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def _read_file(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refused(MISSING, name) from error
    except (OSError, ValueError) as error:
        raise Refused(UNREADABLE, f"{name}: {error}") from error


def _read_inside(root: Path, name: str) -> bytes:
    """Bytes of the file `name` beneath `root`; a name that leads out of it is refused."""
    if "\x00" in name:
        raise Refused(ESCAPES, repr(name[:200]))
    # Absolute, as a list in the working folder begins at ".", with which no path begins.
    base = os.path.abspath(root)
    inside = os.path.normpath(os.path.join(base, name))
    if inside != base and not inside.startswith(base.rstrip(os.sep) + os.sep):
        raise Refused(ESCAPES, f"{name[:200]} is not in {base} (--root)")
    return _read_file(Path(inside), name[:200])


def decode_caption(data: bytes, where: str) -> str:
    """Text of a caption file.

    Raises:
        Refused: if it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(BAD_CAPTION, f"{where}: {error}") from error


def captions_of(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The captions of a row: a string or a list of strings under one of `CAPTION_KEYS`.

    Raises:
        Refused: if the value is neither.
    """
    for key in CAPTION_KEYS:
        value = row.get(key)
        if value is None:
            continue
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
            raise Refused(BAD_ROW, f"{where}: {key} is neither a string nor a list of strings")
        return tuple(values)
    return ()


def label_of(row: dict[str, Any], where: str) -> tuple[int | None, str | None]:
    """(number, name) of a row's label: at most one is set.

    Raises:
        Refused: if the value is no label.
    """
    for key in LABEL_KEYS:
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, str) and not (value.isascii() and value.isdigit()):
            return None, value
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise Refused(BAD_LABEL, f"{where}: {key} is {str(value)[:80]!r}") from error
        if isinstance(value, bool) or number != float(value) or not 0 <= number < 10**9:
            raise Refused(BAD_LABEL, f"{where}: {key} is {str(value)[:80]!r}")
        return number, None
    return None, None


def _extra(row: dict[str, Any], keep: tuple[str, ...]) -> dict[str, Any]:
    kept = {}
    for name in keep:
        value = row.get(name)
        if isinstance(value, (str, int, float, bool, list, dict)):
            kept[name] = value
    return kept


def _json_object(data: bytes, where: str, reason: str) -> dict[str, Any]:
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(reason, f"{where}: {error}") from error
    if not isinstance(row, dict):
        raise Refused(reason, f"{where}: expected an object, received {type(row).__name__}")
    return row


def _sidecars(
    source: str,
    picture: bytes | None,
    text: bytes | None,
    sidecar: bytes | None,
    keep: tuple[str, ...],
    class_name: str | None = None,
    label: bytes | None = None,
) -> Item:
    """An item of a picture and the files that share its stem; a json's captions go before the text file's."""
    row = _json_object(sidecar, source, BAD_SIDECAR) if sidecar is not None else {}
    captions = captions_of(row, source)
    if not captions and text is not None:
        captions = (decode_caption(text, source),)
    number, name = label_of(row, source)
    if label is not None:
        number, name = label_of({"label": label.decode("ascii", errors="replace").strip()}, source)
    if number is None and name is None:
        name = class_name
    return Item(source, picture, captions=captions, label=number, class_name=name, extra=_extra(row, keep))


class FolderSource:
    """Pictures beneath a folder, `<stem>.json` and `<stem>.txt` beside each. Classes: the topmost folders."""

    kind = "folder"

    def __init__(self, root: Path, keep: tuple[str, ...] = ()) -> None:
        self._root = root
        self._keep = keep
        self._names = _walk_files(root, PICTURE_ENDINGS)
        self._classes = tuple(sorted({name.partition("/")[0] for name in self._names if "/" in name}))

    def __len__(self) -> int:
        return len(self._names)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(_display(name) for name in self._classes)

    def fingerprint(self) -> str:
        lister = _Lister()
        for name in self._names:
            lister.add(name)
        return lister.hexdigest()

    def read(self, number: int) -> Item:
        name = self._names[number]
        path = self._root / name
        source = _display(name)
        picture = _read_file(path, source)
        sidecars: dict[str, bytes | None] = {}
        for ending in ("txt", "json"):
            # As cameras and older systems write them, too.
            beside = (path.with_suffix(f".{one}") for one in (ending, ending.upper()))
            there = next((file for file in beside if file.is_file()), None)
            sidecars[ending] = None if there is None else _read_file(there, source)
        top, slash, _ = name.partition("/")
        class_name = _display(top) if slash else None
        return _sidecars(source, picture, sidecars["txt"], sidecars["json"], self._keep, class_name)


class JsonlSource:
    """A list with one object a line; pictures are read from `root` and never from outside it."""

    kind = "list"

    def __init__(self, path: Path, root: Path, keep: tuple[str, ...] = ()) -> None:
        self._path = path
        self._root = root
        self._keep = keep
        self._file: BinaryIO | None = None
        starts: list[int] = []
        digest = blake2b(digest_size=16)
        try:
            with open(path, "rb") as stream:
                position = 0
                for line in stream:
                    if line.strip():
                        starts.append(position)
                    position += len(line)
                    digest.update(line)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        self._starts = np.asarray([*starts, position], dtype=np.int64)
        self._hash = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def fingerprint(self) -> str:
        return self._hash

    def row(self, number: int) -> tuple[str, dict[str, Any]]:
        """Name and object of line `number`."""
        if self._file is None:
            self._file = open(self._path, "rb")  # noqa: SIM115  # kept for the next line
        self._file.seek(int(self._starts[number]))
        where = f"{self._path.name}:{number}"
        return where, _json_object(self._file.readline(), where, BAD_ROW)

    def read(self, number: int) -> Item:
        where, row = self.row(number)
        return _row_item(where, row, self._root, self._keep)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def _row_item(where: str, row: dict[str, Any], root: Path, keep: tuple[str, ...]) -> Item:
    found = next((row[key] for key in PATH_KEYS if isinstance(row.get(key), (str, bytes, dict))), None)
    # A picture of Hugging Face's `datasets` is {bytes, path}, either of which may be missing.
    name, picture = (found.get("path"), found.get("bytes")) if isinstance(found, dict) else (found, None)
    if isinstance(name, bytes):
        name, picture = "", name
    if not isinstance(picture, bytes):
        if not isinstance(name, str):
            raise Refused(
                BAD_ROW, f"{where}: expected a path or a picture under one of {', '.join(PATH_KEYS)}"
            )
        picture = _read_inside(root, name)
    number, class_name = label_of(row, where)
    return Item(
        f"{where} {name or ''}"[:500].rstrip().encode(errors="backslashreplace").decode(),
        picture,
        captions=captions_of(row, where),
        label=number,
        class_name=class_name,
        extra=_extra(row, keep),
    )


class ParquetSource:
    """Parquet tables with the columns of a jsonl list, whose pictures may lie in the tables. Needs pyarrow.

    Args:
        path: a file, or a pattern of files that are read in the order of their names.
    """

    kind = "list"

    def __init__(self, path: Path, root: Path, keep: tuple[str, ...] = ()) -> None:
        self._paths = [path] if path.is_file() else sorted(path.parent.glob(path.name), key=lambda p: p.name)
        if not self._paths:
            raise DataError(f"{path}: no such file")
        self._root = root
        self._keep = keep
        self._file: tuple[int, Any] | None = None
        self._group: tuple[int, list[dict[str, Any]]] | None = None
        # Of every row group: its file, its number there, and the rows of the file before it.
        self._groups: list[tuple[int, int, int]] = []
        sizes: list[int] = []
        self._columns: list[list[str]] = []
        self._holds_pictures = False
        wanted = {*PATH_KEYS, *CAPTION_KEYS, *LABEL_KEYS, *keep}
        for number, one in enumerate(self._paths):
            try:
                table = self._open(number)
            except (OSError, ValueError) as error:
                raise DataError(f"{one}: not a readable parquet file ({error})") from error
            schema_of = table.schema_arrow
            if not set(PATH_KEYS) & set(schema_of.names):
                raise DataError(
                    f"{one}: expected a column named {', '.join(PATH_KEYS)}; received {schema_of.names}"
                )
            self._columns.append([name for name in schema_of.names if name in wanted])
            self._holds_pictures |= any(
                "binary" in str(schema_of.field(name).type) for name in {*PATH_KEYS} & {*schema_of.names}
            )
            before = 0
            for group in range(table.metadata.num_row_groups):
                self._groups.append((number, group, before))
                sizes.append(table.metadata.row_group(group).num_rows)
                before += sizes[-1]
        self._ends = np.cumsum(sizes, dtype=np.int64).tolist()

    def _open(self, number: int) -> Any:
        if self._file is None or self._file[0] != number:
            try:
                from pyarrow import parquet
            except ImportError as error:
                raise DataError(
                    f"{self._paths[number]}: reading parquet needs pyarrow; install it (pip install "
                    "pyarrow), or give a .jsonl list"
                ) from error
            self._file = (number, parquet.ParquetFile(self._paths[number]))
        return self._file[1]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def fingerprint(self) -> str:
        if len(self._paths) == 1 and not self._holds_pictures:
            return hash_file(self._paths[0])
        lister = _Lister()
        for path in self._paths:
            # The footer has size, place and statistics of every column; the pictures may be terabytes.
            with open(path, "rb") as stream:
                stream.seek(-8, os.SEEK_END)
                length = int.from_bytes(stream.read(4), "little")
                stream.seek(-8 - length, os.SEEK_END)
                lister.add(path.name, path.stat().st_size, stream.read(length).hex())
        return lister.hexdigest()

    def read(self, number: int) -> Item:
        found = bisect_right(self._ends, number)
        file, group, before = self._groups[found]
        if self._group is None or self._group[0] != found:
            try:
                table = self._open(file).read_row_group(group, columns=self._columns[file])
                rows = table.to_pylist()
            except (OSError, ValueError) as error:
                raise DataError(f"{self._paths[file]}: row group {group} cannot be read ({error})") from error
            self._group = (found, rows)
        place = number - (self._ends[found - 1] if found else 0)
        where = f"{self._paths[file].name}:{before + place}"
        return _row_item(where, self._group[1][place], self._root, self._keep)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_group": None}


class WebdatasetSource:
    """Samples of existing webdataset tars: members that share a key and lie side by side."""

    kind = "webdataset"

    def __init__(self, path: Path, keep: tuple[str, ...] = ()) -> None:
        self._keep = keep
        self._paths = [path] if path.is_file() else sorted(path.glob("*.tar"), key=lambda p: p.name)
        self._files: dict[int, BinaryIO] = {}
        shards: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        lister = _Lister()
        for shard, tar in enumerate(self._paths):
            for key, start, end in _tar_samples(tar):
                shards.append(shard)
                starts.append(start)
                ends.append(end)
                lister.add(tar.name, key, end - start)
        # Columns of integers, not objects: 20 bytes a sample.
        self._shards = np.asarray(shards, dtype=np.int32)
        self._starts = np.asarray(starts, dtype=np.int64)
        self._ends = np.asarray(ends, dtype=np.int64)
        self._hash = lister.hexdigest()

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def fingerprint(self) -> str:
        return self._hash

    def read(self, number: int) -> Item:
        shard = int(self._shards[number])
        path = self._paths[shard]
        if shard not in self._files:
            for stream in self._files.values():
                stream.close()
            self._files = {shard: open(path, "rb")}  # noqa: SIM115  # kept for the shard's next sample
        members, key = self._members(self._files[shard], number, path)
        source = f"{path.name}:{key}"
        pictures = [ending for ending in members if ending.rpartition(".")[2].lower() in PICTURE_ENDINGS]
        if not pictures:
            raise Refused(NO_PICTURE, f"{source}: members {sorted(members)}")
        return _sidecars(
            source,
            members[sorted(pictures)[0]],
            members.get("txt", members.get("caption")),
            members.get("json"),
            self._keep,
            label=members.get("cls"),
        )

    def _members(self, stream: BinaryIO, number: int, path: Path) -> tuple[dict[str, bytes], str]:
        start, end = int(self._starts[number]), int(self._ends[number])
        stream.seek(start)
        members: dict[str, bytes] = {}
        key = ""
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for info in tar:
                    if info.offset >= end:
                        break
                    if not info.isfile():
                        continue
                    key, ending = _split_member(info.name)
                    if _escapes(info.name):
                        raise Refused(ESCAPES, f"{path.name}:{info.name[:200]}")
                    extracted = tar.extractfile(info)
                    members[ending.lower()] = extracted.read() if extracted else b""
        except (tarfile.TarError, OSError, EOFError) as error:
            raise Refused(UNREADABLE, f"{path.name}:{_display(key)} at byte {start}: {error}") from error
        if not members:
            raise Refused(UNREADABLE, f"{path.name} breaks off at byte {start}")
        return members, _display(key)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def _escapes(name: str) -> bool:
    return name.startswith("/") or ".." in PurePosixPath(name).parts or "\x00" in name


def _split_member(name: str) -> tuple[str, str]:
    """(key, ending) of a member: the ending starts at the first dot of the last part, as in webdataset."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending


def _tar_samples(path: Path) -> Iterator[tuple[str, int, int]]:
    """(key, first byte, end) of each run of members that share a key.

    Where a tar breaks off, what came before is used and the rest counts as one item, which cannot be read.

    Raises:
        DataError: if the file is no tar at all.
    """
    current: str | None = None
    start = end = 0
    size = path.stat().st_size
    broken = False
    try:
        with tarfile.open(path, mode="r:") as tar:
            try:
                for info in tar:
                    if not info.isfile() or not _split_member(info.name)[1]:
                        continue
                    key = _split_member(info.name)[0]
                    if key != current:
                        if current is not None:
                            yield current, start, end
                        current, start = key, info.offset
                    end = info.offset_data + -(-info.size // 512) * 512
            except (tarfile.TarError, EOFError):
                broken = True
            # A complete tar ends in two zero blocks.
            broken = broken or size < tar.offset + 1024
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a readable tar ({error}); copy it again or take it away") from error
    if current is not None:
        yield current, start, end
    if broken and end <= size:
        # What follows is missing, the last sample is not.
        yield "", size, size


class ToySource:
    """The layout of the authors' toy data set; the bucket's size is carried along for `buckets` mode."""

    kind = "tim_toy"

    def __init__(self, path: Path, root: Path | None, keep: tuple[str, ...] = ()) -> None:
        listed = path / TOY_LIST if path.is_dir() else path
        if not listed.is_file():
            raise DataError(f"{listed}: missing; the toy layout has a {TOY_LIST} beside its pictures")
        self._lines = JsonlSource(listed, root or listed.parent)
        self._root = root or listed.parent
        self._keep = keep

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def fingerprint(self) -> str:
        return self._lines.fingerprint()

    def read(self, number: int) -> Item:
        where, row = self._lines.row(number)
        item = _row_item(where, row, self._root, self._keep)
        try:
            bucket = parse_size(str(row.get("bucket", "")))
        except DataError as error:
            raise Refused(BAD_BUCKET, f"{where}: {error}") from error
        return Item(
            item.source,
            item.picture,
            captions=item.captions,
            bucket=bucket,
            extra={"bucket": str(row["bucket"]), **item.extra},
        )


class LatentSource:
    """The authors' latents of ImageNet, one file a picture with its mirror image, one folder a class."""

    kind = "tim_latents"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names = _walk_files(root, ("safetensors",))

    def __len__(self) -> int:
        return len(self._names)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def fingerprint(self) -> str:
        lister = _Lister()
        for name in self._names:
            lister.add(name)
        return lister.hexdigest()

    def read(self, number: int) -> Item:
        name = self._names[number]
        source = _display(name)
        data = _read_file(self._root / name, source)
        try:
            pair = schema.decode_tensor(data, "latent", source)
            label = schema.decode_tensor(data, "label", source)
        except DataError as error:
            raise Refused(BAD_LATENT, str(error)) from error
        if pair.ndim != 4 or pair.shape[0] != 2 or 0 in pair.shape or not pair.is_floating_point():
            raise Refused(
                BAD_LATENT,
                f"{source}: expected a float latent [2, C, h, w], received {pair.dtype} {list(pair.shape)}",
            )
        if label.numel() != 1 or not bool(torch.isfinite(label.to(torch.float64)).all()):
            raise Refused(BAD_LABEL, f"{source}: expected one number, received {list(label.shape)}")
        number_of_class, _ = label_of({"label": label.item()}, source)
        return Item(source, label=number_of_class, latent=pair[0], flipped=pair[1])
