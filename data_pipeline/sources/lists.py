"""Lists with one item a row: jsonl, and parquet tables that may hold the pictures themselves."""

from __future__ import annotations

import os
from bisect import bisect_right
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sources.item import (
    BAD_ROW,
    CAPTION_KEYS,
    LABEL_KEYS,
    PATH_KEYS,
    Item,
    json_object,
    row_item,
)
from data_pipeline.sources.listing import Lister, hash_file


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
        return where, json_object(self._file.readline(), where, BAD_ROW)

    def read(self, number: int) -> Item:
        where, row = self.row(number)
        return row_item(where, row, self._root, self._keep)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


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
        lister = Lister()
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
        return row_item(where, self._group[1][place], self._root, self._keep)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_group": None}
