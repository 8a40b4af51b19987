"""Where trained weights are found: exports, runs, checkpoints, and the files that the authors released."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tim_ds.compat.convert import read_released
from tim_ds.config.decode import decode
from tim_ds.config.node import from_python
from tim_ds.config.recipe import Recipe, recipe_hash
from tim_ds.errors import CheckpointError, ConfigError
from tim_ds.model.export_folder import (
    EXPORT_FILE,
    WEIGHTS_FILE,
    Export,
    SourceConfig,
    meta_network,
    read_export,
)
from tim_ds.model.weights import check_weights, sha256

MANIFEST = "manifest.json"
_LATEST = Path("checkpoints", "latest")


@dataclass(frozen=True, eq=False)
class Source:
    """Weights with their description."""

    export: Export
    state: dict[str, Tensor]
    sha256: str
    """Of the weight file; of a checkpoint, of its averaged weights."""


def read_source(path: str | os.PathLike[str]) -> Source:
    """The weights at `path`, strictly those of the network that is described with them.

    Args:
        path: an export folder (`RUN/export`); a run folder, for its export or, without one, its newest
            checkpoint; a checkpoint folder (`RUN/checkpoints/step_*`), for its averaged weights; or a weight
            file that the authors released.
    Raises:
        CheckpointError: if it is none of these, is not whole, or holds weights of another network.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: not there; expected an export folder, a run, a checkpoint in one, or a weight file "
            "that the authors released"
        )
    if path.name == WEIGHTS_FILE and (path.parent / EXPORT_FILE).exists():
        path = path.parent
    if path.is_file():
        export, state = read_released(path)
        check_weights(meta_network(export.model).state_dict(), state, source=f"{path}: {export.source.name}")
        return Source(export, state, sha256(path))
    if (path / MANIFEST).is_file():
        return _read_checkpoint(path)
    if not (path / EXPORT_FILE).exists():
        if (path / "export" / EXPORT_FILE).exists():
            path = path / "export"
        elif (path / _LATEST).is_file():
            return _read_checkpoint(path / _LATEST.parent / (path / _LATEST).read_text().strip())
    export, state = read_export(path)
    return Source(export, state, sha256(path / WEIGHTS_FILE))


def _read_checkpoint(folder: Path) -> Source:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        recipe = decode(Recipe, from_python(manifest["recipe"], MANIFEST), name="recipe")
        step = int(manifest["progress"]["step"])
        files = [folder / name for name in manifest["files"]]
    except ConfigError as error:
        raise CheckpointError(
            f"{folder / MANIFEST}: its recipe is not one of this version: {error}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: no readable {MANIFEST} ({type(error).__name__}: {error})"
        ) from error
    average = recipe.train.ema.used.name
    export = Export(
        model=recipe.model,
        transport=recipe.objective.transport,
        sampler=recipe.sampler,
        autoencoder=recipe.data.autoencoder,
        text_encoder=recipe.data.text_encoder,
        step=step,
        source=SourceConfig(kind="run", name=recipe.name, recipe_sha256=recipe_hash(recipe), average=average),
    )
    state = {
        name: torch.full(value.shape, float("nan"), dtype=torch.float32)
        for name, value in meta_network(export.model).state_dict().items()
    }
    filled = dict.fromkeys(state, 0)
    for file in files:
        for name, start, values in _pieces(file, f"ema.{average}/network."):
            if name not in state or start + len(values) > state[name].numel():
                raise CheckpointError(f"{file}: holds {name}, which the network of its recipe does not have")
            state[name].view(-1)[start : start + len(values)] = values
            filled[name] += len(values)
    missing = [name for name, count in filled.items() if count != state[name].numel()]
    if missing:
        raise CheckpointError(f"{folder}: not whole in its files: {missing[0]} and {len(missing) - 1} more")
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    return Source(export, state, digest.hexdigest())


def _pieces(file: Path, prefix: str) -> list[tuple[str, int, Tensor]]:
    """(parameter, first element, flat values) of the pieces of one kind that a rank stored."""
    try:
        with safe_open(file, framework="pt") as stored:
            opened: Any = stored
            found = [
                (re.fullmatch(rf"{re.escape(prefix)}(.+)@(\d+)", key), opened.get_tensor(key))
                for key in opened.keys()  # noqa: SIM118  # not a mapping
                if key.startswith(prefix)
            ]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable checkpoint file ({error})") from error
    return [(match[1], int(match[2]), values.float()) for match, values in found if match is not None]
