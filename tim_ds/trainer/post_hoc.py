"""Averages of any width after the run, from its snapshots.

    python -m tim_ds.trainer.post_hoc RUN --sigma-rel 0.03 0.05 0.12 [--step N] [--out FOLDER]

A run whose recipe has `train.ema.snapshots` and one or two averages with `sigma_rel` can be given,
afterwards, the average of another width: the combination of stored ones whose profile is nearest. One tensor
is in memory at a time; each width becomes an export folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.command import command
from tim_ds.config.recipe import from_dict, recipe_hash
from tim_ds.errors import CheckpointError, TimError
from tim_ds.model.export_folder import stream_export
from tim_ds.trainer.checkpoint import Checkpoint
from tim_ds.trainer.config import WIDEST_SIGMA_REL
from tim_ds.trainer.ema import piece_kind
from tim_ds.trainer.ema_profiles import Profile, fit_profile, gamma_of
from tim_ds.trainer.export import BASE_HELP, network_values
from tim_ds.trainer.preview import describe_export
from tim_ds.trainer.snapshots import find_snapshots


class Stored(NamedTuple):
    """One average in one snapshot."""

    snapshot: Checkpoint
    name: str
    profile: Profile


def stored_averages(run_dir: Path, step: int | None = None) -> list[Stored]:
    """The power-function averages in the snapshots of a run, oldest first, up to the one of `step`.

    Raises:
        CheckpointError: if there are none, or none of `step`.
    """
    snapshots = find_snapshots(run_dir)
    if not snapshots:
        raise CheckpointError(
            f"{run_dir}: holds no snapshots; they are written by runs whose recipe has "
            "train.ema.snapshots.every_steps above 0"
        )
    steps = [snapshot.step for snapshot in snapshots]
    if step is not None and step not in steps:
        raise CheckpointError(
            f"{run_dir}: no snapshot of step {step}; there are {', '.join(map(str, steps))}"
        )
    stored = []
    for snapshot in snapshots:
        if step is not None and snapshot.step > step:
            break
        recipe = from_dict(snapshot.manifest["recipe"], source=str(snapshot.path))
        applied = snapshot.manifest["progress"]["applied_steps"]
        stored += [
            Stored(snapshot, average.name, Profile(applied, gamma_of(average.sigma_rel)))
            for average in recipe.train.ema.averages
            if average.sigma_rel is not None
        ]
    return stored


def reconstruct(
    stored: Sequence[Stored],
    sigma_rel: float,
    folder: Path,
    *,
    base: str | None = None,
    overwrite: bool = False,
) -> float:
    """Write the average of width `sigma_rel` at the last stored step as an export folder.

    Args:
        base: as in `network_values`.
    Returns:
        Error of the profile, relative (`ema_profiles.Fit.error`).
    Raises:
        CheckpointError: if a snapshot cannot be read or the folder not be written.
    """
    last = stored[-1]
    fit = fit_profile([s.profile for s in stored], Profile(last.profile.steps, gamma_of(sigma_rel)))
    recipe = from_dict(last.snapshot.manifest["recipe"], source=str(last.snapshot.path))
    export = describe_export(
        recipe, last.snapshot.step, recipe_hash(recipe), average=f"sigma_rel {sigma_rel:g}"
    )

    def read(name: str, like: Tensor) -> Tensor:
        # Coefficients have both signs and can be large: their sum is taken in float64.
        total = torch.zeros(like.numel(), dtype=torch.float64)
        part = torch.empty(like.numel())
        for s, coefficient in zip(stored, fit.coefficients, strict=True):
            s.snapshot.fill(piece_kind(s.name), f"network.{name}", 0, part)
            total.add_(part, alpha=float(coefficient))
        return total.float().view(like.shape)

    values = network_values(recipe, last.snapshot, read, base)
    stream_export(folder, export, values, overwrite=overwrite)
    return fit.error


@command(TimError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tim_ds.trainer.post_hoc",
        description="Write averages of a run's weights, of any width, from its snapshots.",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--sigma-rel",
        type=float,
        nargs="+",
        required=True,
        metavar="WIDTH",
        help=f"relative width, above 0 up to {WIDEST_SIGMA_REL:.3f}",
    )
    parser.add_argument("--step", type=int, help="step of a snapshot (default: the last)")
    parser.add_argument("--out", type=Path, help="folder of the exports (default: RUN/post_hoc)")
    parser.add_argument("--base", metavar="PATH", help=BASE_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is there")
    options = parser.parse_args(arguments)
    for width in options.sigma_rel:
        if not 0.0 < width <= WIDEST_SIGMA_REL:
            parser.error(f"--sigma-rel: expected above 0 up to {WIDEST_SIGMA_REL:.4f}, received {width}")
    stored = stored_averages(options.run, options.step)
    for width in options.sigma_rel:
        folder = (options.out or options.run / "post_hoc") / (
            f"sigma_rel_{width:g}_step_{stored[-1].snapshot.step}"
        )
        error = reconstruct(stored, width, folder, base=options.base, overwrite=options.overwrite)
        print(f"{folder}: profile error {error:.2%}, from {len(stored)} stored averages")
        if error > 0.1:
            print(
                f"warning: {folder}: the profile is far from the wanted one; stay between the widths of "
                "the run's averages, or take more snapshots",
                file=sys.stderr,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
