"""Sample grids while training: fixed prompts, sizes and seeds, several step counts, averaged weights."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from tim_ds.config.recipe import Recipe
from tim_ds.errors import CheckpointError
from tim_ds.eval.sheet import SheetBlock, SheetRow, contact_sheet
from tim_ds.model.export_folder import Export, SourceConfig
from tim_ds.pipeline import PipelineOutput, TiMPipeline, write_png
from tim_ds.trainer.drawing import draw_for_main
from tim_ds.trainer.in_step import InStep
from tim_ds.trainer.metrics import MetricsLog
from tim_ds.trainer.world import World

logger = logging.getLogger(__name__)

PREVIEWS = "previews"


def describe_export(recipe: Recipe, step: int, recipe_sha256: str, *, average: str | None = None) -> Export:
    """What weights of this run are, for sampling and for those who get them.

    Args:
        average: which average they are; by default the one that the recipe uses.
    """
    return Export(
        model=recipe.model,
        transport=recipe.objective.transport,
        sampler=recipe.sampler,
        autoencoder=recipe.data.autoencoder,
        text_encoder=recipe.data.text_encoder,
        step=step,
        source=SourceConfig(
            kind="run",
            name=recipe.name,
            recipe_sha256=recipe_sha256,
            average=average or recipe.train.ema.used.name,
        ),
    )


class Previews:
    """Samples on rank 0, and on the others where ZeRO-3 gave each a part of the weights; rank 0 decodes.

    Args:
        pipeline: of `drawing_pipeline`; its sampler decides all but the step counts.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: TiMPipeline,
        run_dir: Path,
        world: World,
        log: MetricsLog | None,
    ) -> None:
        self._config = recipe.train.preview
        self._folder = run_dir / PREVIEWS
        self._world = world
        self._log = log
        self._pipeline = pipeline
        self._in_step = InStep(pipeline.network, world)

    def __call__(self, step: int) -> None:
        """One sheet, a column a prompt and a row a step count: `previews/step_*.png` and TensorBoard."""
        config = self._config
        rows = []
        for num_steps in config.num_steps:
            # The weights are finite, or the step would have been refused: a picture is no reason to stop.
            output, problem = self._in_step.attempt(partial(self._draw, num_steps))
            if not self._world.is_main:
                continue
            if output is None:
                logger.warning("step %d: no preview at %d steps: %s", step, num_steps, problem)
                continue
            rows.append(SheetRow(f"{num_steps} steps" if num_steps > 1 else "1 step", output.pixels))
        if not rows:
            return
        sheet = contact_sheet(config.prompts, [SheetBlock("", rows)], footnote=f"EMA weights of step {step}")
        settings = {"step": step, "seed": config.seed, "num_steps": list(config.num_steps)}
        try:
            write_png(self._folder / f"step_{step:09d}.png", sheet, settings)
        except CheckpointError as error:
            # Nor is a full disk.
            logger.warning("step %d: the preview is not kept: %s", step, error)
        if self._log is not None:
            self._log.image("preview", sheet, step)

    def _draw(self, num_steps: int) -> PipelineOutput | None:
        config = self._config
        return draw_for_main(
            self._pipeline,
            self._in_step,
            self._world,
            config.prompts,
            config.sizes,
            num_steps=num_steps,
            seeds=config.seed,
        )
