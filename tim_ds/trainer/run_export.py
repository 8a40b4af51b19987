"""The averaged weights of a run as an export folder."""

from __future__ import annotations

import json
from pathlib import Path

from tim_ds.config.recipe import Recipe, recipe_hash
from tim_ds.errors import CheckpointError
from tim_ds.model.export_folder import EXPORT_FILE, stream_export, write_export
from tim_ds.trainer.ema import Ema
from tim_ds.trainer.initial import read_initial
from tim_ds.trainer.lora import merged, write_adapter
from tim_ds.trainer.preview import describe_export
from tim_ds.trainer.world import World

EXPORT = "export"
ADAPTER_FOLDER = "adapter"


def export(recipe: Recipe, run_dir: Path, ema: Ema, world: World, step: int) -> None:
    """Write the averaged weights as an export folder; every rank calls this.

    An adapter is written in a folder of its own, and merged into the weights that it was trained on.
    """
    state = {}
    for name, value in ema.full():
        if world.is_main:
            state[name.removeprefix("network.")] = value.to("cpu", copy=True)
    problem = None
    if world.is_main:
        description = describe_export(recipe, step, recipe_hash(recipe))
        adapter, base = recipe.train.adapter, recipe.train.init_from
        try:
            if adapter is not None and base is not None:
                write_adapter(run_dir / ADAPTER_FOLDER, state, adapter, base)
                read = merged(read_initial(base).value, state, adapter)
                stream_export(run_dir / EXPORT, description, read, overwrite=True)
            else:
                write_export(run_dir / EXPORT, description, state, overwrite=True)
        except CheckpointError as error:
            problem = str(error)
    problem = world.from_main(problem)
    if problem is not None:
        world.raise_everywhere(CheckpointError(problem))


def exported_step(run_dir: Path) -> int | None:
    """Step of the exported weights; None without a whole export."""
    try:
        return int(json.loads((run_dir / EXPORT / EXPORT_FILE).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
