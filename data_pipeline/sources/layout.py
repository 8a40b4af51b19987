"""Which layout lies at a path, and the source that reads it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import DataError
from data_pipeline.index import INDEX_NAME
from data_pipeline.schema import NULL_NAME
from data_pipeline.sources.folder import FolderSource
from data_pipeline.sources.item import PICTURE_ENDINGS, Item
from data_pipeline.sources.lists import JsonlSource, ParquetSource
from data_pipeline.sources.tars import WebdatasetSource
from data_pipeline.sources.tim import TOY_LIST, LatentSource, ToySource

KINDS = ("folder", "list", "webdataset", "tim_toy", "tim_latents")

METADATA = "metadata"
"""Stem of the list that Hugging Face's image folders have beside their pictures."""


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
    if any(found.name not in (INDEX_NAME, NULL_NAME) for found in path.glob("*/*.safetensors")):
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
