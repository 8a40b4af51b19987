"""Published benchmarks while training: the ranks share the drawing, rank 0 scores, and a failure is told, not
fatal.

Pictures, rows and scores are made by the code of `launch/evaluate.py`. `RUN/evaluations/KIND_SIZE` holds the
rows of all steps (`results.json`, `table.md`), the sheet and the pictures of the last evaluation.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tim_ds.config.recipe import Recipe
from tim_ds.errors import RequestError
from tim_ds.eval import benchmark_report, benchmarks
from tim_ds.eval.generate import Sampling, Wanted, chunks, claim, draw, identity_of, open_pictures, write
from tim_ds.eval.results import RESULTS_NAME, ResultRow, add_row
from tim_ds.model.weights import write_aside
from tim_ds.pipeline import PipelineOutput, PromptLike, TiMPipeline
from tim_ds.trainer.config import BenchmarkConfig, EvaluationConfig
from tim_ds.trainer.in_step import InStep, told
from tim_ds.trainer.metrics import MetricsLog
from tim_ds.trainer.world import World

EVALUATIONS = "evaluations"
"""Folder of a run."""
MEETING_S = 15.0
"""While rank 0 scores, all ranks meet this often: no collective waits long, and the watch sees progress."""

_FILES = ("metadata", "questions", "reference", "inception", "calibration")


class EvaluationFailedError(Exception):
    """An evaluation that could not be finished, raised on every rank alike."""


class EvaluationStoppedError(EvaluationFailedError):
    """The run was asked to stop: an evaluation must not use up the time that a save needs."""


@dataclass(frozen=True)
class _Planned:
    """One benchmark of the recipe."""

    config: BenchmarkConfig
    benchmark: benchmarks.Benchmark
    wanted: tuple[Wanted, ...]
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.config.kind}/{self.config.size}"


class Benchmarks:
    """The benchmarks of `train.evaluation.benchmarks`.

    Args:
        pipeline: on the network inside the root module.
        entered: told of progress, so that a long evaluation is not taken for a hung one.
        stopping: whether this rank was asked to stop; then evaluations are given up.
    Raises:
        RequestError: if a file, a model or a library is missing, or the network cannot draw the pictures.
    """

    def __init__(
        self,
        recipe: Recipe,
        pipeline: TiMPipeline,
        run_dir: Path,
        world: World,
        log: MetricsLog | None,
        entered: Callable[[str], None],
        stopping: Callable[[], bool],
    ) -> None:
        self._config: EvaluationConfig = recipe.train.evaluation
        self._pipeline = pipeline
        self._world = world
        self._log = log
        self._entered = entered
        self._stopping = stopping
        # Under ZeRO-3 every forward is one of all ranks: they draw the same pictures together.
        self._in_step = InStep(pipeline.network, world)
        self._planned = [
            self._plan(config, i, run_dir / EVALUATIONS / config.name)
            for i, config in enumerate(self._config.benchmarks)
        ]

    def _plan(self, config: BenchmarkConfig, i: int, folder: Path) -> _Planned:
        loads = self._world.is_main
        num_classes = self._pipeline.export.model.num_classes
        benchmark = build_loaded(config, i, num_classes=num_classes, loads=loads)
        benchmarks.check_network(benchmark, self._pipeline)
        wanted = tuple(benchmark.wanted(self._config.seed))
        self._pipeline.request(wanted[0].prompt, config.size)
        return _Planned(config, benchmark, wanted, folder)

    @property
    def prompts(self) -> Iterator[PromptLike]:
        """All that is drawn."""
        return (wanted.prompt for one in self._planned for wanted in one.wanted)

    def __call__(self, step: int) -> tuple[dict[str, float | None], dict[str, str]]:
        """(scores by name, failures by name), the scores on rank 0 alone. Called by all ranks."""
        values: dict[str, float | None] = {}
        failures: dict[str, str] = {}
        self._pipeline.export = replace(self._pipeline.export, step=step)
        for one in self._planned:
            for num_steps in self._config.num_steps:
                name = f"{one.title}/{num_steps}_steps"
                try:
                    row = self._evaluate(one, step, num_steps)
                except EvaluationFailedError as error:
                    failures[name] = str(error)
                    if isinstance(error, EvaluationStoppedError):
                        return values, failures
                    continue
                if row is not None:
                    values |= {f"{name}/{key}": value for key, value in row.scores.items()}
        return values, failures

    def _evaluate(self, one: _Planned, step: int, num_steps: int) -> ResultRow | None:
        folder = one.folder / f"steps_{num_steps:04d}"
        sampling = Sampling(
            size=one.config.size, num_steps=num_steps, seed=self._config.seed, batch=one.config.batch
        )
        self._on_main(lambda: self._begin(one, folder, sampling))
        self._draw(one.wanted, folder / "pictures", sampling)
        return self._on_main(lambda: self._score(one, folder, step))

    def _begin(self, one: _Planned, folder: Path, sampling: Sampling) -> None:
        # Of an earlier evaluation, or of this one before the run was continued.
        shutil.rmtree(folder, ignore_errors=True)
        identity = identity_of(self._pipeline, one.wanted, sampling, evaluation=one.config.kind)
        claim(folder / "pictures", identity, one.wanted)

    def _draw(self, wanted: tuple[Wanted, ...], folder: Path, sampling: Sampling) -> None:
        """Every rank its share, a call at a time; after each they tell each other whether it went well."""
        world = self._world
        ours = list(chunks(wanted, sampling.batch))
        if not self._in_step.needed:
            rounds = -(-len(ours) // world.size)
            ours = ours[world.rank :: world.size]
            ours += [()] * (rounds - len(ours))
        for part in ours:
            output, problem = None, None
            if part:
                output, problem = self._in_step.tried(partial(self._draw_part, part, sampling))
            if output is not None and (world.is_main or not self._in_step.needed):
                problem = _problem_of(partial(write, output, part, folder))
            self._agree(problem)

    def _draw_part(self, part: Sequence[Wanted], sampling: Sampling) -> PipelineOutput:
        decodes = self._world.is_main or not self._in_step.needed
        with self._pipeline.encoders_beside_network():
            return draw(self._pipeline, part, sampling, output_type="pil" if decodes else "latent")

    def _score(self, one: _Planned, folder: Path, step: int) -> ResultRow:
        device = str(self._world.device)
        pictures = open_pictures(folder / "pictures", one.wanted, progress=False)
        one.benchmark.to(device)
        try:
            scored = one.benchmark.score(
                pictures, folder / "cache", references=one.folder / "references", progress=False
            )
        finally:
            # The device's memory is the training's.
            one.benchmark.to("cpu")
        row = benchmarks.row_of(one.benchmark, pictures, scored, label=f"step {step}", device=device)
        rows = add_row(one.folder / RESULTS_NAME, row, key=_place)
        text = benchmark_report.table(rows, scored.columns, notes=benchmarks.notes_of(row, scored))
        write_aside(
            one.folder / benchmark_report.TABLE_NAME,
            len(text.encode()),
            lambda aside: aside.write_text(text, encoding="utf-8"),
        )
        sheet = benchmark_report.sheet_of(row, scored, pictures)
        benchmark_report.write_png(one.folder / f"{folder.name}.png", sheet, {"evaluation": row.evaluation})
        shutil.rmtree(folder / "cache", ignore_errors=True)
        if self._log is not None:
            self._log.image(f"evaluation/{one.title}/{folder.name}", sheet, step)
        return row

    def _on_main(self, action: Callable[[], ResultRow | None]) -> ResultRow | None:
        """Do something on rank 0, beside which all ranks meet every few seconds; its result there.

        Raises:
            EvaluationFailedError: on every rank, if it failed.
        """
        found: list[ResultRow | None] = []
        problems: list[str | None] = []

        def work() -> None:
            problems.append(_problem_of(lambda: found.append(action())))

        thread = threading.Thread(target=work, name="evaluation", daemon=True)
        if self._world.is_main:
            thread.start()
        working = True
        while working:
            if self._world.is_main:
                thread.join(MEETING_S)
            working = self._world.from_main(thread.is_alive())
            # Given up while it works: the thread ends with the process, if not before.
            self._agree(None)
        self._agree(problems[0] if problems else None)
        return found[0] if found else None

    def _agree(self, problem: str | None) -> None:
        answers = self._world.gather((problem, self._stopping()))
        self._entered("evaluation")
        if any(stopping for _, stopping in answers):
            raise EvaluationStoppedError("given up, because the run was asked to stop")
        problems = [told for told, _ in answers if told is not None]
        if problems:
            raise EvaluationFailedError(problems[0])


def build_loaded(
    config: BenchmarkConfig, i: int, *, num_classes: int | None, loads: bool
) -> benchmarks.Benchmark:
    """The benchmark of `train.evaluation.benchmarks[i]`, its prompts read, and its networks if it `loads`.

    Raises:
        RequestError: if a setting, a file, a model or a library is missing or does not fit.
    """
    where = f"train.evaluation.benchmarks[{i}]"
    names = (*_FILES, "limit", "num", "count", "detector", "clip", "vqa")
    given = {name: getattr(config, name) for name in names}
    given = {name: Path(v) if name in _FILES and v is not None else v for name, v in given.items()}
    if config.kind in ("geneval", "dpg"):
        given["num"] = given["num"] or 1
    if config.kind == "imagenet":
        given["num_classes"] = num_classes
    try:
        benchmark = benchmarks.build(config.kind, given, called=lambda name: name)
        if loads:
            benchmark.load()
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
    return benchmark


def _place(row: ResultRow) -> tuple[object, ...]:
    """Rows of one step and number of steps replace each other: a run may come by a step twice."""
    made_by = row.made_by or {}
    return row.label, made_by.get("num_steps"), made_by.get("size")


def _problem_of(action: Callable[[], object]) -> str | None:
    """What went wrong, if something did: whatever it is, the training goes on."""
    try:
        action()
    except Exception as error:
        return told(error)
    return None
