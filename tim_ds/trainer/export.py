"""Weights out of any checkpoint of a run, with one tensor in memory at a time.

    python -m tim_ds.trainer.export RUN --out FOLDER [--step N] [--weights NAME] [--layout diffusers]

RUN is the folder of a run (its newest checkpoint, or the one of `--step`) or one checkpoint. The names are
those of the authors' code. `--layout tim` writes the folder that `TiMPipeline` and `launch/sample.py` read;
`diffusers` writes the layout of that library's pipelines: `transformer/` and `scheduler/`, each with its
configuration, and a `model_index.json` (whose classes are ours: the library itself has none for them). The
autoencoder and the text encoder stay where they are and are named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tim_ds import __version__
from tim_ds.config.recipe import Recipe, from_dict, recipe_hash
from tim_ds.errors import CheckpointError, TimError
from tim_ds.model.export_folder import Export, meta_network, stream_export
from tim_ds.model.weights import stream_weights, write_aside
from tim_ds.trainer.checkpoint import Checkpoint, CheckpointGoneError, find_checkpoints, read_checkpoint
from tim_ds.trainer.ema import piece_kind
from tim_ds.trainer.preview import describe_export

RAW = "raw"
"""Name of the trained weights themselves, among the averages."""

CHECKPOINTS = "checkpoints"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"

TRIES = 3
"""How often the newest checkpoint is read, if the run that writes them deletes it meanwhile."""

Read = Callable[[str, Sequence[int]], Tensor]


def find_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """A checkpoint of a run folder: the newest, or that of `step`; or the checkpoint that `path` is.

    Raises:
        CheckpointGoneError: if the run that writes them deleted it meanwhile.
        CheckpointError: if there is none, or its files are damaged.
    """
    if (path / CHECKPOINTS).is_dir():
        found = find_checkpoints(path / CHECKPOINTS)
        if not found:
            raise CheckpointError(f"{path}: holds no checkpoint")
        chosen = [c for c in found if step in (None, c.step)]
        if not chosen:
            raise CheckpointError(
                f"{path}: no checkpoint of step {step}; there are {', '.join(str(c.step) for c in found)}"
            )
        checkpoint = chosen[0]
    elif path.is_dir():
        checkpoint = read_checkpoint(path)
    else:
        raise CheckpointError(f"{path}: no such folder; name a run or one of its checkpoints")
    checkpoint.check()
    return checkpoint


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    weights: str | None = None,
    layout: Literal["tim", "diffusers"] = "tim",
    overwrite: bool = False,
) -> Export:
    """Write the weights of a checkpoint.

    Args:
        weights: name of an average, or `raw`; None: the average that the recipe uses.
    Raises:
        CheckpointError: if the checkpoint has no such weights, the folder holds an export already, or it
            cannot be written.
    """
    recipe = from_dict(checkpoint.manifest["recipe"], source=str(checkpoint.path))
    averages = [average.name for average in recipe.train.ema.averages]
    name = weights or recipe.train.ema.used.name
    if name != RAW and name not in averages:
        raise CheckpointError(
            f"{checkpoint.path}: no weights {name!r}; there are {', '.join([*averages, RAW])}"
        )
    kind = "master" if name == RAW else piece_kind(name)

    def read(parameter: str, shape: Sequence[int]) -> Tensor:
        value = torch.empty(math.prod(shape))
        checkpoint.fill(kind, f"network.{parameter}", 0, value)
        return value.view(*shape)

    export = describe_export(recipe, checkpoint.step, recipe_hash(recipe), average=name)
    if layout == "tim":
        stream_export(folder, export, read, overwrite=overwrite)
    else:
        _write_diffusers(folder, export, recipe, read, overwrite=overwrite)
    return export


def _write_diffusers(folder: Path, export: Export, recipe: Recipe, read: Read, *, overwrite: bool) -> None:
    index = folder / "model_index.json"
    if index.exists() and not overwrite:
        raise CheckpointError(f"{folder}: holds {index.name} already; choose another folder")
    shapes = {name: tuple(value.shape) for name, value in meta_network(export.model).state_dict().items()}
    index.unlink(missing_ok=True)
    tensors = ((name, read(name, shape)) for name, shape in shapes.items())
    stream_weights(folder / "transformer" / DIFFUSERS_WEIGHTS, shapes, tensors, {"format": "pt"})
    made_by = {"_tim_ds_version": __version__}
    _write_json(
        folder / "transformer" / "config.json",
        {"_class_name": "TiM", **made_by, **dataclasses.asdict(export.model)},
    )
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "SamplerConfig",
            **made_by,
            "transport": dataclasses.asdict(export.transport),
            "sampler": dataclasses.asdict(export.sampler),
        },
    )
    named = {"vae": export.autoencoder, "text_encoder": export.text_encoder}
    # Last: a folder that has it is whole.
    _write_json(
        index,
        {
            "_class_name": "TiMPipeline",
            **made_by,
            "transformer": ["tim_ds.model.tim", "TiM"],
            "scheduler": ["tim_ds.sampler.config", "SamplerConfig"],
            **{part: None if value is None else dataclasses.asdict(value) for part, value in named.items()},
            "step": export.step,
            "source": dataclasses.asdict(export.source),
            "name": recipe.name,
        },
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_aside(path, len(text), lambda aside: aside.write_text(text))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tim_ds.trainer.export", description="Write the weights of a checkpoint."
    )
    parser.add_argument("run", type=Path, help="folder of a run, or of one checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--weights", metavar="NAME", help=f"an average of train.ema, or {RAW!r} (default: its use)"
    )
    parser.add_argument("--layout", choices=("tim", "diffusers"), default="tim")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    options = parser.parse_args(arguments)
    try:
        told = _export(options)
    except TimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(told)
    return 0


def _export(options: argparse.Namespace, tries: int = TRIES) -> str:
    """What was written, from the newest checkpoint again if a run that trains replaced it meanwhile."""
    try:
        checkpoint = find_checkpoint(options.run, options.step)
        export = export_checkpoint(
            checkpoint,
            options.out,
            weights=options.weights,
            layout=options.layout,
            overwrite=options.overwrite,
        )
    except CheckpointGoneError as error:
        if options.step is not None or tries == 1 or not (options.run / CHECKPOINTS).is_dir():
            raise
        print(f"{error}; trying again", file=sys.stderr)
        return _export(options, tries - 1)
    return f"{options.out}: {export.source.average} weights of step {export.step} from {checkpoint.path}"


if __name__ == "__main__":
    sys.exit(main())
