"""Checkpoints: complete or absent, and readable at any number of ranks and any ZeRO stage.

A checkpoint is a folder `step_000001000` with

    rank_00000.safetensors   this rank's pieces: `kind/parameter@start`, flat float32, where kind is `master`,
                             `exp_avg`, `exp_avg_sq` or `ema.NAME`; and `own/name`, state of the rank alone
    manifest.json            progress, data position, recipe, versions, size and checksum of every other file

Pieces carry their position, so a rank that owns other pieces (another world size, another ZeRO stage) reads
what it needs from whatever files hold it. Nothing is pickled. Random numbers are drawn by counter, so no
generator is kept.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tim_ds.errors import CheckpointError
from tim_ds.trainer.rank_file import FileRecord, check_rank_file

logger = logging.getLogger(__name__)

FORMAT = 2
MANIFEST = "manifest.json"
PREFIX = "step_"
ASIDE = ".tmp-"

LISTINGS = 5
"""How often checkpoints are listed, if all were deleted between listing and reading: the run that writes them
has a newer one by then."""


class CheckpointGoneError(CheckpointError):
    """A checkpoint was deleted while it was read: the run that wrote it keeps only its newest few."""


class Piece(NamedTuple):
    """A run of elements of a parameter's flat tensor."""

    kind: str
    name: str
    start: int
    values: Tensor

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}@{self.start}"


class _Stored(NamedTuple):
    start: int
    numel: int
    path: Path
    key: str


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A complete checkpoint on the disk."""

    path: Path
    manifest: dict[str, Any] = field(repr=False)

    @property
    def step(self) -> int:
        return int(self.manifest["progress"]["step"])

    @property
    def files(self) -> list[tuple[str, FileRecord]]:
        """Name and content of every file beside the manifest."""
        return [(name, FileRecord.from_json(entry)) for name, entry in self.manifest["files"].items()]

    @cached_property
    def _pieces(self) -> dict[str, list[_Stored]]:
        """Stored pieces by `kind/name`."""
        found: dict[str, list[_Stored]] = {}
        for path in sorted(self.path.glob("rank_*.safetensors")):
            with self._opened(path) as stored:
                for key in stored.keys():  # noqa: SIM118  # not a mapping
                    whole, at, start = key.rpartition("@")
                    if at:
                        numel = stored.get_slice(key).get_shape()[0]
                        found.setdefault(whole, []).append(_Stored(int(start), numel, path, key))
        return found

    def check(self) -> None:
        """Read every file once from end to end.

        Raises:
            CheckpointError: if one is not what was written.
        """
        for name, record in self.files:
            try:
                check_rank_file(self.path / name, record)
            except CheckpointError:
                self.check_there()
                raise

    def check_there(self) -> None:
        """Raises CheckpointGoneError if the checkpoint was deleted since it was found."""
        if not (self.path / MANIFEST).exists():
            raise CheckpointGoneError(
                f"{self.path}: deleted while it was read: the run that writes there keeps the newest few and "
                "its milestones. Read one of these"
            )

    def _opened(self, path: Path) -> Any:
        try:
            return _opened(path)
        except CheckpointError:
            self.check_there()
            raise

    def fill(self, kind: str, name: str, start: int, target: Tensor) -> None:
        """Read elements [start, start + n) of a parameter's tensor into the flat `target`, from any file.

        Raises:
            CheckpointError: if some of them are in no file.
        """
        end = start + target.numel()
        covered = 0
        for piece in self._pieces.get(f"{kind}/{name}", []):
            first, last = max(start, piece.start), min(end, piece.start + piece.numel)
            if first < last:
                with self._opened(piece.path) as stored:
                    values = stored.get_slice(piece.key)[first - piece.start : last - piece.start]
                target.narrow(0, first - start, last - first).copy_(values)
                covered += last - first
        if covered != target.numel():
            self.check_there()
            raise CheckpointError(
                f"{self.path}: {kind} of {name}: expected elements {start} to {end}, received {covered} of "
                f"{target.numel()}; the checkpoint is of another model, or a file of it was altered"
            )

    def own(self, rank: int) -> dict[str, Tensor]:
        """What rank `rank` stored for itself; empty if that many ranks did not write."""
        path = self.path / rank_file_name(rank)
        if not path.exists():
            return {}
        with _opened(path) as stored:
            return {
                key.removeprefix("own/"): stored.get_tensor(key)
                for key in stored.keys()  # noqa: SIM118  # not a mapping
                if key.startswith("own/")
            }


def rank_file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint file ({error})") from error


def find_checkpoints(folder: Path, *, strict: bool = False) -> list[Checkpoint]:
    """The complete checkpoints of a folder, newest first. One whose files are missing or of another size is
    passed over with a warning; what the files hold is not looked at.

    Raises:
        CheckpointError: if there are checkpoints and none can be read (with `strict`, if one cannot be). A
            run that began anew there would overwrite its own metrics and weights.
    """
    found: list[Checkpoint] = []
    problems: list[str] = []
    for _ in range(LISTINGS):
        problems, gone = [], False
        for path in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
            try:
                found.append(read_checkpoint(path))
            except CheckpointError as error:
                if os.path.lexists(path):
                    problems.append(str(error))
                else:
                    gone = True
        if found or not gone:
            break
    if problems and strict:
        raise CheckpointError(
            "; ".join(problems) + ". train.checkpoint.strict refuses to pass over it; move it away, or set "
            "train.checkpoint.strict to false, to continue from another"
        )
    if problems and not found:
        raise CheckpointError(
            f"{folder}: none of its checkpoints can be read; restore one, or move the folder away to begin "
            "anew\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    for problem in problems:
        logger.warning("%s; passed over for another checkpoint", problem)
    return found


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, complete by the names and sizes of its files.

    Raises:
        CheckpointError: if it is not complete.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version = manifest["format"]
        if version != FORMAT:
            raise CheckpointError(f"{path}: checkpoint format {version}, expected {FORMAT}")
        sizes = {name: FileRecord.from_json(entry).bytes for name, entry in manifest["files"].items()}
        int(manifest["progress"]["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no readable {MANIFEST} ({type(error).__name__}: {error})") from error
    for name, size in sizes.items():
        file = path / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            raise CheckpointError(
                f"{file}: expected {size:,} bytes, received {'no file' if actual is None else f'{actual:,}'}"
            )
    return Checkpoint(path, manifest)


def remove_checkpoint(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint from the disk, or say why it stays."""
    try:
        remove_folder(checkpoint.path)
    except OSError as error:
        logger.warning("%s: cannot be deleted, and stays: %s", checkpoint.path, error)


def remove_folder(path: Path) -> None:
    """Delete the folder of a checkpoint. It is renamed first: one that is half deleted must not be taken for
    a checkpoint.

    Raises:
        OSError: if something of it stays.
    """
    doomed = path.with_name(f"{ASIDE}deleted-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)
