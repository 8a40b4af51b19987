"""Trains and scores a setting of the study of derivative, shares and weights (`LOG.md`) over its seeds.

    python -m data_pipeline.handwriting --out runs/handwriting
    python -m tests.objective.study --data runs/handwriting --out runs/study \\
        --estimator everywhere --share 0.75 --adaptive kind --seeds 0 1 2

A run is `launch/recipes/handwriting_tim.yaml` with overrides, trained by the command line of
`launch/train.py` in a process of its own and scored by `launch/evaluate.py nfe`; the scores of the seeds are
then put side by side by `python -m tim_ds.eval.compare`, which also compares settings. Started again, it goes
on where it was.

A noisy estimator is `dde` whose own passes, and nothing else of a step, run in reduced precision: those of
`python -m tim_ds.objective.derivative_error`, which says how large their error is on a trained network.
`gaussian` is `dde` in float32 with white noise of three times every image's own derivative added.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from unittest import mock

import torch
from torch import Tensor, nn

from tim_ds.eval import cli as evaluation
from tim_ds.eval import compare
from tim_ds.objective import target
from tim_ds.objective.derivative import central_difference
from tim_ds.objective.derivative_error import Precision, at_precision
from tim_ds.objective.noised import NoisedPack
from tim_ds.packed import Network, Segments
from tim_ds.trainer import cli as training

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch" / "recipes" / "handwriting_tim.yaml"
ENGINE = ROOT / "ds_configs" / "cpu_smoke.json"

ESTIMATORS: dict[str, tuple[str, Precision]] = {
    "exact": ("paired", "float32"),
    "dde": ("dde", "float32"),
    "products": ("dde", "bf16 products"),
    "everywhere": ("dde", "bf16 everywhere"),
    "gaussian": ("dde", "float32"),
}
"""`objective.derivative`, and the precision of its own passes."""

GAUSSIAN_ERROR = 3.0
"""Noise over signal, in the 2-norm of an image."""

ADAPTIVE = {
    "off": ("objective.weight.adaptive=false", "objective.weight.adaptive_over=kind"),
    "on": ("objective.weight.adaptive=true", "objective.weight.adaptive_over=image"),
    "kind": ("objective.weight.adaptive=true", "objective.weight.adaptive_over=kind"),
}


@contextmanager
def derivative_of(estimator: str) -> Iterator[None]:
    """Within the block `dde` calls the network on its own, as `estimator` does, not with the main call."""
    precision = ESTIMATORS[estimator][1]
    noise = torch.Generator().manual_seed(0)

    def noisy(network: Network, pack: NoisedPack, indices: Sequence[int], step: float | None) -> Tensor:
        with at_precision(cast(nn.Module, network), precision):
            dF_TC = central_difference(network, pack, indices, step)
        return with_noise(dF_TC, pack.segments.select(indices), noise) if estimator == "gaussian" else dF_TC

    with mock.patch.object(target, "build_derivative", lambda config: noisy):
        yield


def with_noise(dF_TC: Tensor, segments: Segments, generator: torch.Generator) -> Tensor:
    """White noise of `GAUSSIAN_ERROR` times the mean square of every image, drawn anew in every call."""
    parts = dF_TC.split(list(segments.lengths))
    size_T1 = torch.cat([part.square().mean().sqrt().expand(len(part)) for part in parts])[:, None]
    return dF_TC + GAUSSIAN_ERROR * size_T1 * torch.randn(dF_TC.shape, generator=generator)


def overrides(estimator: str, share: float, adaptive: str, time: str, step: float | None) -> list[str]:
    """What a setting changes in the recipe. A fifth of the images that do not train r = t train r = T_min."""
    words = [
        f"objective.derivative={ESTIMATORS[estimator][0]}",
        f"objective.diffusion_share={share:g}",
        f"objective.consistency_share={0.2 * (1 - share):g}",
        f"objective.diffusion_time={time}",
        *ADAPTIVE[adaptive],
    ]
    return words if step is None else [*words, f"objective.derivative_step={step:g}"]


def train(arguments: Sequence[str], estimator: str) -> None:
    """The body of a training process: a process group lasts as long as its process."""
    if estimator in ("exact", "dde"):
        sys.exit(training.main(arguments))
    with derivative_of(estimator):
        sys.exit(training.main(arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and score every seed, print the table of the setting; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.objective.study", description="Train and score a setting of the study."
    )
    parser.add_argument("--data", type=Path, required=True, help="handwriting data set")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs of the study")
    parser.add_argument("--estimator", choices=ESTIMATORS, required=True)
    parser.add_argument("--share", type=float, required=True, help="of the images that train r = t")
    parser.add_argument("--adaptive", choices=ADAPTIVE, required=True, help="the adaptive weight")
    parser.add_argument("--time", choices=("first", "larger"), default="first", help="diffusion_time (first)")
    parser.add_argument("--step", type=float, help="half-width e of the difference (the transport's)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings (0)")
    options = parser.parse_args(arguments)

    name = f"{options.estimator}_{options.share:g}_{options.adaptive}_{options.time}"
    if options.step is not None:
        name += f"_e{options.step:g}"
    setting = overrides(options.estimator, options.share, options.adaptive, options.time, options.step)
    scored = []
    for seed in options.seeds:
        run, scores = options.out / f"{name}_s{seed}", options.out / f"{name}_s{seed}" / "nfe"
        scored.append(str(scores))
        words = [
            f"data.shards={options.data}",
            f"train.seed={seed}",
            "train.preview.every_steps=0",
            "train.checkpoint.every_steps=1500",
        ]
        command = [str(RECIPE), "--ds", str(ENGINE), "--run", str(run), *words, *setting]
        # Forked, a process would share the threads and the process group of this one.
        process = multiprocessing.get_context("spawn").Process(
            target=train, args=(command, options.estimator)
        )
        process.start()
        process.join()
        if process.exitcode != 0:
            return process.exitcode or 1
        score = [
            "nfe",
            str(run / "export"),
            "--label",
            name,
            "--data",
            str(options.data),
            "--out",
            str(scores),
        ]
        if (status := evaluation.main(score)) != 0:
            return status
    return compare.main(["--out", str(options.out / name), f"{name}={','.join(scored)}"])


if __name__ == "__main__":
    sys.exit(main())
