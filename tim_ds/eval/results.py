"""What a benchmark leaves behind: result rows and how reports show them, a log of finished scores, features
that are made once."""

from __future__ import annotations

import json
import platform
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tim_ds import __version__
from tim_ds.errors import RequestError
from tim_ds.eval.generate import PictureSet, digest
from tim_ds.model.weights import write_aside

RESULTS_NAME = "results.json"

_LIBRARIES = ("torch", "numpy", "pillow")


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """Scores of one set of pictures in one benchmark."""

    evaluation: str
    title: str
    """Name of the benchmark as it may be quoted."""
    label: str
    """Name of the network in table and plot."""
    pictures: str
    """The folder."""
    pictures_sha256: str
    num_pictures: int
    made_by: dict[str, Any] | None
    """Weights, recipe, steps, nfe, guidance and seed; None for pictures of another program."""
    scorer: dict[str, Any]
    """Everything else that decides the scores: protocol, thresholds, hashes of models and references."""
    scores: dict[str, float | None]
    """By name; shares lie in 0 to 1."""
    details: dict[str, Any]
    """Counts and sub-scores."""
    versions: dict[str, str]
    device: str

    @property
    def nfe(self) -> int | None:
        return None if self.made_by is None else self.made_by.get("nfe")


@dataclass(frozen=True, slots=True)
class Column:
    """One score of the table."""

    key: str
    """In `ResultRow.scores`."""
    header: str
    percent: bool = False
    """A share, shown in per cent."""
    plotted: bool = False
    is_lower_better: bool = False

    def show(self, row: ResultRow) -> str:
        value = row.scores.get(self.key)
        if value is None:
            return "-"
        return f"{100 * value:.2f}" if self.percent else f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class SheetItem:
    """A caption and the pictures shown below it, by their place in the set."""

    caption: str
    pictures: tuple[int, ...]
    wrong: tuple[bool, ...] | None = None


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` places spread evenly over `count`."""
    shown = min(wanted, count)
    return sorted({round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)})


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, its keys joined by dots."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= (
            flattened(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
        )
    return found


def add_row(path: Path, row: ResultRow, *, key: Callable[[ResultRow], Any] | None = None) -> list[ResultRow]:
    """Keep `row` in the results file, in place of those that it makes out of date; returns all rows.

    Args:
        key: rows of one key replace each other; None: of the same pictures and scorer.
    Raises:
        RequestError: if the file is there and is something else, or of another benchmark.
    """
    key = key or (lambda one: (one.pictures_sha256, digest(one.scorer)))
    rows = [old for old in read_rows(path, row.evaluation) if key(old) != key(row)]
    rows.append(row)
    rows.sort(key=lambda one: (_in_order(one.label), one.nfe or 0, one.pictures))
    content = {"evaluation": row.evaluation, "rows": [asdict(one) for one in rows]}
    text = json.dumps(content, indent=2) + "\n"
    write_aside(path, len(text.encode()), lambda aside: aside.write_text(text))
    return rows


def _in_order(label: str) -> list[str | int]:
    """A key by which step 5 comes before step 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", label)]


def read_rows(path: Path, evaluation: str) -> list[ResultRow]:
    """Rows of earlier runs, [] if there is no file.

    Raises:
        RequestError: if the file is something else, or of another benchmark.
    """
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text())
        found = stored["evaluation"]
        if found != evaluation:
            raise RequestError(f"{path}: results of {found!r}, expected {evaluation!r}; choose another --out")
        return [ResultRow(**row) for row in stored["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"{path}: not the results of this evaluation ({error!r}); choose another --out, or "
            f"delete the file"
        ) from error


def make_row(
    *,
    evaluation: str,
    title: str,
    label: str | None,
    pictures: PictureSet,
    scorer: Mapping[str, Any],
    scores: Mapping[str, float | None],
    details: Mapping[str, Any],
    libraries: Sequence[str],
    device: torch.device | str,
) -> ResultRow:
    """A row with the present versions; a missing label is that of the run, or of the folder."""
    made_by = pictures.made_by
    return ResultRow(
        evaluation=evaluation,
        title=title,
        label=label or (pictures.folder.name if made_by is None else str(made_by["model"])),
        pictures=str(pictures.folder),
        pictures_sha256=pictures.sha256,
        num_pictures=len(pictures.names),
        made_by=made_by,
        scorer=dict(scorer),
        scores=dict(scores),
        details=dict(details),
        versions=versions(libraries),
        device=_device_name(torch.device(device)),
    )


def versions(libraries: Sequence[str] = ()) -> dict[str, str]:
    """Versions of what computed the scores; a library that is not installed is left out."""
    found = {"tim_ds": __version__, "python": platform.python_version()}
    for name in (*_LIBRARIES, *libraries):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class ScoreLog:
    """Scores picture by picture, so that an interrupted run goes on where it stopped.

    A file of JSON lines; the first is the identity of pictures and scorer, and is part of the file's name, so
    that scores of two settings never meet. A line that was cut short is dropped.
    """

    def __init__(self, folder: Path, evaluation: str, identity: Mapping[str, Any]) -> None:
        self.path = folder / f"{evaluation}_{digest(dict(identity))[:12]}.jsonl"
        self._identity = dict(identity)
        self.done: dict[str, Any] = {}
        kept = self._read()
        text = "".join(kept)
        write_aside(self.path, len(text.encode()), lambda aside: aside.write_text(text, encoding="utf-8"))

    def add(self, name: str, value: Any) -> None:
        """Keep the score of one picture.

        Raises:
            RequestError: if the disk refuses.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, value]) + "\n")
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be written ({error})") from error
        self.done[name] = value

    def _read(self) -> list[str]:
        """The whole lines of an earlier run, or the first line of a new file."""
        head = json.dumps(self._identity) + "\n"
        try:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        except FileNotFoundError:
            return [head]
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be read ({error})") from error
        if not lines or lines[0] != head:
            return [head]
        kept = [head]
        for line in lines[1:]:
            try:
                name, value = json.loads(line)
            except (ValueError, TypeError):
                break
            if not line.endswith("\n"):
                break
            self.done[name] = value
            kept.append(line)
        return kept


def kept_arrays(path: Path, make: Callable[[], dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file, made and written there if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        arrays = make()

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    write_aside(path, sum(array.nbytes for array in arrays.values()), write)
    return arrays


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}, {torch.get_num_threads()} threads"
