"""Command line of the evaluations: `python launch/evaluate.py EVALUATION ...`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipeline.command import command
from data_pipeline.errors import DataError
from data_pipeline.handwriting_words import NewName
from tim_ds.errors import RequestError, TimError
from tim_ds.eval import benchmarks, nfe, report, resolution, resolution_report, words
from tim_ds.eval.benchmark_cli import BENCHMARKS, pair
from tim_ds.eval.generate import choose_dtype
from tim_ds.eval.sample import device_of_process, place_of_process
from tim_ds.pipeline import refuse_unwritable


def _add_nfe(parser: argparse.ArgumentParser) -> None:
    default = nfe.Settings()
    parser.add_argument("export", type=Path, help="export folder of the network (RUN/export)")
    parser.add_argument("--baseline", type=Path, help="export folder of a network to compare with")
    parser.add_argument("--label", help="name of the network in table and plot (default: of its run)")
    parser.add_argument("--baseline-label", help="name of the baseline (default: of its run)")
    parser.add_argument("--data", type=Path, required=True, help="handwriting data set of the training")
    parser.add_argument("--out", type=Path, required=True, help="folder for table, pictures, plot and logs")
    parser.add_argument(
        "--steps", default=",".join(map(str, default.steps)), help="step counts (default: %(default)s)"
    )
    parser.add_argument(
        "--pictures", type=int, default=default.num_seen, help="of seen sizes (default: %(default)s)"
    )
    parser.add_argument(
        "--held-back",
        type=int,
        default=default.num_held_back,
        help="four digits in a row (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="of prompts and noise (default: %(default)s)"
    )
    parser.add_argument("--cfg", type=float, help="guidance scale (default: the export's)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")


def _nfe(options: argparse.Namespace) -> None:
    """Quality against the number of steps, on handwriting."""
    steps = _steps(options.steps)
    settings = nfe.Settings(
        steps=steps,
        num_seen=options.pictures,
        num_held_back=options.held_back,
        seed=options.seed,
        cfg_scale=options.cfg,
    )
    refuse_unwritable(options.out)
    exports = [(options.label, options.export)]
    if options.baseline is not None:
        exports.append((options.baseline_label, options.baseline))
    evaluation = nfe.run(exports, options.data, options.out, settings, device=options.device)
    paths = report.write(evaluation, options.out)
    print(f"\n{report.table(evaluation)}\n")
    for path in (options.out / nfe.RESULTS_NAME, *paths):
        print(f"written: {path}")


def _steps(text: str) -> tuple[int, ...]:
    try:
        steps = tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise RequestError(f"--steps: expected numbers with commas between, received {text!r}") from error
    if min(steps) < 1 or len(set(steps)) != len(steps):
        raise RequestError(f"--steps: expected different numbers of at least 1, received {text!r}")
    return steps


def _add_resolution(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", type=Path, help="trained weights (RUN, RUN/export, a checkpoint, ...)")
    parser.add_argument("--baseline", type=Path, help="trained weights of a network to compare with")
    parser.add_argument("--label", help="name of the network in table and plot (default: of its run)")
    parser.add_argument("--baseline-label", help="name of the baseline (default: of its run)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, help="handwriting data set of the training")
    source.add_argument("--prompts-file", type=Path, help="captions of a text-to-image network, one a line")
    parser.add_argument(
        "--longest", type=int, default=6, help="--data: digits of a picture (default: %(default)s)"
    )
    parser.add_argument(
        "--pictures", type=int, default=100, help="--data: pictures of each size (default: %(default)s)"
    )
    parser.add_argument(
        "--sizes",
        default=",".join(resolution.TABLE_4_SIZES),
        help="but for --data: HEIGHTxWIDTH with commas between (default: those of the paper's Table 4)",
    )
    parser.add_argument(
        "--scorer",
        help=f"{', '.join(BENCHMARKS)}: with its own prompts and the options below; with --prompts-file: "
        "clip=FOLDER, or package.module:callable (default: time and memory)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for table, pictures and plot")
    parser.add_argument(
        "--only", choices=("generate",), help="draw, on as many processes as a launcher starts"
    )
    parser.add_argument("--steps", default="4", help="step counts with commas between (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise (default: %(default)s)")
    parser.add_argument("--cfg", type=float, help="guidance scale (default: the export's)")
    parser.add_argument("--cfg-interval", metavar="LOW,HIGH", help="guided times (default: the export's)")
    parser.add_argument("--stochasticity", type=float, help="share of fresh noise (default: the export's)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: CUDA where there is some)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the sampled networks' parameters (default: %(default)s)",
    )
    group = parser.add_argument_group("--scorer BENCHMARK", "as in `launch/evaluate.py BENCHMARK --help`")
    for name in ("metadata", "questions", "reference", "inception", "calibration"):
        group.add_argument(f"--{name}", type=Path)
    for name in ("detector", "clip", "vqa"):
        group.add_argument(f"--{name}")
    for name in ("num", "count", "num-classes"):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--limit", type=int, help="that many of the prompts, spread over the file")
    group.add_argument("--batch-scored", type=int, default=32, help="pictures scored at a time")


_OF_BENCHMARKS = (
    *("metadata", "questions", "reference", "inception", "calibration", "detector", "clip", "vqa"),
    *("num", "count", "num_classes", "limit"),
)


def _resolution(options: argparse.Namespace) -> None:
    """Quality, time and memory against size and aspect ratio."""
    steps = _steps(options.steps)
    refuse_unwritable(options.out)
    scorer_name = options.scorer or ""
    given = {name: getattr(options, name) for name in _OF_BENCHMARKS}
    is_benchmark = scorer_name in BENCHMARKS
    if options.batch_scored < 1:
        raise RequestError(f"--batch-scored: expected at least 1, received {options.batch_scored}")
    if (options.data is not None) + (options.prompts_file is not None) + is_benchmark != 1:
        raise RequestError(
            f"what to draw: expected one of --data, --prompts-file and --scorer {', '.join(BENCHMARKS)}"
        )
    part = place_of_process()
    if part[1] > 1 and options.only is None:
        raise RequestError(
            "several processes can share the drawing alone: add --only generate, and score after"
        )
    device = device_of_process(options.device)
    suite: resolution.Suite
    if is_benchmark:
        benchmark = benchmarks.build(scorer_name, given, called=_option)
        if options.only is None:
            benchmark.load()
            benchmark.to(device)
        suite = resolution.BenchmarkSuite(
            benchmark, options.sizes.split(","), seed=options.seed, batch=options.batch_scored
        )
    elif strange := [_option(name) for name, value in given.items() if value is not None]:
        raise RequestError(f"{', '.join(strange)}: read with --scorer {', '.join(BENCHMARKS)} alone")
    elif options.data is not None:
        suite = resolution.HandwritingSuite(
            options.data, pictures=options.pictures, longest=options.longest, seed=options.seed
        )
    else:
        is_scored = scorer_name and options.only is None
        scorer = resolution.load_scorer(scorer_name, device) if is_scored else None
        suite = resolution.PromptSuite(
            options.prompts_file, options.sizes.split(","), seed=options.seed, scorer=scorer
        )
    exports = [(options.label, options.export)]
    if options.baseline is not None:
        exports.append((options.baseline_label, options.baseline))
    evaluation = resolution.run(
        exports,
        suite,
        options.out,
        steps=steps,
        sampler={
            "cfg_scale": options.cfg,
            "cfg_interval": pair(options.cfg_interval),
            "stochasticity": options.stochasticity,
        },
        device=device,
        dtype=choose_dtype(options.dtype),
        part=None if options.only is None else part,
    )
    if options.only is not None:
        return
    paths = resolution_report.write(evaluation, options.out)
    print(f"\n{resolution_report.table(evaluation)}\n")
    for path in (options.out / resolution.RESULTS_NAME, *paths):
        print(f"written: {path}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", type=Path, nargs="+", help="export folders, such as before and after")
    parser.add_argument("--rename", required=True, metavar="NUMERAL=WORD", help="the new word: five=quint")
    parser.add_argument("--data", type=Path, required=True, help="handwriting data set of the first training")
    parser.add_argument("--pictures", type=int, default=200, help="of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")


def _words(options: argparse.Namespace) -> None:
    """A digit's new name and the old words, on handwriting."""
    name = NewName.parse(options.rename)
    rows = [
        (
            str(export),
            words.score(
                export,
                options.data,
                name,
                count=options.pictures,
                num_steps=options.steps,
                seed=options.seed,
                device=options.device,
            ),
        )
        for export in options.export
    ]
    print(words.table(name, rows))


class _Evaluation(NamedTuple):
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    example: str


EVALUATIONS = {
    "nfe": _Evaluation(
        _add_nfe,
        _nfe,
        "runs/handwriting_tim/export --data runs/handwriting --out runs/handwriting_nfe",
    ),
    "resolution": _Evaluation(
        _add_resolution,
        _resolution,
        "runs/handwriting_tim --data runs/handwriting --steps 1,4 --out runs/resolution",
    ),
    "words": _Evaluation(
        _add_words,
        _words,
        "runs/handwriting_tim/export runs/renamed/export --rename five=quint --data runs/handwriting",
    ),
    **{name: _Evaluation(*benchmark) for name, benchmark in BENCHMARKS.items()},
}
"""The subcommands."""


@command(TimError, DataError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one evaluation; returns the exit status."""
    parser = argparse.ArgumentParser(description="Score a trained network.")
    commands = parser.add_subparsers(dest="evaluation", required=True, metavar="EVALUATION")
    for name, evaluation in EVALUATIONS.items():
        summary = evaluation.run.__doc__
        example = f"example: python launch/evaluate.py {name} {evaluation.example}"
        # Without abbreviations: --size A --size B, as sample.py has it, would be --sizes B.
        evaluation.add_arguments(
            commands.add_parser(name, help=summary, description=summary, epilog=example, allow_abbrev=False)
        )
    options = parser.parse_args(arguments)
    EVALUATIONS[options.evaluation].run(options)
    return 0
