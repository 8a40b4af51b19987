"""Pictures from prompts: the command line of `launch/sample.py`.

python launch/sample.py --export RUN --prompt "a three above a seven" --size 16x8 --out pictures
torchrun --nproc_per_node 8 launch/sample.py --export RUN --prompts-file prompts.jsonl --size 1024x1024
--out pictures

Pictures are gathered into batches first, in the order of the prompts, and the batches dealt to the
processes: a picture is the same to the bit whatever their number. Started again, the command keeps what is
finished.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_pipeline.command import command
from data_pipeline.errors import DataError
from tim_ds.errors import RequestError, TimError
from tim_ds.eval.draw import draw, find_finished, form_batches, picture_path
from tim_ds.eval.jobs import SAMPLER_KEYS, Job, Line, expand, read_drawn, read_lines
from tim_ds.eval.sheet import Section, gallery, largest_px, read_reduced
from tim_ds.model.memory import gib
from tim_ds.pipeline import TiMPipeline, read_settings, refuse_unwritable, write_png

GRID_NAME = "grid.png"
MAX_IN_GRID = 64


@command(TimError, DataError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Sample the prompts of the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    _sample(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Pictures from prompts.")
    parser.add_argument(
        "--export",
        type=Path,
        required=True,
        help="trained weights: an export, run or checkpoint folder, or a released weight file",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="caption or class label; may be repeated"
    )
    parser.add_argument(
        "--negative-prompt", help="what guidance leads the pictures of --prompt away from (--cfg beyond 1)"
    )
    parser.add_argument(
        "--prompts-file", type=Path, help="one prompt a line, or .jsonl with sizes, seeds and settings a line"
    )
    parser.add_argument(
        "--from",
        dest="drawn",
        type=Path,
        action="append",
        default=[],
        metavar="PICTURE",
        help="repeat a picture by the settings that it carries; may be repeated",
    )
    parser.add_argument("--size", action="append", default=[], help="HEIGHTxWIDTH; once, or once a prompt")
    parser.add_argument("--num", type=int, default=1, help="pictures a prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="transitions from noise to picture (default: the export's)")
    parser.add_argument("--cfg", type=float, help="guidance scale; 1 is unguided (default: the export's)")
    parser.add_argument(
        "--cfg-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="share of the times that is guided (default: the export's)",
    )
    parser.add_argument(
        "--stochasticity", type=float, help="fresh noise in inner steps (default: the export's)"
    )
    parser.add_argument("--mode", choices=("transition", "diffusion"), help="default: the export's")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first picture; the next takes the next number"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep the encoders on the host while they do not work: less memory of the GPU, more time",
    )
    parser.add_argument(
        "--tokens-per-batch",
        default="4096",
        help="image tokens of one network call, or `auto` for what memory allows (default: %(default)s)",
    )
    parser.add_argument(
        "--tile", type=int, help="side in pixels of the tiles that large pictures are decoded in"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures; kept if finished")
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def _sample(options: argparse.Namespace) -> None:
    rank, world = place_of_process()
    lines = [
        *(
            Line(prompt=prompt, where=f"prompt {prompt!r}", negative_prompt=options.negative_prompt)
            for prompt in options.prompt
        ),
        *(read_lines(options.prompts_file) if options.prompts_file is not None else []),
        *(read_drawn(path) for path in options.drawn),
    ]
    if not lines:
        raise RequestError("expected a prompt: give --prompt, --prompts-file or --from")
    if options.num < 1:
        raise RequestError(f"--num: expected at least 1, received {options.num}")
    given = {name: getattr(options, key) for key, name in SAMPLER_KEYS.items()}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    for key, name in SAMPLER_KEYS.items():
        if name in given and all(name in line.sampler for line in lines):
            raise RequestError(f"--{key.replace('_', '-')}: no use: every prompt has its own")
    if options.negative_prompt is not None and not options.prompt:
        raise RequestError("--negative-prompt: of --prompt, which is not given")
    jobs = expand(lines, options.size, num=options.num, seed=options.seed, sampler=given)
    refuse_unwritable(options.out)
    grid = _grid_path(options.out, [job.stem for job in jobs[:MAX_IN_GRID]])
    device = device_of_process(options.device)
    dtype = getattr(torch, options.dtype)
    pipe = TiMPipeline.from_pretrained(
        options.export, device="cpu" if options.offload else device, dtype=dtype
    )
    if options.offload:
        pipe.enable_model_cpu_offload(device=device)
    pipe.tokens_per_batch = _tokens(options.tokens_per_batch, pipe)
    if options.tile is not None:
        _set_tile(pipe, options.tile)
    for line in lines:
        if line.weights_sha256 not in (None, pipe.weights_sha256):
            logging.getLogger(__name__).warning(
                "%s was drawn with other weights than %s: the picture will be another",
                line.where,
                options.export,
            )
    batches = form_batches(pipe, jobs)[rank::world]
    finished = find_finished(pipe, batches, options.out)
    if finished:
        print(f"{plural(len(finished), 'picture')} finished and kept")
    drawn = draw(pipe, batches, finished, options.out, on_picture=_say, bar=rank == 0)
    if drawn.count:
        fewest, most = min(drawn.nfe), max(drawn.nfe)
        evaluations = plural(most, "network evaluation")
        if fewest < most:
            evaluations = f"{fewest} to {evaluations}"
        each_ms = 1000 * drawn.seconds / drawn.count
        print(
            f"{plural(drawn.count, 'picture')}, {evaluations} and {each_ms:.1f} ms each, "
            f"peak memory {gib(drawn.peak_bytes)}"
        )
    if all(picture_path(options.out, job).exists() for job in jobs):
        print(_write_grid(pipe, jobs, grid))


def _say(path: Path, seconds: float, peak: int) -> None:
    tqdm.write(f"{path}  {1000 * seconds:.1f} ms, peak memory {gib(peak)}", file=sys.stdout)


def _grid_path(out: Path, stems: Sequence[str]) -> Path:
    """The first of grid.png, grid_2.png, ... that is free or shows these pictures: no other is replaced.

    Raises:
        RequestError: if a file of such a name is something else.
    """
    for number in itertools.count(1):
        path = out / (GRID_NAME if number == 1 else GRID_NAME.replace(".", f"_{number}."))
        if not path.exists():
            return path
        stored = read_settings(path)
        if "grid" not in stored:
            raise RequestError(f"{path}: exists and is no grid of this command; move it away")
        if stored["grid"] == list(stems):
            return path
    raise AssertionError("unreachable: numbers do not end")


def _write_grid(pipe: TiMPipeline, jobs: Sequence[Job], path: Path) -> Path:
    """The first pictures on one sheet. Made from the files, so the last process to finish can do it."""
    shown = jobs[:MAX_IN_GRID]
    paths = [picture_path(path.parent, job) for job in shown]
    steps = [job.sampler.get("num_steps", pipe.export.sampler.num_steps) for job in shown]
    section = Section(
        "",
        [read_reduced(path, largest_px(len(shown))) for path in paths],
        [str(job.prompt) for job in shown],
        [
            f"{job.size}, seed {job.seed}" + (f", {plural(k, 'step')}" if len(set(steps)) > 1 else "")
            for job, k in zip(shown, steps, strict=True)
        ],
    )
    settings: dict[str, Any] = {"grid": [job.stem for job in shown], "pictures": len(jobs)}
    common = read_settings(paths[0])
    settings |= {key: common[key] for key in common if key not in ("prompt", "size", "seed")}
    about = [f"{common['model']}, training step {common['step']}"]
    if len(set(steps)) == 1:
        about.append(f"{plural(steps[0], 'step')}")
    if len(jobs) > len(shown):
        about.append(f"the first {len(shown)} of {len(jobs)} pictures")
    write_png(path, gallery([section], footnote="; ".join(about)), settings)
    return path


def plural(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def place_of_process() -> tuple[int, int]:
    """(rank, number of processes), as torchrun and the deepspeed launcher say."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def device_of_process(asked: str | None) -> str:
    if asked is not None and asked != "cuda":
        return asked
    if asked is None and not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def _tokens(text: str, pipe: TiMPipeline) -> int:
    if text == "auto":
        return pipe.fitting_tokens()
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(f"--tokens-per-batch: expected a number of at least 1 or auto, received {text!r}")
    return int(text)


def _set_tile(pipe: TiMPipeline, tile: int) -> None:
    try:
        pipe.enable_vae_tiling(tile)
    except RequestError as error:
        raise RequestError(f"--tile: {error}") from error
