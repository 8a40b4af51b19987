"""The averaged weights of a run as an export folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from tim_ds.config.recipe import Recipe, recipe_hash
from tim_ds.errors import CheckpointError
from tim_ds.model.export_folder import EXPORT_FILE, stream_export
from tim_ds.trainer.ema import Ema
from tim_ds.trainer.initial import read_initial
from tim_ds.trainer.lora import merged, write_adapter
from tim_ds.trainer.preview import describe_export
from tim_ds.trainer.world import World

EXPORT = "export"
ADAPTER_FOLDER = "adapter"


def export(
    recipe: Recipe,
    run_dir: Path,
    ema: Ema,
    world: World,
    step: int,
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Write the averaged weights as an export folder, as they are gathered; every rank calls this.

    An adapter is written in a folder of its own, and merged into the weights that it was trained on.

    Args:
        moved: called with every tensor.
    Raises:
        CheckpointError: on every rank, if it cannot be written.
    """

    def gather() -> Iterator[tuple[str, Tensor]]:
        for name, value in ema.full():
            moved()
            yield name.removeprefix("network."), value

    gathered, problem = gather(), None
    if world.is_main:
        try:
            _write_export(recipe, run_dir, gathered, step)
        except CheckpointError as error:
            problem = str(error)
    # The others gather what could not be written as well.
    for _ in gathered:
        pass
    problem = world.from_main(problem)
    if problem is not None:
        world.raise_everywhere(CheckpointError(problem))


def _write_export(recipe: Recipe, run_dir: Path, gathered: Iterator[tuple[str, Tensor]], step: int) -> None:
    description = describe_export(recipe, step, recipe_hash(recipe))
    adapter, base = recipe.train.adapter, recipe.train.init_from
    if adapter is None or base is None:

        def read(name: str, like: Tensor) -> Tensor:
            given, value = next(gathered)
            assert given == name  # both come in the network's own order
            return value

        stream_export(run_dir / EXPORT, description, read, overwrite=True)
        return
    state = {name: value.to("cpu", copy=True) for name, value in gathered}
    write_adapter(run_dir / ADAPTER_FOLDER, state, adapter, base)
    values = merged(read_initial(base).value, state, adapter)
    stream_export(run_dir / EXPORT, description, values, overwrite=True)


def exported_step(run_dir: Path) -> int | None:
    """Step of the exported weights; None without a whole export."""
    try:
        return int(json.loads((run_dir / EXPORT / EXPORT_FILE).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
