"""Command line of the step benchmark; see `tim_ds.trainer.bench`."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from data_pipeline.command import command
from tim_ds.config.load import load_recipe, split_arguments
from tim_ds.config.recipe import Recipe
from tim_ds.errors import RequestError, TimError
from tim_ds.trainer import bench
from tim_ds.trainer.bench import report
from tim_ds.trainer.bench.contenders import IN_ORDER, Implementation, Objective, build_field
from tim_ds.trainer.bench.measure import Budget, Refusal, Row, cpu_clock, cuda_clock, measure
from tim_ds.trainer.bench.work import Sides, draw_work, shape_of

MIXED = "mixed"


@dataclass(frozen=True)
class Preset:
    sizes: tuple[str, ...]
    """Sides of squares in pixels, or MIXED, the most important first."""
    mixed: tuple[Sides, ...]
    """Native sizes of the mix, height and width: of each as many."""
    text_tokens: int
    overrides: tuple[str, ...] = ()
    """Of the recipe."""


PRESETS = {
    "full": Preset(
        ("1024", "256", "2048", "512", MIXED), ((1024, 1024), (1024, 1536), (1344, 768), (768, 512)), 128
    ),
    "small": Preset(
        ("256", MIXED),
        ((256, 256), (128, 384)),
        8,
        (
            "model.hidden_size=64",
            "model.depth=2",
            "model.num_heads=4",
            "model.adaln_hidden=24",
            "model.encoder_depth=1",
            "data.tokens_per_pack=512",
            "train.precision=fp32",
        ),
    ),
}


@command(TimError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, also where time or memory ran out; 1 if a contender disagreed or failed; 2 for wrong
    settings, or if nothing could be measured."""
    parser = _parser()
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_intermixed_args(words)
    if options.render is not None:
        return _render(options.render)
    paths, overrides = split_arguments(options.recipe)
    if len(paths) != 1:
        parser.error("expected one recipe")
    if options.append and options.out is None:
        parser.error("--append needs --out")
    preset = PRESETS[options.preset]
    given = {word.partition("=")[0] for word in overrides}
    kept = [word for word in preset.overrides if word.partition("=")[0] not in given]
    recipe = load_recipe(paths[0], [*kept, *overrides])
    return _run(options, recipe, preset, ["python -m tim_ds.trainer.bench", shlex.join(words)])


def images_of(size: str, recipe: Recipe, preset: Preset) -> list[tuple[Sides, int]]:
    """Images of a step by size: as many as the pack has room for, of every size an even number.

    Raises:
        RequestError: if the size is neither a side in pixels nor MIXED, or not of whole tokens.
    """
    sides: tuple[Sides, ...] = preset.mixed
    if size != MIXED:
        if not size.isdecimal() or not int(size):
            raise RequestError(f"--sizes: expected sides in pixels or {MIXED!r}, received {size!r}")
        sides = ((int(size), int(size)),)
    shape, _ = shape_of(recipe, [(one, 1) for one in sides], preset.text_tokens)
    pairs = max(1, recipe.data.tokens_per_pack // shape.num_tokens // 2)
    return [(one, 2 * pairs) for one in sides]


def _run(options: argparse.Namespace, recipe: Recipe, preset: Preset, command: Sequence[str]) -> int:
    sizes = {size: images_of(size, recipe, preset) for size in options.sizes or preset.sizes}
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(report.without_gpu(recipe, sizes, preset.text_tokens))
        if options.out is not None:
            print(f"\n{options.out} was not written: nothing was measured", file=sys.stderr)
            return 2
        return 0
    engine = options.engine
    if engine == "auto":
        engine = "plain" if importlib.util.find_spec("deepspeed") is None else "deepspeed"
    wanted = [
        pair for pair in IN_ORDER if pair[0] in options.implementations and pair[1] in options.objectives
    ]
    if device.type == "cpu":
        # Without a GPU there are no kernels: ours is the definitions already.
        wanted = [pair for pair in wanted if pair[0] != "ours, twins"]
    about = report.where(
        recipe,
        device,
        engine=engine,
        backend=options.backend,
        text_tokens=preset.text_tokens,
        command=command,
    )
    found: list[Row | Refusal] = []
    if options.append and options.out.exists():
        found = report.earlier(options.out, about)
    budget = Budget(options.seconds, options.repetitions)
    if device.type == "cpu":
        print(report.NOT_A_CLAIM, flush=True)
    clock = cpu_clock if device.type == "cpu" else cuda_clock(device)
    field = build_field(recipe, device, engine=engine, wanted=wanted, backend=options.backend)
    # Every size of a mix has compilations of its own, forward and derivative; beyond the limit torch would
    # go on uncompiled.
    limit = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    with closing(field), limit:
        for number, (size, images) in enumerate(sizes.items()):
            # Shapes are compiled in: what was compiled for another size is of no use here.
            torch.compiler.reset()
            work = draw_work(recipe, images, text_tokens=preset.text_tokens, device=device, seed=0)
            left = len(sizes) - number
            new = measure(size, work, field, recipe, budget, clock, sizes_left=left, say=_say)
            found = report.merged(found, new)
            _say(f"{size}: {sum(isinstance(one, Row) for one in new)} rows, {budget.left:.0f} s left")
            _store(options.out, about, found)
    print(report.page(about, found))
    if options.out is not None:
        _draw(options.out, about, found)
    return 1 if any(isinstance(one, Refusal) and one.kind in ("parity", "error") for one in found) else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _store(out: Path | None, about: dict[str, object], found: Sequence[Row | Refusal]) -> None:
    """After every size: a run that is cut short keeps what it has measured."""
    if out is not None:
        report.store(out, about, found)
        out.with_suffix(".md").write_text(report.page(about, found), encoding="utf-8")


def _draw(out: Path, about: dict[str, object], found: Sequence[Row | Refusal]) -> None:
    if report.plot(about, found, out.with_suffix(".png")):
        print(out.with_suffix(".md"), out.with_suffix(".png"), sep="\n")


def _render(path: Path) -> int:
    about, found = report.load(path)
    path.with_suffix(".md").write_text(report.page(about, found), encoding="utf-8")
    print(report.page(about, found))
    _draw(path, about, found)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tim_ds.trainer.bench",
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="*", help="a YAML file, and section.key=value to override settings")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu (for show)")
    parser.add_argument(
        "--preset", choices=PRESETS, default="full", help="small: a network and packs that a CPU can step"
    )
    parser.add_argument("--sizes", nargs="+", metavar="SIDE", help=f"sides in pixels, or {MIXED}")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=get_args(Implementation),
        default=get_args(Implementation),
        metavar="NAME",
    )
    parser.add_argument(
        "--objectives", nargs="+", choices=get_args(Objective), default=get_args(Objective), metavar="NAME"
    )
    parser.add_argument("--seconds", type=float, default=300.0, help="for the whole run (%(default)g)")
    parser.add_argument("--repetitions", type=int, default=20, help="at most (%(default)s)")
    engines = get_args(Literal["auto", "deepspeed", "plain"])
    parser.add_argument(
        "--engine",
        choices=engines,
        default="auto",
        help="what steps ours: DeepSpeed at stage 0 where it is installed, or AdamW alone (%(default)s)",
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile (%(default)s)")
    parser.add_argument("--out", type=Path, help="store the results as JSON, table and plot beside it")
    parser.add_argument(
        "--append",
        action="store_true",
        help="go on from the results in --out; what is measured again is replaced",
    )
    parser.add_argument("--render", type=Path, help="table and plot of stored results, and nothing else")
    return parser


if __name__ == "__main__":
    sys.exit(main())
