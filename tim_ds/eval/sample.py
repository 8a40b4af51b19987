"""Pictures from prompts: the command line of `launch/sample.py`.

python launch/sample.py --export RUN/export --prompt "a three above a seven" --size 16x8 --out pictures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tim_ds.errors import RequestError, TimError
from tim_ds.eval.sheet import gallery
from tim_ds.pipeline import TiMPipeline, refuse_unwritable, write_png

GRID_NAME = "grid.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Sample the prompts of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="launch/sample.py", description="Pictures from prompts.")
    parser.add_argument("--export", type=Path, required=True, help="export folder (RUN/export)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="caption or class label; may be repeated")
    source.add_argument("--prompts-file", type=Path, help="one prompt a line; empty lines are skipped")
    parser.add_argument("--size", action="append", required=True, help="HEIGHTxWIDTH; once, or once a prompt")
    parser.add_argument("--num", type=int, default=1, help="pictures a prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="transitions from noise to picture (default: the export's)")
    parser.add_argument("--cfg", type=float, help="guidance scale; 1 is unguided (default: the export's)")
    parser.add_argument("--mode", choices=("transition", "diffusion"), help="default: the export's")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first picture; the next takes the next number"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures, new or without any")
    options = parser.parse_args(arguments)
    try:
        _sample(options)
    except TimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _sample(options: argparse.Namespace) -> None:
    prompts = options.prompt or _read_prompts(options.prompts_file)
    if options.num < 1:
        raise RequestError(f"--num: expected at least 1, received {options.num}")
    if len(options.size) not in (1, len(prompts)):
        raise RequestError(
            f"--size: expected 1 or {len(prompts)}, one a prompt, received {len(options.size)}"
        )
    sizes = options.size * len(prompts) if len(options.size) == 1 else options.size
    if any(options.out.glob("*.png")):
        raise RequestError(f"{options.out}: holds pictures, which are not overwritten; choose another --out")
    refuse_unwritable(options.out)
    pipe = TiMPipeline.from_pretrained(options.export, device=options.device)
    output = pipe(
        [prompt for prompt in prompts for _ in range(options.num)],
        [size for size in sizes for _ in range(options.num)],
        num_steps=options.steps,
        cfg_scale=options.cfg,
        mode=options.mode,
        seeds=options.seed,
        progress=True,
    )
    for path in output.save(options.out):
        print(path)
    grid = options.out / GRID_NAME
    write_png(grid, gallery(output.images, [str(prompt) for prompt in output.prompts]), output.settings)
    print(grid)
    print(
        f"{len(output.images)} pictures, {output.nfe} network evaluations and "
        f"{1000 * output.seconds / len(output.images):.1f} ms each"
    )


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompts-file {path}: cannot be read ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise RequestError(f"--prompts-file {path}: expected at least one prompt, received none")
    return prompts
