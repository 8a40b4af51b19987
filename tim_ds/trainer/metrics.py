"""What a run reports: TensorBoard scalars, JSON lines, and the sums behind them.

Sums stay on the device between log steps and travel with the checkpoint, so that `metrics.jsonl` of a run
that was killed and resumed equals that of one that was not. Only what depends on the clock, under `speed`,
differs.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tim_ds.errors import CheckpointError
from tim_ds.objective.loss import LossTerms
from tim_ds.objective.transport import Transport
from tim_ds.trainer.board import Board
from tim_ds.trainer.flops import StepFlops
from tim_ds.trainer.inputs import StepInputs
from tim_ds.trainer.line_file import LineFile
from tim_ds.trainer.world import World

NUM_BINS = 8
"""Equal bins of t and of t - r over the transport's range."""

METRICS_FILE = "metrics.jsonl"

_TERMS = ("total_S", "denoising_S", "directional_S", "alignment_S")
_COUNTS = ("images", "tokens", "packs", "replaced")
_FLOPS = ("model", "executed", "forward", "derivative")
_NUM_SUMS = len(_COUNTS) + len(_FLOPS) + len(_TERMS) + 4 * NUM_BINS


class Sums:
    """Sums over the images of an interval, of this rank.

    A step's sums are kept apart until it is known to have been applied: skipped steps enter no mean.

    Args:
        flops_of: counts the operations of a micro-step on the host; without it there are none.
    """

    def __init__(
        self,
        transport: Transport,
        device: torch.device,
        flops_of: Callable[[StepInputs], StepFlops] | None = None,
    ) -> None:
        self._range = (transport.T_min, transport.T_max)
        self._flops_of = flops_of
        self.interval = torch.zeros(_NUM_SUMS, dtype=torch.float64, device=device)
        self.norm = torch.zeros(2, dtype=torch.float64, device=device)
        """Sum and number of the gradient norms of applied steps; the same on every rank."""
        self._step = torch.zeros_like(self.interval)

    def add(self, inputs: StepInputs, terms: LossTerms) -> None:
        """The images of one micro-step."""
        low, high = self._range
        t_S, r_S = inputs.times.t_S, inputs.times.r_S
        denoising_S = terms.denoising_S.double()
        flops = None if self._flops_of is None else self._flops_of(inputs)
        counts = [
            inputs.num_images,
            inputs.segments.num_tokens,
            1,
            inputs.num_replaced,
            *(0 if flops is None else getattr(flops, name) for name in _FLOPS),
        ]
        parts = [
            torch.tensor(counts, dtype=torch.float64).to(self._step.device, non_blocking=True),
            torch.stack([getattr(terms, name).double().sum() for name in _TERMS]),
        ]
        for value_S in (t_S - low, t_S - r_S):
            bins_S = (value_S / (high - low) * NUM_BINS).long().clamp(0, NUM_BINS - 1)
            zeros = denoising_S.new_zeros(NUM_BINS)
            parts.append(zeros.index_add(0, bins_S, denoising_S))
            parts.append(zeros.index_add(0, bins_S, torch.ones_like(denoising_S)))
        self._step += torch.cat(parts)

    def end_step(self, *, applied: bool, grad_norm: float | Tensor) -> None:
        if applied:
            self.interval += self._step
            norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=self.norm.device)
            self.norm += torch.stack([norm, torch.ones_like(norm)])
        self._step.zero_()

    def take(self, world: World) -> dict[str, Any]:
        """Means over the interval and all ranks. Waits for the device; starts the next interval."""
        total = world.sum(self.interval.clone())
        values = torch.cat([total, self.norm]).tolist()
        self.interval.zero_()
        self.norm.zero_()
        counts = dict(zip(_COUNTS, values, strict=False))
        flops = dict(zip(_FLOPS, values[len(_COUNTS) :], strict=False))
        values = values[len(_COUNTS) + len(_FLOPS) :]
        images = counts["images"]
        means = {
            name.removesuffix("_S"): _ratio(value, images)
            for name, value in zip(_TERMS, values, strict=False)
        }
        bins = [values[len(_TERMS) + i * NUM_BINS :][:NUM_BINS] for i in range(4)]
        norm_sum, norm_count = values[-2:]
        return {
            "loss": means["total"],
            "denoising": means["denoising"],
            "directional": means["directional"],
            "alignment": means["alignment"],
            "denoising_by_t": [_ratio(s, n) for s, n in zip(bins[0], bins[1], strict=True)],
            "denoising_by_interval": [_ratio(s, n) for s, n in zip(bins[2], bins[3], strict=True)],
            "grad_norm": _ratio(norm_sum, norm_count),
            **{name: int(count) for name, count in counts.items()},
            "flops": flops,
        }

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.interval, "norm": self.norm}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue an interval that a checkpoint cut."""
        self.interval.copy_(state["sums"])
        self.norm.copy_(state["norm"])

    def add_states(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Continue, on one rank, an interval that other ranks counted."""
        for state in states:
            self.interval += state["sums"].to(self.interval.device)
        self.norm.copy_(states[0]["norm"])


def _ratio(value: float, count: float) -> float | None:
    return value / count if count else None


class MetricsLog:
    """Writes what `Sums` gives. Only rank 0 holds one.

    Args:
        folder: of the run.
        tokens_per_pack: budget of a pack, for the fill.
        start_step: step that the run continues after; what was written beyond it is dropped.
        num_devices: over which the work is spread.
        peak_flops: of one device in FLOP/s; None where it is not known.
        seconds_before: `interval_seconds` at the checkpoint that the run continues after, whose images the
            first line counts too.
    Raises:
        CheckpointError: from the constructor, if the disk refuses. Later, what it refuses is kept and written
            when it takes it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokens_per_pack: int,
        start_step: int,
        num_devices: int = 1,
        peak_flops: float | None = None,
        seconds_before: float = 0.0,
    ) -> None:
        path = folder / METRICS_FILE
        self._tokens_per_pack = tokens_per_pack
        self._num_devices = num_devices
        self._peak_flops = peak_flops
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_after(path, start_step)
            self._file = LineFile(path)
            self._board = Board(folder / "tensorboard", start_step + 1)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: metrics cannot be written: {error.strerror or error}. Checkpoints are "
                "whole; free space and run the same command again"
            ) from error
        self._since = time.perf_counter() - seconds_before

    @property
    def interval_seconds(self) -> float:
        """Since the last line."""
        return time.perf_counter() - self._since

    def log(
        self,
        step: int,
        means: Mapping[str, Any],
        *,
        lr: float,
        applied_steps: int,
        skipped_steps: int,
        phases: Mapping[str, Mapping[str, float]] | None = None,
        memory: Mapping[str, float | None] | None = None,
        retries: int = 0,
        unsaved_steps: int = 0,
        failed_saves: int = 0,
    ) -> None:
        """One line and its scalars at a log step.

        Args:
            phases: seconds of each phase since the last line, mean and largest over the ranks.
            memory: of the ranks that have most (`largest_memory`); by default of this process.
            retries: requests for data that failed or took too long since the last line, of all ranks.
            unsaved_steps: since the last complete checkpoint.
            failed_saves: saves since then that could not be written.
        """
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        phases = phases or {}
        counted = means.get("flops", {})
        per_device = {name: n / seconds / self._num_devices for name, n in counted.items() if n}
        carried = counted.get("derivative", 0)
        train = {
            **{name: value for name, value in means.items() if name != "flops"},
            "fill": _ratio(means["tokens"], means["packs"] * self._tokens_per_pack),
            "lr": lr,
            "applied_steps": applied_steps,
            "skipped_steps": skipped_steps,
        }
        speed = {
            "seconds": seconds,
            "images_per_s": means["images"] / seconds,
            "tokens_per_s": means["tokens"] / seconds,
            "data_wait_share": phases["data_wait"]["mean"] / seconds if "data_wait" in phases else None,
            "retries": retries,
            "unsaved_steps": unsaved_steps,
            "failed_saves": failed_saves,
            "tflops_per_device": per_device["model"] / 1e12 if per_device else None,
            "mfu": self._share_of_peak(per_device.get("model")),
            "hfu": self._share_of_peak(per_device.get("executed")),
            "derivative_share": carried / (counted["forward"] + carried) if carried else None,
            **(memory or memory_of_process()),
            "phases": phases,
        }
        self._file.add({"step": step, **train, "speed": speed})
        for group, values in (("train", train), ("speed", speed)):
            for name, value in values.items():
                self._add(f"{group}/{name}", value, step)

    def _share_of_peak(self, flops_per_s: float | None) -> float | None:
        return flops_per_s / self._peak_flops if flops_per_s and self._peak_flops else None

    def _add(self, tag: str, value: Any, step: int) -> None:
        """A scalar, or one for each bin or name; what has no value is left out."""
        if isinstance(value, Mapping):
            for name, entry in value.items():
                self._add(f"{tag}/{name}", entry, step)
        elif isinstance(value, list):
            for i, entry in enumerate(value):
                self._add(f"{tag}/{i / NUM_BINS:.3f}-{(i + 1) / NUM_BINS:.3f}", entry, step)
        elif value is not None:
            self._board.scalar(tag, value, step)

    def skipped(self, step: int, reason: str, samples: Sequence[str]) -> None:
        """A line about a step that was refused."""
        self._file.add({"step": step, "skipped": reason, "samples": list(samples)})

    def evaluated(
        self, step: int, values: Mapping[str, float | None], failures: Mapping[str, str] | None = None
    ) -> None:
        """A line and the scalars of an evaluation, with what failed in it and why."""
        line: dict[str, Any] = {"step": step, "evaluation": dict(values)}
        self._file.add(line | ({"failed": dict(failures)} if failures else {}))
        self._add("evaluation/failures", len(failures or {}), step)
        for name, value in values.items():
            self._add(f"evaluation/{name}", value, step)

    def image(self, tag: str, image: Any, step: int) -> None:
        """A picture for TensorBoard: uint8 [height, width, 3]."""
        self._board.image(tag, image, step)

    def flush(self) -> None:
        """Put the lines on the disk: a checkpoint must not know of steps that the file does not. They are
        written again where the file was deleted under the run."""
        self._file.take_up()
        self._file.write(flush=True)
        self._board.flush()

    def close(self) -> None:
        """Raises nothing: a disk that refuses must not hide the error that ended the run."""
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, oldest first. A last line that was cut off is left out."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _drop_after(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path.parent) if line["step"] <= step]
    aside = path.with_name(f".{path.name}.part")
    aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(aside, path)


def memory_of_process() -> dict[str, float | None]:
    """The most that this process has held so far in GiB, on its GPU and on the host."""
    on_gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {
        "memory_gib": on_gpu,
        "host_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def largest_memory(every: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The largest of each entry of `memory_of_process` over the ranks; None where none has a value."""
    return {
        name: max((found for one in every if (found := one[name]) is not None), default=None)
        for name in every[0]
    }
