"""Weights out of any checkpoint of a run, with one tensor in memory at a time.

    python -m tim_ds.trainer.export RUN --out FOLDER [--step N] [--weights NAME] [--layout diffusers|adapter]

RUN is the folder of a run (its newest checkpoint, or the one of `--step`) or one checkpoint. The names are
those of the authors' code. `--layout tim` writes the folder that `TiMPipeline` and `launch/sample.py` read;
`diffusers` writes the layout of that library's pipelines: `transformer/` and `scheduler/`, each with its
configuration, and a `model_index.json` (whose classes are ours: the library itself has none for them). The
autoencoder and the text encoder stay where they are and are named.

Of a run with `train.adapter`, both layouts hold the adapter merged into the weights that it was trained on;
`--layout adapter` writes it alone, in peft's format.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from data_pipeline.command import command
from tim_ds import __version__
from tim_ds.config.recipe import Recipe, from_dict, recipe_hash
from tim_ds.errors import CheckpointError, TimError
from tim_ds.model.export_folder import Export, meta_network, stream_export
from tim_ds.model.weights import stream_weights, write_aside
from tim_ds.trainer.checkpoint import Checkpoint, CheckpointGoneError, find_checkpoints, read_checkpoint
from tim_ds.trainer.ema import piece_kind
from tim_ds.trainer.initial import read_base
from tim_ds.trainer.lora import CONFIG_FILE, WEIGHTS_FILE, merged, meta_adapter, write_adapter
from tim_ds.trainer.materialise import Values
from tim_ds.trainer.preview import describe_export

RAW = "raw"
"""Name of the trained weights themselves, among the averages."""

CHECKPOINTS = "checkpoints"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"

TRIES = 3
"""How often the newest checkpoint is read, if the run that writes them deletes it meanwhile."""

Layout = Literal["tim", "diffusers", "adapter"]

BASE_HELP = "weights that the run's adapter was trained on, if they are no longer at train.init_from"


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
    layout: Layout = "tim",
    base: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Write the weights of a checkpoint.

    Args:
        weights: name of an average, or `raw`; None: the average that the recipe uses.
        base: as in `network_values`.
    Raises:
        CheckpointError: if the checkpoint has no such weights, its adapter belongs to others, the folder
            holds an export already, or it cannot be written.
    """
    recipe = from_dict(checkpoint.manifest["recipe"], source=str(checkpoint.path))
    averages = [average.name for average in recipe.train.ema.averages]
    name = weights or recipe.train.ema.used.name
    if name != RAW and name not in averages:
        raise CheckpointError(
            f"{checkpoint.path}: no weights {name!r}; there are {', '.join([*averages, RAW])}"
        )
    kind = "master" if name == RAW else piece_kind(name)

    def stored(parameter: str, like: Tensor) -> Tensor:
        value = torch.empty(like.shape)
        checkpoint.fill(kind, f"network.{parameter}", 0, value.view(-1))
        return value

    export = describe_export(recipe, checkpoint.step, recipe_hash(recipe), average=name)
    if layout == "adapter":
        _write_adapter(folder, checkpoint, recipe, stored, base, overwrite=overwrite)
        return export
    values = network_values(recipe, checkpoint, stored, base)
    if layout == "tim":
        stream_export(folder, export, values, overwrite=overwrite)
    else:
        _write_diffusers(folder, export, recipe, values, overwrite=overwrite)
    return export


def network_values(recipe: Recipe, checkpoint: Checkpoint, stored: Values, base: str | None = None) -> Values:
    """Weights of the plain network: what a checkpoint stores, or the adapter that it stores merged into the
    weights that this was trained on.

    Args:
        stored: reads what is stored.
        base: where these weights are; None: at the recipe's `train.init_from`.
    Raises:
        CheckpointError: if they are not there, or are others.
    """
    adapter, source = recipe.train.adapter, base or recipe.train.init_from
    if adapter is None or source is None:
        return stored
    initial = read_base(checkpoint, source)
    trained = {name: stored(name, like) for name, like in meta_adapter(recipe.model, adapter).items()}
    return merged(initial.value, trained, adapter)


def _write_adapter(
    folder: Path, checkpoint: Checkpoint, recipe: Recipe, stored: Values, base: str | None, *, overwrite: bool
) -> None:
    adapter, source = recipe.train.adapter, base or recipe.train.init_from
    if adapter is None or source is None:
        raise CheckpointError(
            f"{checkpoint.path}: --layout adapter: the run trained all weights; choose tim or diffusers"
        )
    taken = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if (folder / name).exists()]
    if taken and not overwrite:
        raise CheckpointError(f"{folder}: holds {' and '.join(taken)} already; choose another folder")
    trained = {name: stored(name, like) for name, like in meta_adapter(recipe.model, adapter).items()}
    write_adapter(folder, trained, adapter, source)


def _write_diffusers(
    folder: Path, export: Export, recipe: Recipe, values: Values, *, overwrite: bool
) -> None:
    index = folder / "model_index.json"
    if index.exists() and not overwrite:
        raise CheckpointError(f"{folder}: holds {index.name} already; choose another folder")
    network = meta_network(export.model).state_dict()
    index.unlink(missing_ok=True)
    tensors = ((name, values(name, like)) for name, like in network.items())
    stream_weights(folder / "transformer" / DIFFUSERS_WEIGHTS, network, tensors, {"format": "pt"})
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


@command(TimError, OSError)
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
    parser.add_argument("--layout", choices=get_args(Layout), default="tim")
    parser.add_argument("--base", metavar="PATH", help=BASE_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    options = parser.parse_args(arguments)
    print(_export(options))
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
            base=options.base,
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
