"""The training loop: micro-steps, the optimiser step, the average, and what happens every so many steps."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TextIO, cast

import torch
from torch import nn
from tqdm import tqdm

from data_pipeline.loader import StepLoader
from tim_ds.errors import CheckpointError, NonFiniteError
from tim_ds.objective.loss import LossTerms, non_finite_samples
from tim_ds.trainer.config import TrainConfig
from tim_ds.trainer.ema import Ema
from tim_ds.trainer.engine import Engine, StepResult
from tim_ds.trainer.inputs import StepInputs
from tim_ds.trainer.lr import learning_rate
from tim_ds.trainer.metrics import MetricsLog, Sums, largest_memory, memory_of_process
from tim_ds.trainer.phases import PhaseClock, over_ranks
from tim_ds.trainer.saves import Saves
from tim_ds.trainer.signals import RunStopped, StopAgreement
from tim_ds.trainer.step import StepOutput
from tim_ds.trainer.watch import Watch
from tim_ds.trainer.world import World

logger = logging.getLogger(__name__)

MAX_NAMED = 8
"""Samples that a message about a refused step names."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands. `step` counts steps of the data plan, refused ones included."""

    step: int = 0
    applied_steps: int = 0
    """Steps that moved the weights: what the learning rate and the average count."""
    skipped_steps: int = 0
    consecutive_skips: int = 0

    def after(self, *, applied: bool) -> Progress:
        if applied:
            return replace(
                self, step=self.step + 1, applied_steps=self.applied_steps + 1, consecutive_skips=0
            )
        return replace(
            self,
            step=self.step + 1,
            skipped_steps=self.skipped_steps + 1,
            consecutive_skips=self.consecutive_skips + 1,
        )


class _Seen(NamedTuple):
    """What a step needs to name its samples if it is refused."""

    keys: tuple[str, ...]
    terms: LossTerms


class LossyStream:
    """A stream whose writes may fail: the log of a run may lie on the disk that is full.

    Everything else is the stream's own; it equals the stream, by which tqdm knows a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._stream

    def __hash__(self) -> int:
        return hash(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@dataclass(eq=False)
class Loop:
    """Everything a run needs between its first and its last step.

    Args:
        teacher: frozen parameters that follow the average, by the name of the trained one; may be empty.
        saves: checkpoints and snapshots; called by all ranks.
        clock: times the phases of a step; `forward_phase` is the name of the forward, with all that it holds.
        preview, evaluate: sample pictures at a step; called by all ranks, while the module has the averaged
            weights.
        log: on rank 0.
        stop: stops all ranks after the same step, where one was asked to.
        watch: told where this rank stands.
    """

    config: TrainConfig
    engine: Engine
    ema: Ema
    loader: StepLoader[StepInputs]
    world: World
    sums: Sums
    progress: Progress
    saves: Saves
    teacher: dict[str, nn.Parameter]
    clock: PhaseClock
    forward_phase: str = "forward"
    preview: Callable[[int], None] | None = None
    evaluate: Callable[[int], None] | None = None
    log: MetricsLog | None = None
    stop: StopAgreement | None = None
    watch: Watch | None = None
    unsaved: str | None = None
    """Why the checkpoint that the run ends with could not be written."""
    _lr: float = 0.0
    _retries_told: int = 0
    _last_refusal: str = ""

    def run(self) -> Progress:
        """Train up to `config.steps`.

        Raises:
            RunStopped: on every rank, where one was asked to stop; a checkpoint is written before.
            CheckpointError: in place of it, on every rank, if that checkpoint could not be written.
            NonFiniteError: on every rank, after `config.max_skipped_steps` refused steps in a row; a
                checkpoint is written before, or the message says why not.
        """
        config = self.config
        bar = tqdm(
            total=config.steps,
            initial=self.progress.step,
            desc="train",
            unit="step",
            disable=not self.world.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            file=cast(TextIO, LossyStream(sys.stderr)),
        )
        if self.stop is not None and self.stop.before_first():
            self.world.raise_everywhere(
                RunStopped(f"stopped before step {self.progress.step + 1} ({self.stop.reason})")
            )
        first = self.progress.step + 1
        with bar:
            for micro_batches in self._steps():
                self._step(micro_batches)
                self.saves.look()
                step = self.progress.step
                if step == first:
                    # Only now the optimiser has its averages, and the device's memory has had its peak.
                    self.saves.prepare()
                if step % config.log_every == 0 or step == config.steps:
                    self._report(bar)
                if self.preview is not None and step % config.preview.every_steps == 0:
                    with self.clock.phase("preview"):
                        self._on_average(self.preview, step)
                if self.evaluate is not None and step % config.evaluation.every_steps == 0:
                    with self.clock.phase("preview"):
                        self._on_average(self.evaluate, step)
                if self._is_snapshot_step(step):
                    with self.clock.phase("save"):
                        self.saves.snapshot(self.progress)
                exhausted = self.progress.consecutive_skips >= config.max_skipped_steps
                stopped = self.stop is not None and self.stop.after(step)
                last = exhausted or stopped or step == config.steps
                if last or self._is_checkpoint_step(step):
                    with self.clock.phase("save"):
                        self.unsaved = self.saves.save(self.progress, last=last)
                if exhausted:
                    self._give_up()
                bar.update()
                if stopped and step < config.steps:
                    self._stop(step)
                if self.watch is not None:
                    self.watch.begin_step(step)
        return self.progress

    def _stop(self, step: int) -> None:
        reason = "" if self.stop is None else self.stop.reason
        if self.unsaved is not None:
            self.world.raise_everywhere(
                CheckpointError(
                    f"stopped after step {step} ({reason}), and NOT SAVED: {self.unsaved}. See to the disk; "
                    f"the same command continues after step {self.saves.saved_step}"
                )
            )
        self.world.raise_everywhere(RunStopped(f"stopped and saved after step {step} ({reason})"))

    def _steps(self) -> Iterator[Sequence[StepInputs]]:
        """The loader's steps, with the time that each was waited for."""
        steps = iter(self.loader)
        while True:
            with self.clock.phase("data_wait"):
                micro_batches = next(steps, None)
            if micro_batches is None:
                return
            yield micro_batches

    def _step(self, micro_batches: Sequence[StepInputs]) -> None:
        seen = []
        for i, batch in enumerate(micro_batches):
            inputs = batch.to(self.world.device)
            with self.clock.phase(self.forward_phase):
                output: StepOutput = self.engine.forward(inputs)
            with self.clock.phase("backward"):
                self.engine.backward(output.loss, last=i == len(micro_batches) - 1)
            self.sums.add(inputs, output.terms)
            seen.append(_Seen(inputs.keys, output.terms))
        self._lr = learning_rate(self.config.optimizer, self.progress.applied_steps, self.config.steps)
        with self.clock.phase("optimizer"):
            result = self.engine.apply(self._lr)
        self.progress = self.progress.after(applied=result.applied)
        self.sums.end_step(applied=result.applied, grad_norm=result.grad_norm)
        if not result.applied:
            self._report_refused(seen, result)
            return
        with self.clock.phase("optimizer"):
            self.ema.update(self.progress.applied_steps)
            if self.teacher:
                self.ema.write_into(self.teacher)

    def _report(self, bar: tqdm) -> None:  # type: ignore[type-arg]  # tqdm is generic in its stubs alone
        means = self.sums.take(self.world)
        retries = self.loader.num_retries
        told = self.world.gather((self.clock.take(), memory_of_process(), retries - self._retries_told))
        self._retries_told = retries
        if self.log is None:
            return
        progress = self.progress
        self.log.log(
            progress.step,
            means,
            lr=self._lr,
            applied_steps=progress.applied_steps,
            skipped_steps=progress.skipped_steps,
            phases=over_ranks([phases for phases, _, _ in told]),
            memory=largest_memory([memory for _, memory, _ in told]),
            retries=sum(count for _, _, count in told),
            unsaved_steps=progress.step - self.saves.saved_step,
            failed_saves=self.saves.failed,
        )
        if means["denoising"] is not None:
            bar.set_postfix(denoising=f"{means['denoising']:.4f}", refresh=False)

    def _report_refused(self, seen: Sequence[_Seen], result: StepResult) -> None:
        bad = [key for keys, terms in seen for key in non_finite_samples(terms, keys)]
        samples = [key for keys in self.world.gather(bad) for key in keys]
        reason = "loss is not finite"
        if not samples:
            reason = f"gradient norm is {float(result.grad_norm)} although every loss is finite"
            samples = [key for keys in self.world.gather([k for s in seen for k in s.keys]) for key in keys]
        if self.log is None:
            return
        self.log.skipped(self.progress.step, reason, samples)
        named = ", ".join(samples[:MAX_NAMED])
        more = f" and {len(samples) - MAX_NAMED} more" if len(samples) > MAX_NAMED else ""
        logger.warning("step %d skipped: %s; samples: %s%s", self.progress.step, reason, named, more)
        self._last_refusal = f"{reason}; samples of the last step: {named}{more}"

    def _give_up(self) -> None:
        progress = self.progress
        saved = "A checkpoint holds the weights of the last applied step"
        if self.unsaved is not None:
            saved = f"The last checkpoint is of step {self.saves.saved_step}: {self.unsaved}"
        self.world.raise_everywhere(
            NonFiniteError(
                f"train.max_skipped_steps: {progress.consecutive_skips} steps in a row were skipped, up to "
                f"step {progress.step}: {self.world.from_main(self._last_refusal)}. {saved}; inspect the "
                "samples, or lower the learning rate"
            )
        )

    def _is_checkpoint_step(self, step: int) -> bool:
        checkpoint = self.config.checkpoint
        return (
            step == self.config.steps or step % checkpoint.every_steps == 0 or step in checkpoint.milestones
        )

    def _is_snapshot_step(self, step: int) -> bool:
        every = self.config.ema.snapshots.every_steps
        applied = self.progress.applied_steps > 0
        return every > 0 and applied and (step % every == 0 or step == self.config.steps)

    def _on_average(self, action: Callable[[int], None], step: int) -> None:
        watch = self.watch or Watch()
        with self.ema.applied() as module, torch.no_grad():
            # However many pictures there are: what is drawn for hours is no rank that hangs.
            network = module.get_submodule("network")
            with network.register_forward_pre_hook(lambda *_: watch.moved()):
                action(step)
