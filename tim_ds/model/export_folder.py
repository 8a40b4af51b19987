"""The export folder: a trained network as it is handed on, to sampling, evaluation and other people.

It holds `tim.safetensors` (the weights, under the authors' names) and `export.json` (what they are:
`Export`). `export.json` is written last, so a folder that has one is whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from tim_ds.config.decode import decode
from tim_ds.config.node import from_python
from tim_ds.errors import CheckpointError, ConfigError
from tim_ds.model.config import ModelConfig
from tim_ds.model.tim import TiM
from tim_ds.model.weights import (
    check_weights,
    load_weights_into,
    open_weights,
    read_weights,
    stream_weights,
    write_aside,
    write_weights,
)
from tim_ds.objective.config import TransportConfig
from tim_ds.sampler.config import SamplerConfig

WEIGHTS_FILE = "tim.safetensors"
EXPORT_FILE = "export.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where the weights come from."""

    kind: Literal["run", "authors"]
    """`run`: trained here; `authors`: imported from a released file."""
    name: str
    """Name of the run or of the released model."""
    file: str | None = None
    """The imported file."""
    sha256: str | None = None
    """Of the imported file."""
    recipe_sha256: str | None = None
    """Of the run's resolved recipe (`tim_ds.config.recipe.recipe_hash`)."""
    average: str | None = None
    """Which average of the run's weights: the name it has in `train.ema`, or the width of a later one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What the weights of an export folder are, and how they are sampled unless a request says otherwise."""

    format: Literal[1] = 1
    model: ModelConfig
    transport: TransportConfig
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    autoencoder: AutoencoderConfig | None = None
    text_encoder: TextEncoderConfig | None = None
    step: int
    """Optimiser steps behind the weights; 0 if not known."""
    source: SourceConfig


def meta_network(config: ModelConfig) -> TiM:
    """The network without storage: names, shapes and parameter counts at no cost."""
    with torch.device("meta"):
        return TiM(config)


def write_export(
    folder: str | os.PathLike[str], export: Export, state: Mapping[str, Tensor], *, overwrite: bool = False
) -> None:
    """Write an export folder. Weights first, description last: an interrupted write leaves no `export.json`.

    Raises:
        CheckpointError: if `state` is not that of `export.model`, if the folder holds an export already and
            `overwrite` is not set, or if it cannot be written.
    """
    folder = Path(folder)
    check_weights(meta_network(export.model).state_dict(), state, source=str(folder))
    with _described(folder, export, overwrite=overwrite) as weights:
        write_weights(weights, state, {"format": "pt"})


def stream_export(
    folder: str | os.PathLike[str],
    export: Export,
    read: Callable[[str, Tensor], Tensor],
    *,
    overwrite: bool = False,
) -> None:
    """As `write_export`, with float32 weights that are read one at a time.

    Args:
        read: the tensor of a name, of the shape of another.
    Raises:
        CheckpointError: if the folder holds an export already and `overwrite` is not set, or if it cannot be
            written.
    """
    network = meta_network(export.model).state_dict()
    with _described(Path(folder), export, overwrite=overwrite) as weights:
        tensors = ((name, read(name, like)) for name, like in network.items())
        stream_weights(weights, network, tensors, {"format": "pt"})


@contextmanager
def _described(folder: Path, export: Export, *, overwrite: bool) -> Iterator[Path]:
    """Gives the path to write the weights to; the description is written when they are."""
    weights, description = folder / WEIGHTS_FILE, folder / EXPORT_FILE
    if not overwrite and (taken := [p.name for p in (weights, description) if p.exists()]):
        raise CheckpointError(f"{folder}: holds {' and '.join(taken)} already; choose another folder")
    text = json.dumps(dataclasses.asdict(export), indent=2) + "\n"
    try:
        description.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{description}: cannot be replaced ({error.strerror})") from error
    yield weights
    write_aside(description, len(text), lambda aside: aside.write_text(text))


def read_export(folder: str | os.PathLike[str]) -> tuple[Export, dict[str, Tensor]]:
    """What `write_export` wrote, the weights on the CPU, checked against the description.

    Raises:
        CheckpointError: if the folder is not a whole export, or its parts do not belong together.
    """
    folder = Path(folder)
    export = _read_description(folder)
    state = read_weights(folder / WEIGHTS_FILE)
    check_weights(meta_network(export.model).state_dict(), state, source=str(folder / WEIGHTS_FILE))
    return export, state


def open_export(folder: str | os.PathLike[str]) -> tuple[Export, Callable[[str, Tensor], Tensor]]:
    """An export folder whose tensors are read from the disk one at a time, when they are asked for.

    Returns:
        The description; and the tensor of a name, in the dtype of the tensor that it is asked for.
    Raises:
        CheckpointError: as `read_export`; names and shapes are checked at once.
    """
    folder = Path(folder)
    export = _read_description(folder)
    path = folder / WEIGHTS_FILE
    return export, open_weights(path, meta_network(export.model).state_dict())


def _read_description(folder: Path) -> Export:
    description = folder / EXPORT_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such export folder")
    if not description.exists():
        raise CheckpointError(f"{folder}: holds no {EXPORT_FILE}: not an export folder, or one cut short")
    try:
        export = decode(
            Export, from_python(json.loads(description.read_text()), description.name), name="export"
        )
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise CheckpointError(f"{description}:\n  " + "\n  ".join(str(error).splitlines())) from error
        raise CheckpointError(f"{description}: cannot be read ({error})") from error
    return export


def load_network(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[TiM, Export]:
    """The network of an export folder on `device`, in evaluation mode, its parameters in `dtype`.

    Raises:
        CheckpointError: as `read_export`.
    """
    export, state = read_export(folder)
    network = meta_network(export.model).to(dtype).to_empty(device=device)
    load_weights_into(network, state, source=str(folder))
    return network.eval(), export
