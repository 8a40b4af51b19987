"""What a run folder tells, finished, running or cut off: read without touching it, missing parts by name."""

from __future__ import annotations

import fcntl
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tim_ds.config.load import load_recipe
from tim_ds.config.recipe import to_dict
from tim_ds.errors import TimError
from tim_ds.pipeline import read_settings
from tim_ds.trainer.checkpoint import Checkpoint, find_checkpoints
from tim_ds.trainer.events import read_events
from tim_ds.trainer.metrics import METRICS_FILE, read_metrics
from tim_ds.trainer.preview import PREVIEWS
from tim_ds.trainer.run_folder import LOCK_FILE
from tim_ds.trainer.snapshots import SNAPSHOTS

_OWN_FOLDERS = (PREVIEWS, SNAPSHOTS, "checkpoints", "export", "tensorboard", "post_hoc")
"""Folders of a run in which no evaluation is sought."""


@dataclass(frozen=True, slots=True)
class Preview:
    """A sheet of pictures and what it was drawn with."""

    path: Path
    step: int
    num_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EvaluationFolder:
    """Results of an evaluation found beneath the run: a table in Markdown and plots."""

    folder: Path
    table: str | None
    pictures: tuple[Path, ...]


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run."""

    folder: Path
    status: str
    recipe_text: str
    settings: dict[str, Any]
    """The resolved recipe as plain values; what the newest checkpoint holds where the file cannot be read."""
    engine_text: str
    lines: tuple[dict[str, Any], ...]
    """Log lines, oldest first."""
    skipped: tuple[dict[str, Any], ...]
    """Lines of refused steps."""
    events: tuple[dict[str, Any], ...]
    """What happened to the run, in order; empty for runs of versions that did not write it."""
    previews: tuple[Preview, ...]
    checkpoints: tuple[Checkpoint, ...]
    """Oldest first."""
    snapshots: tuple[Checkpoint, ...]
    evaluations: tuple[EvaluationFolder, ...]
    export: dict[str, Any] | None
    missing: tuple[str, ...]
    """Parts that a run has and this one has not, or that cannot be read, with the reason."""

    @property
    def name(self) -> str:
        return str(self.settings.get("name", self.folder.name))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Captions of the previews."""
        preview = self.settings.get("train", {}).get("preview", {})
        return tuple(map(str, preview.get("prompts", ())))

    @property
    def versions(self) -> dict[str, Any]:
        """As the newest checkpoint recorded them."""
        return dict(self.checkpoints[-1].manifest.get("versions", {})) if self.checkpoints else {}


def read_run(folder: Path) -> RunRecord:
    """Everything that can be read of a run folder.

    Raises:
        TimError: if nothing in it is of a run.
    """
    missing: list[str] = []
    recipe_text = _text(folder / "recipe.yaml", missing)
    engine_text = _text(folder / "engine.json", missing)
    try:
        everything = read_metrics(folder)
    except (OSError, ValueError) as error:
        everything = []
        missing.append(f"curves ({METRICS_FILE}: {error})")
    lines = tuple(line for line in everything if not {"skipped", "evaluation"} & line.keys())
    if not lines:
        missing.append(f"curves ({METRICS_FILE} has no line yet)")
    checkpoints = _checkpoints(folder / "checkpoints", missing)
    if not checkpoints:
        missing.append("checkpoints (none complete)")
    settings = checkpoints[-1].manifest.get("recipe", {}) if checkpoints else {}
    if recipe_text:
        try:
            settings = to_dict(load_recipe(folder / "recipe.yaml", []))
        except TimError as error:
            missing.append(
                f"checked settings (recipe.yaml is of another version: {str(error).splitlines()[0]})"
            )
    previews = tuple(map(_preview, sorted((folder / PREVIEWS).glob("step_*.png"))))
    if not previews:
        missing.append("samples (no previews)")
    if not (recipe_text or lines or checkpoints):
        raise TimError(f"{folder}: not the folder of a run: no recipe.yaml, {METRICS_FILE} or checkpoints")
    export = _json(folder / "export" / "export.json")
    last_step = max([0, *(line["step"] for line in everything), *(c.step for c in checkpoints)])
    status = _status(folder, settings.get("train", {}).get("steps"), export, last_step)
    if export is None and not status.startswith("running"):
        missing.append("export (written when a run ends)")
    return RunRecord(
        folder=folder,
        status=status,
        recipe_text=recipe_text,
        settings=settings,
        engine_text=engine_text,
        lines=lines,
        skipped=tuple(line for line in everything if "skipped" in line),
        events=tuple(read_events(folder)),
        previews=previews,
        checkpoints=checkpoints,
        snapshots=_checkpoints(folder / SNAPSHOTS, missing),
        evaluations=tuple(_evaluations(folder)),
        export=export,
        missing=tuple(missing),
    )


def _status(folder: Path, steps: int | None, export: dict[str, Any] | None, step: int) -> str:
    of = "" if steps is None else f" of {steps:,}"
    if export is not None and steps is not None and export.get("step") == steps:
        return f"finished at step {steps:,}"
    if _is_locked(folder / LOCK_FILE):
        return f"running, at step {step:,}{of}"
    path = folder / METRICS_FILE
    ago = f", last line {_duration(time.time() - path.stat().st_mtime)} ago" if path.exists() else ""
    return f"stopped at step {step:,}{of}{ago}"


def _is_locked(path: Path) -> bool:
    """Whether a process of this machine is training there."""
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _text(path: Path, missing: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        missing.append(f"{path.name} ({getattr(error, 'strerror', None) or 'not text'})")
        return ""


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _checkpoints(folder: Path, missing: list[str]) -> tuple[Checkpoint, ...]:
    try:
        return tuple(sorted(find_checkpoints(folder), key=lambda checkpoint: checkpoint.step))
    except TimError as error:
        missing.append(str(error).splitlines()[0])
        return ()


def _preview(path: Path) -> Preview:
    try:
        settings = read_settings(path)
    except (TimError, OSError, ValueError):
        settings = {}
    step = int(path.stem.removeprefix("step_") or 0)
    return Preview(path, step, tuple(settings.get("num_steps", ())))


def _evaluations(folder: Path) -> list[EvaluationFolder]:
    """Folders beneath the run that hold a `results.json`."""
    found = []
    for path in sorted(folder.glob("**/results.json")):
        place = path.parent
        if place.relative_to(folder).parts[:1] and place.relative_to(folder).parts[0] in _OWN_FOLDERS:
            continue
        table = place / "table.md"
        text = table.read_text(encoding="utf-8") if table.exists() else None
        found.append(EvaluationFolder(place, text, tuple(sorted(place.glob("*.png")))))
    return found
