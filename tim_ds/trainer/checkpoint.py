"""Checkpoints: complete or absent, and readable at any number of ranks and any ZeRO stage.

A checkpoint is a folder `step_000001000` with

    rank_00000.safetensors   this rank's pieces: `kind/parameter@start`, flat float32, where kind is `master`,
                             `exp_avg`, `exp_avg_sq` or `ema.NAME`; and `own/name`, state of the rank alone
    manifest.json            progress, data position, recipe, versions, and the size of every other file

Pieces carry their position, so a rank that owns other pieces (another world size, another ZeRO stage) reads
what it needs from whatever files hold it. Nothing is pickled. Random numbers are drawn by counter, so no
generator is kept.

A checkpoint is written aside, flushed to the disk and renamed; `latest` is replaced last. Killing the run
at any moment leaves the previous checkpoint usable. The folder has to be on a disk that all ranks share.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tim_ds.errors import CheckpointError
from tim_ds.model.weights import sync_folder
from tim_ds.trainer.world import World

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
PREFIX = "step_"
ASIDE = ".tmp-"

SPARE_BYTES = 1 << 20
"""Room asked for beside the tensors: manifest, headers, folder entries."""


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

    @cached_property
    def _pieces(self) -> dict[str, list[_Stored]]:
        """Stored pieces by `kind/name`."""
        found: dict[str, list[_Stored]] = {}
        for path in sorted(self.path.glob("rank_*.safetensors")):
            with _opened(path) as stored:
                for key in stored.keys():  # noqa: SIM118  # not a mapping
                    whole, at, start = key.rpartition("@")
                    if at:
                        numel = stored.get_slice(key).get_shape()[0]
                        found.setdefault(whole, []).append(_Stored(int(start), numel, path, key))
        return found

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
                with _opened(piece.path) as stored:
                    values = stored.get_slice(piece.key)[first - piece.start : last - piece.start]
                target.narrow(0, first - start, last - first).copy_(values)
                covered += last - first
        if covered != target.numel():
            raise CheckpointError(
                f"{self.path}: {kind} of {name}: expected elements {start} to {end}, received {covered} of "
                f"{target.numel()}; the checkpoint is of another model, or a file of it was altered"
            )

    def own(self, rank: int) -> dict[str, Tensor]:
        """What rank `rank` stored for itself; empty if that many ranks did not write."""
        path = self.path / _rank_file(rank)
        if not path.exists():
            return {}
        with _opened(path) as stored:
            return {
                key.removeprefix("own/"): stored.get_tensor(key)
                for key in stored.keys()  # noqa: SIM118  # not a mapping
                if key.startswith("own/")
            }


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint file ({error})") from error


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a folder, newest first. A damaged one is passed over with a warning.

    Raises:
        CheckpointError: if there are checkpoints and none can be read. A run that began anew there would
            overwrite its own metrics and weights.
    """
    found = []
    problems = []
    for path in sorted(folder.glob(f"{PREFIX}*"), reverse=True):
        try:
            found.append(_read(path))
        except CheckpointError as error:
            problems.append(str(error))
    if problems and not found:
        raise CheckpointError(
            f"{folder}: none of its checkpoints can be read; restore one, or move the folder away to begin "
            "anew\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    for problem in problems:
        logger.warning("%s; passed over for another checkpoint", problem)
    return found


def _read(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version = manifest["format"]
        if version != FORMAT:
            raise CheckpointError(f"{path}: checkpoint format {version}, expected {FORMAT}")
        sizes = {name: int(size) for name, size in manifest["files"].items()}
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
    """Delete a checkpoint from the disk. It is renamed first: a folder that is half deleted must not be taken
    for a checkpoint."""
    doomed = checkpoint.path.with_name(f"{ASIDE}{checkpoint.path.name}")
    os.rename(checkpoint.path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


class CheckpointFolder:
    """Writes checkpoints of a run and keeps the last few. All ranks call `save` together.

    Args:
        keep: newest checkpoints that stay.
        milestones: steps whose checkpoints always stay.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, milestones: tuple[int, ...] = ()) -> None:
        self.folder = folder
        self._world = world
        self._keep = keep
        self._milestones = frozenset(milestones)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint, the same on every rank. Removes what interrupted saves left.

        Raises:
            CheckpointError: on every rank, if there are checkpoints and none can be read.
        """
        found = self._world.together(self._find_newest, (CheckpointError,))
        return self._world.from_main(found)

    def _find_newest(self) -> Checkpoint | None:
        if not self._world.is_main or not self.folder.is_dir():
            return None
        for leftover in self.folder.glob(f"{ASIDE}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return next(iter(find_checkpoints(self.folder)), None)

    def save(
        self, step: int, pieces: Iterator[Piece], own: Mapping[str, Tensor], manifest: Mapping[str, Any]
    ) -> Path:
        """Write the checkpoint of `step` from every rank's pieces.

        Raises:
            CheckpointError: on every rank, if one cannot write (full disk, no permission). Nothing of the
                attempt is left, and earlier checkpoints are untouched.
        """
        final = self.folder / f"{PREFIX}{step:09d}"
        aside = self.folder / f"{ASIDE}{final.name}"
        tensors = {piece.key: _on_host(piece.values) for piece in pieces}
        tensors |= {f"own/{name}": _on_host(value) for name, value in own.items()}
        needed = sum(self._world.gather(sum(value.nbytes for value in tensors.values()))) + SPARE_BYTES
        self._together(final, needed, lambda: self._begin(aside, needed))
        path = aside / _rank_file(self._world.rank)
        sizes = self._together(final, needed, lambda: _write_tensors(path, tensors), undo=aside)
        files = {_rank_file(rank): size for rank, size in enumerate(sizes)}
        content = {"format": FORMAT, **manifest, "files": files}
        self._together(final, needed, lambda: self._finish(aside, final, content), undo=aside)
        if self._world.is_main:
            self._retire(final)
        return final

    def _begin(self, aside: Path, needed: int) -> None:
        if not self._world.is_main:
            return
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        free = shutil.disk_usage(aside).free
        if free < needed:
            aside.rmdir()
            raise OSError(f"the disk has {free:,} bytes left")

    def _finish(self, aside: Path, final: Path, content: Mapping[str, Any]) -> None:
        if not self._world.is_main:
            return
        write_flushed(aside / MANIFEST, json.dumps(content, indent=1) + "\n")
        sync_folder(aside)
        if final.exists():
            # Only a damaged checkpoint can be there: the run resumed before it.
            shutil.rmtree(final)
        os.rename(aside, final)
        latest = self.folder / f"{ASIDE}{LATEST}"
        write_flushed(latest, final.name + "\n")
        os.replace(latest, self.folder / LATEST)
        sync_folder(self.folder)

    def _retire(self, newest: Path) -> None:
        complete = [c for c in find_checkpoints(self.folder) if c.step not in self._milestones]
        for old in complete[self._keep :]:
            if old.path == newest:
                continue
            remove_checkpoint(old)

    def _together(self, final: Path, needed: int, action: Any, *, undo: Path | None = None) -> list[Any]:
        """Do something on every rank; if one fails, undo and fail on all. Returns every rank's result."""
        result, problem = None, None
        try:
            result = action()
        except (OSError, SafetensorError) as error:
            problem = f"rank {self._world.rank}: {error}"
        answers = self._world.gather((result, problem))
        problems = [problem for _, problem in answers if problem is not None]
        if not problems:
            return [result for result, _ in answers]
        if undo is not None and self._world.is_main:
            shutil.rmtree(undo, ignore_errors=True)
        self._world.raise_everywhere(
            CheckpointError(
                f"{final}: the checkpoint cannot be written, {needed:,} bytes needed, "
                f"{free_bytes(self.folder):,} free: {'; '.join(problems)}. Earlier checkpoints are whole; "
                "free space and run the same command again"
            )
        )


def free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _on_host(value: Tensor) -> Tensor:
    """A copy that later steps do not write to, as safetensors can store it (no views of shared memory)."""
    return value.detach().to("cpu", copy=True).contiguous()


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> int:
    save_file(tensors, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def write_flushed(path: Path, text: str) -> None:
    """Write a small text file and flush it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
