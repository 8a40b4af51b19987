"""Command line of `launch/train.py`.

    deepspeed launch/train.py RECIPE --ds ds_configs/zero3.json --run runs/NAME [section.key=value ...]

The same command starts a run, continues one that was stopped, and says so if the run is finished.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.command import USER_ERROR, command
from data_pipeline.errors import DataError
from tim_ds.config.load import load_recipe, split_arguments
from tim_ds.errors import TimError
from tim_ds.trainer.engine import TIMEOUT_MARGIN_S, read_engine_file, start_world, stop_world
from tim_ds.trainer.meeting import START_WITHIN_S, RankAbsentError
from tim_ds.trainer.output import outlasting_readers
from tim_ds.trainer.preflight import check
from tim_ds.trainer.run import train
from tim_ds.trainer.signals import STOPPED, RunStopped, StopSignals
from tim_ds.trainer.watch import DEAD_AFTER_S, HUNG_AFTER_S, LOST, Watch


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `launch/train.py`. Returns the exit status: 2 for what the user can put right,
    `STOPPED` after a signal, `LOST` where a rank did not start. (Where one is missing later, `LOST` does not
    return.)"""
    with outlasting_readers():
        return _parse_and_run(arguments)


def _parse_and_run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(description="Train, or continue, the run of a recipe under DeepSpeed.")
    parser.add_argument("recipe", nargs="+", help="a YAML file, and section.key=value to override settings")
    parser.add_argument("--ds", required=True, type=Path, help="engine file: ds_configs/*.json")
    parser.add_argument("--run", type=Path, help="folder of the run, made or continued")
    parser.add_argument(
        "--check",
        action="store_true",
        help="verify everything, take one step, write nothing, and say what would be",
    )
    parser.add_argument("--no-step", action="store_true", help="with --check: without the step")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="with --check and no launcher: ranks that the run will have (1)",
    )
    parser.add_argument("--per-node", type=int, metavar="N", help="with --check: ranks of a node (8)")
    parser.add_argument(
        "--card-gib", type=float, metavar="GIB", help="with --check: GPU memory, if not this one's"
    )
    parser.add_argument(
        "--hung-after",
        type=float,
        default=HUNG_AFTER_S,
        metavar="SECONDS",
        help="end the job, naming the rank that is behind, when no rank advances for so long "
        "(default %(default)g)",
    )
    parser.add_argument(
        "--dead-after",
        type=float,
        default=DEAD_AFTER_S,
        metavar="SECONDS",
        help="end the job, naming the rank, when one gives no sign of life for so long (default %(default)g)",
    )
    parser.add_argument(
        "--start-within",
        type=float,
        default=START_WITHIN_S,
        metavar="SECONDS",
        help="end the job, naming the ranks, when some have not started so long after the first "
        "(default %(default)g)",
    )
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    paths, overrides = split_arguments(options.recipe)
    if len(paths) != 1:
        parser.error(f"expected one recipe, received {len(paths)}: {' '.join(paths)}")
    if options.run is None and not options.check:
        parser.error("the following arguments are required: --run")
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        if options.check:
            return check(
                paths[0],
                overrides,
                options.ds,
                options.run,
                ranks=options.ranks,
                per_node=options.per_node,
                card_gib=options.card_gib,
                with_step=not options.no_step,
                start_within_s=options.start_within,
            )
        with StopSignals().installed() as signals:
            return _main(options, paths[0], overrides, signals, is_main)
    except RankAbsentError as error:
        print(f"error (rank {os.environ['RANK']}): {error}", file=sys.stderr)
        return LOST


def _main(
    options: argparse.Namespace, path: str, overrides: Sequence[str], signals: StopSignals, is_main: bool
) -> int:
    world = None
    try:
        recipe = load_recipe(path, overrides)
        read_engine_file(options.ds)
        # The watch names who is missing before a collective fails without a name.
        timeout_s = options.hung_after + TIMEOUT_MARGIN_S
        with Watch(options.hung_after, options.dead_after) as watch:
            world = start_world(timeout_s=timeout_s, start_within_s=options.start_within, watch=watch)
            message = train(recipe, options.run, options.ds, world, signals=signals, watch=watch)
    except RunStopped as stopped:
        assert world is not None  # a run stops after it began
        stop_world(world)
        if is_main:
            print(f"{options.run}: {stopped}. The same command continues it")
        return STOPPED
    except (TimError, DataError) as error:
        # Before the ranks met, each meets the same error; later, one may fail alone.
        alone = world is not None and world.shared_error is not error
        if is_main or alone:
            rank = f" (rank {world.rank})" if world is not None and not is_main else ""
            print(f"error{rank}: {error}", file=sys.stderr)
        if world is not None:
            stop_world(world, failed=True)
        return USER_ERROR
    stop_world(world)
    if is_main:
        print(message)
    return 0
