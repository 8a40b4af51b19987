"""Evaluation while training: the suites of `launch/evaluate.py` on the averaged weights, every so many
steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tim_ds.config.recipe import Recipe
from tim_ds.eval import nfe, resolution
from tim_ds.eval.handwriting import HandwritingScorer
from tim_ds.eval.resolution import Picture
from tim_ds.eval.sheet import Section, gallery
from tim_ds.pipeline import PipelineOutput, PromptLike, TiMPipeline
from tim_ds.trainer.config import EvaluationConfig
from tim_ds.trainer.drawing import draw_for_main
from tim_ds.trainer.in_step import InStep
from tim_ds.trainer.metrics import MetricsLog
from tim_ds.trainer.world import World

logger = logging.getLogger(__name__)

_SHOWN = 16
"""Pictures of a set that TensorBoard shows."""


@dataclass(frozen=True)
class _Set:
    """Pictures that are scored together."""

    name: str
    captions: tuple[PromptLike, ...]
    sizes: tuple[str, ...]
    seeds: tuple[int, ...]
    score: Callable[[Sequence[Picture]], dict[str, float | None]]


class Evaluations:
    """Draws on rank 0, and on the others where ZeRO-3 gave each a part of the weights; rank 0 scores.

    Everything that an evaluation needs is loaded here, so that what is missing ends the run before its
    first step. Prompts and seeds are fixed: an evaluation depends on the weights alone, before and after a
    resume.

    Args:
        pipeline: of `drawing_pipeline`; its sampler decides all but the step counts.
        entered: told of progress, so that a long evaluation is not taken for a hung one.
        stopping: whether this rank was asked to stop; then benchmarks are given up.
    Raises:
        RequestError: if data, prompts or the scorer are missing, or the network cannot draw them.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: TiMPipeline,
        run_dir: Path,
        world: World,
        log: MetricsLog | None,
        entered: Callable[[str], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = recipe.train.evaluation
        self._world = world
        self._log = log
        self._entered = entered
        self._pipeline = pipeline
        self._in_step = InStep(pipeline.network, world)
        data = Path(self._config.data or recipe.data.shards)
        self._sets = [
            found
            for kind in self._config.kinds
            for found in (_nfe_sets if kind == "nfe" else _resolution_sets)(
                self._config, data, self._pipeline, str(world.device)
            )
        ]
        for one in self._sets:
            self._pipeline.request(one.captions, one.sizes, seeds=one.seeds)
        self._benchmarks = None
        if self._config.benchmarks:
            # matplotlib and its fonts are for those who ask for them.
            from tim_ds.trainer.benchmarks import Benchmarks

            self._benchmarks = Benchmarks(recipe, self._pipeline, run_dir, world, log, entered, stopping)

    def __call__(self, step: int) -> None:
        """Scores of every set at every step count: a line of the metrics and TensorBoard scalars.

        What fails is told, in the log and in that line, and the training goes on: a score is no reason to
        stop. Only an error that leaves the ranks apart is raised.
        """
        values: dict[str, float | None] = {}
        failures: dict[str, str] = {}
        for num_steps in self._config.num_steps:
            for one in self._sets:
                name = f"{one.name}/{num_steps}_steps"
                self._entered("evaluation")
                output, problem = self._in_step.attempt(partial(self._draw, one, num_steps))
                if problem is not None:
                    failures[name] = problem
                if output is None or self._log is None:
                    continue
                try:
                    scores = one.score(output.pixels)
                    captions = [str(text) for text in one.captions[:_SHOWN]]
                    sheet = gallery([Section("", output.pixels[:_SHOWN], captions)])
                except Exception as error:
                    failures[name] = f"{type(error).__name__}: {error}"
                    continue
                values |= {f"{name}/{key}": value for key, value in scores.items()}
                self._log.image(f"evaluation/{name}", sheet, step)
        if self._benchmarks is not None:
            found, failed = self._benchmarks(step)
            values |= found
            failures |= failed
        if self._log is not None:
            for name, reason in failures.items():
                logger.error("step %d: NO EVALUATION of %s: %s", step, name, reason)
            self._log.evaluated(step, values, failures)

    @property
    def prompts(self) -> Iterator[PromptLike]:
        """All that is drawn."""
        for one in self._sets:
            yield from one.captions
        if self._benchmarks is not None:
            yield from self._benchmarks.prompts

    def _draw(self, one: _Set, num_steps: int) -> PipelineOutput | None:
        return draw_for_main(
            self._pipeline,
            self._in_step,
            self._world,
            one.captions,
            one.sizes,
            num_steps=num_steps,
            seeds=one.seeds,
        )


def _nfe_sets(config: EvaluationConfig, data: Path, pipeline: TiMPipeline, device: str) -> list[_Set]:
    settings = nfe.Settings(num_seen=config.pictures, num_held_back=config.held_back, seed=config.seed)
    drawn = nfe.draw_prompt_sets(data, settings)
    scorer = HandwritingScorer.from_folder(data)
    resolution.check_handwriting(pipeline)

    def score(prompts: nfe.PromptSet, pictures: Sequence[Picture]) -> dict[str, float | None]:
        return resolution.shares(scorer.score(prompts.prompts, pictures))

    return [
        _Set(
            f"nfe/{prompts.name}",
            prompts.captions,
            tuple(f"{h}x{w}" for h, w in (prompt.size_px for prompt in prompts.prompts)),
            prompts.seeds,
            partial(score, prompts),
        )
        for prompts in drawn
    ]


def _resolution_sets(config: EvaluationConfig, data: Path, pipeline: TiMPipeline, device: str) -> list[_Set]:
    suite: resolution.HandwritingSuite | resolution.PromptSuite
    if config.prompts_file is None:
        suite = resolution.HandwritingSuite(
            data, pictures=config.pictures, longest=config.longest, seed=config.seed
        )
    else:
        scorer = None if config.scorer is None else resolution.load_scorer(config.scorer, device)
        suite = resolution.PromptSuite(
            Path(config.prompts_file), config.sizes, seed=config.seed, scorer=scorer
        )
    suite.check(pipeline)
    return [
        _Set(
            f"resolution/{group.size}",
            group.captions,
            (group.size,) * len(group.captions),
            group.seeds,
            partial(suite.score, group),
        )
        for group in suite.groups
    ]
