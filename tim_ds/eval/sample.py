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
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data_pipeline.errors import DataError
from tim_ds.errors import RequestError, TimError
from tim_ds.eval.jobs import SAMPLER_KEYS, Job, Line, expand, read_drawn, read_lines
from tim_ds.eval.sheet import gallery
from tim_ds.model.memory import gib, peak_bytes, reset_peak
from tim_ds.pipeline import Request, TiMPipeline, read_settings, refuse_unwritable, write_png

GRID_NAME = "grid.png"
MAX_IN_GRID = 64

# What follows from the other settings, or says only who wrote the file.
_NOT_COMPARED = ("nfe", "version")


def main(arguments: Sequence[str] | None = None) -> int:
    """Sample the prompts of the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    try:
        _sample(options)
    except (TimError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/sample.py", description="Pictures from prompts.")
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


@dataclass(frozen=True)
class _Batch:
    """Pictures of one network call."""

    request: Request
    jobs: tuple[Job, ...]


def _sample(options: argparse.Namespace) -> None:
    rank, world = place_of_process()
    lines = [
        *(Line(prompt=prompt, where=f"prompt {prompt!r}") for prompt in options.prompt),
        *(read_lines(options.prompts_file) if options.prompts_file is not None else []),
        *(read_drawn(path) for path in options.drawn),
    ]
    if not lines:
        raise RequestError("expected a prompt: give --prompt, --prompts-file or --from")
    if options.num < 1:
        raise RequestError(f"--num: expected at least 1, received {options.num}")
    given = {name: getattr(options, key) for key, name in SAMPLER_KEYS.items()}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    jobs = expand(lines, options.size, num=options.num, seed=options.seed, sampler=given)
    refuse_unwritable(options.out)
    grid = options.out / GRID_NAME
    if grid.exists() and "grid" not in read_settings(grid):
        raise RequestError(f"{grid}: exists and is no grid of this command; move it away")
    pipe = TiMPipeline.from_pretrained(
        options.export, device=device_of_process(options.device), dtype=getattr(torch, options.dtype)
    )
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
    batches = _batches(pipe, jobs)
    mine = batches[rank::world]
    finished = _finished(pipe, mine, options.out)
    _draw(pipe, mine, finished, options.out, bar=rank == 0)
    if all(_path(options.out, job).exists() for job in jobs):
        print(_write_grid(pipe, jobs, options.out))


def _draw(pipe: TiMPipeline, batches: Sequence[_Batch], finished: set[str], out: Path, *, bar: bool) -> None:
    """Draw what is missing and say what each picture took."""
    begin, drawn, nfe, highest = time.perf_counter(), 0, 0, 0
    missing = [batch for batch in batches if any(job.stem not in finished for job in batch.jobs)]
    kept = sum(job.stem in finished for batch in batches for job in batch.jobs)
    if kept:
        print(f"{kept} pictures are finished and kept")
    total = sum(len(batch.jobs) * batch.request.config.num_steps for batch in missing)
    with tqdm(total=total, unit="step", desc="sample", leave=False, disable=not bar) as progress:
        for batch in missing:
            reset_peak(pipe.device)
            # A batch of which some pictures are finished is drawn whole: so the others come out as they would
            # have.
            output = pipe.run(batch.request, progress)
            peak = peak_bytes(pipe.device) or 0
            highest, nfe = max(highest, peak), output.nfe
            seconds = output.seconds / len(batch.jobs)
            for i, job in enumerate(batch.jobs):
                if job.stem in finished:
                    continue
                path = _path(out, job)
                write_png(path, output.images[i], output.picture_settings(i))
                drawn += 1
                tqdm.write(f"{path}  {1000 * seconds:.1f} ms, peak memory {gib(peak)}", file=sys.stdout)
    if drawn:
        each = 1000 * (time.perf_counter() - begin) / drawn
        print(
            f"{drawn} pictures, {nfe} network evaluations and {each:.1f} ms each, peak memory {gib(highest)}"
        )


def _batches(pipe: TiMPipeline, jobs: Sequence[Job]) -> list[_Batch]:
    """All batches, the same in every process. Checks every request before anything is drawn."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(json.dumps(dict(job.sampler), sort_keys=True), []).append(job)
    batches = []
    for group in groups.values():
        request = pipe.request(
            [job.prompt for job in group],
            [job.size for job in group],
            seeds=[job.seed for job in group],
            **group[0].sampler,
        )
        for numbers in pipe.batches(request):
            batches.append(_Batch(request.part(numbers), tuple(group[i] for i in numbers)))
    return batches


def _finished(pipe: TiMPipeline, batches: Sequence[_Batch], out: Path) -> set[str]:
    """Stems of the pictures that are there already, drawn as asked for.

    Raises:
        RequestError: if a file of that name is another picture; it is not overwritten.
    """
    found = set()
    for batch in batches:
        settings = pipe.settings(batch.request.config)
        for i, job in enumerate(batch.jobs):
            path = _path(out, job)
            if not path.exists():
                continue
            height, width = batch.request.sizes[i]
            wanted = {
                **settings,
                "prompt": batch.request.prompts[i],
                "size": f"{height}x{width}",
                "seed": batch.request.seeds[i],
            }
            stored = {k: v for k, v in read_settings(path).items() if k not in _NOT_COMPARED}
            if stored != wanted:
                differs = [
                    f"{key} is {json.dumps(stored.get(key), ensure_ascii=False)}, "
                    f"asked for {json.dumps(wanted.get(key), ensure_ascii=False)}"
                    for key in sorted({*stored, *wanted})
                    if stored.get(key) != wanted.get(key)
                ]
                raise RequestError(
                    f"{path}: exists and is another picture, which is not overwritten: {'; '.join(differs)}; "
                    f"choose another --out, or move the file away"
                )
            found.add(job.stem)
    return found


def _write_grid(pipe: TiMPipeline, jobs: Sequence[Job], out: Path) -> Path:
    """The first pictures on one sheet. Made from the files, so the last process to finish can do it."""
    shown = jobs[:MAX_IN_GRID]
    images = []
    for job in shown:
        with Image.open(_path(out, job)) as image:
            pixels = np.asarray(image)
        images.append(pixels[..., None] if pixels.ndim == 2 else pixels)
    path = out / GRID_NAME
    settings: dict[str, Any] = {"grid": [job.stem for job in shown], "pictures": len(jobs)}
    common = read_settings(_path(out, shown[0]))
    settings |= {key: common[key] for key in common if key not in ("prompt", "size", "seed")}
    write_png(path, gallery(images, [str(job.prompt) for job in shown]), settings)
    return path


def _path(out: Path, job: Job) -> Path:
    return out / f"{job.stem}.png"


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
    if not hasattr(pipe.autoencoder, "tile_px"):
        raise RequestError("--tile: this network's autoencoder has no weights and is not decoded in tiles")
    if tile < pipe.autoencoder.stride:
        raise RequestError(f"--tile: expected at least {pipe.autoencoder.stride}, received {tile}")
    pipe.autoencoder.tile_px = tile  # type: ignore[attr-defined]  # only those with weights have it
