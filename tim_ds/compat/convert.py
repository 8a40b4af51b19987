"""The authors' weight files into export folders, and back."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from tim_ds.compat.authors import AUTHORS_SWITCHES, RELEASED, detect_model, released_config
from tim_ds.errors import CheckpointError
from tim_ds.model.export_folder import Export, SourceConfig, read_export, write_export
from tim_ds.model.weights import read_weights, sha256, write_aside, write_weights


def import_weights(
    file: str | os.PathLike[str], folder: str | os.PathLike[str], *, model: str | None = None
) -> Export:
    """Import a released weight file into a new export folder, with all of AUTHORS_SWITCHES set.

    Args:
        model: name in `RELEASED`; by default told from the shapes.
    Raises:
        CheckpointError: if the file is not exactly that model's (the projector may be absent), or the
            folder holds an export already.
    """
    export, state = read_released(file, model=model)
    try:
        write_export(folder, export, state)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: import as {export.source.name}: {error}") from error
    return export


def read_released(
    file: str | os.PathLike[str], *, model: str | None = None
) -> tuple[Export, dict[str, Tensor]]:
    """A released weight file and what it is, with all of AUTHORS_SWITCHES set. Its keys are not checked yet.

    Args:
        model: name in `RELEASED`; by default told from the shapes.
    Raises:
        CheckpointError: if the file cannot be read or its shapes fit no released model.
    """
    state = read_weights(file)
    try:
        name = model if model is not None else detect_model(state)
        config = released_config(name, state)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    released = RELEASED[name]
    export = Export(
        model=config,
        transport=released.transport,
        sampler=released.sampler,
        autoencoder=released.autoencoder,
        text_encoder=released.text_encoder,
        step=0,
        source=SourceConfig(kind="authors", name=name, file=Path(file).name, sha256=sha256(Path(file))),
    )
    return export, state


def export_weights(folder: str | os.PathLike[str], file: str | os.PathLike[str]) -> Export:
    """Write the weights of an export folder as one file that the authors' code loads.

    The names are the same and nothing is dropped. `.safetensors` or, for the loader of their text model,
    `.bin` or `.pt` (a pickled state dict).

    Raises:
        CheckpointError: if the folder is not a whole export, `file` exists or has another suffix.
    """
    path = Path(file)
    if path.suffix not in (".safetensors", ".bin", ".pt"):
        raise CheckpointError(f"{path}: expected a name that ends in .safetensors, .bin or .pt")
    if path.exists():
        raise CheckpointError(f"{path}: exists already; choose another name")
    export, state = read_export(folder)
    if path.suffix == ".safetensors":
        write_weights(path, state, {"format": "pt"})
    else:
        needed = sum(value.nbytes for value in state.values())
        write_aside(path, needed, lambda aside: torch.save(state, aside))
    return export


def differences_from_authors(export: Export) -> list[str]:
    """Settings of an export that the authors' code cannot follow: there it would draw other pictures."""
    layout = AUTHORS_SWITCHES["model.rope_layout"]
    found = []
    if export.model.rope_layout != layout:
        found.append(f"model.rope_layout is {export.model.rope_layout}; their positions are {layout}")
    if export.transport.kind == "tim":
        found.append("transport is tim; their code has no such class")
    if export.transport.kind == "edm" and export.transport.sigma_data != 1.0:
        found.append("transport is edm with sigma_data other than 1; their step is inconsistent there")
    return found
