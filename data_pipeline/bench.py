"""Figures of the pipeline: how well packs fill, how fast they are planned, how fast they are read.

python -m data_pipeline.bench plan                     # packing and planning, a million images a row
python -m data_pipeline.bench plan --resume 100000000  # and resume on a synthetic index of that many samples
python -m data_pipeline.bench loader                   # reading, beside two other ways of storing latents
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipeline.batch import Latents
from data_pipeline.command import command
from data_pipeline.config import AutoencoderConfig, DataConfig
from data_pipeline.draws import generator
from data_pipeline.errors import DataError
from data_pipeline.index import (
    FORMAT,
    INDEX_NAME,
    build_index,
    encode_header,
    group_by_size,
    load_index,
)
from data_pipeline.loader import build_loader
from data_pipeline.packing import ATTENTION_COST, Plan
from data_pipeline.schema import Sample
from data_pipeline.shard_rows import COLUMNS
from data_pipeline.shards import stream_latents, write_shards

CHANNELS = 32
"""Of a latent cell, as with DC-AE f32c32."""

CELL_PX = 32
"""Pixels a side of a token, as with DC-AE f32."""

PACKS_PER_STEP = (8, 64, 512)

CHUNK = 10_000_000

WORKER_EPOCHS = 50
"""Passes through a worker that are timed together, so that its start counts for little."""


def draw_sizes(distribution: str, count: int, seed: int) -> np.ndarray:
    """Sizes of `count` images in tokens: int64 [count, 2], height and width.

    `web`: log-normal areas (median 0.9 megapixels, sigma 0.9, from 256^2 to 4096^2) and aspects (sigma 0.38,
    at most 3:1), sides rounded down. `mixed`: sides log-uniform from 256 to 1024, the same aspects.
    `one size`: 1024 x 1024.
    """
    rng = generator(seed, f"bench.{distribution}", 0, 0)
    if distribution == "one size":
        return np.full((count, 2), 1024 // CELL_PX)
    aspect = np.exp(rng.normal(0, 0.38, count)).clip(1 / 3, 3)
    if distribution == "web":
        area = np.exp(rng.normal(np.log(0.9e6), 0.9, count)).clip(256**2, 4096**2)
    else:
        area = np.exp(rng.uniform(np.log(256), np.log(1024), count)) ** 2
    sides = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=1)
    return (sides // CELL_PX).astype(np.int64).clip(1)


@dataclass(frozen=True)
class PackingRow:
    """Quality of one way of packing."""

    fill: float
    mean: float
    """Cost of the slowest pack of a step over the mean of the step, averaged over the steps."""
    worst: float
    plan_s: float | None = None
    """Seconds of processor time to build the plan, and to walk through all steps of an epoch."""
    epoch_s: float | None = None


def measure_plan(sizes: np.ndarray, packs_per_step: int, tokens_per_pack: int) -> PackingRow:
    """Plan an epoch and look up all its steps. Fill and balance are counted from the packs themselves."""
    lengths = sizes.prod(axis=1)
    started = time.process_time()
    plan = Plan(lengths, tokens_per_pack=tokens_per_pack, packs_per_step=packs_per_step, seed=0)
    planned = time.process_time()
    steps = [plan.step(step) for step in range(plan.steps_per_epoch)]
    walked = time.process_time()
    packs = [pack for step in steps for pack in step.packs]
    order = lengths[np.concatenate([np.array(pack) for pack in packs])]
    starts = np.cumsum([0, *(len(pack) for pack in packs[:-1])])
    return _row(order, starts, packs_per_step, tokens_per_pack, planned - started, walked - planned)


def measure_same_size(sizes: np.ndarray, packs_per_step: int, tokens_per_pack: int) -> PackingRow:
    """Packs of one size each, as many images as the budget holds, in random order: the authors' batches."""
    shapes, members = group_by_size(*sizes.astype(np.uint16).T)
    lengths = sizes.prod(axis=1)[members]
    starts: list[np.ndarray] = []
    begin = 0
    for height, width, count in shapes.tolist():
        starts.append(np.arange(begin, begin + count, tokens_per_pack // (height * width)))
        begin += count
    starts_all = np.concatenate(starts)
    ends = np.append(starts_all[1:], len(lengths))
    rng = generator(0, "bench.same_size", 0, 0)
    drawn = rng.permutation(len(starts_all))[: len(starts_all) // packs_per_step * packs_per_step]
    counts = (ends - starts_all)[drawn]
    order = np.concatenate([lengths[starts_all[p] : ends[p]] for p in drawn])
    return _row(order, np.cumsum(counts) - counts, packs_per_step, tokens_per_pack)


def _row(
    lengths: np.ndarray,
    starts: np.ndarray,
    packs_per_step: int,
    tokens_per_pack: int,
    plan_s: float | None = None,
    epoch_s: float | None = None,
) -> PackingRow:
    costs = np.add.reduceat(lengths + ATTENTION_COST * lengths.astype(np.float64) ** 2, starts)
    steps = costs.reshape(-1, packs_per_step)
    ratios = steps.max(axis=1) / steps.mean(axis=1)
    fill = lengths.sum() / (len(starts) * tokens_per_pack)
    return PackingRow(float(fill), float(ratios.mean()), float(ratios.max()), plan_s, epoch_s)


def packing_table(count: int) -> Iterator[str]:
    """Lines of the table of packing quality, as Markdown."""
    yield (
        "| images | packs a step | fill | slowest / mean | worst step | plan + epoch, processor time "
        "| one size a pack: fill | slowest / mean |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for distribution in ("web", "mixed", "one size"):
        sizes = draw_sizes(distribution, count, 0)
        budget = 2 * int(sizes.prod(axis=1).max())
        for packs in PACKS_PER_STEP:
            row, other = measure_plan(sizes, packs, budget), measure_same_size(sizes, packs, budget)
            assert row.plan_s is not None and row.epoch_s is not None
            yield (
                f"| {distribution} | {packs} | {row.fill:.1%} | {row.mean:.3f} | {row.worst:.3f} "
                f"| {row.plan_s:.2f} + {row.epoch_s:.2f} s, "
                f"{count / (row.plan_s + row.epoch_s) / 1e6:.1f} M/s "
                f"| {other.fill:.1%} | {other.mean:.2f} |"
            )


def write_synthetic_index(folder: Path, count: int) -> None:
    """An index of `count` samples of the web mix, whose shards are holes of the right size.

    Sizes and their order are real; the columns that only a read of a sample needs are holes in the file.
    """
    per_shard, key_bytes = 10_000, 12
    num_shards = -(-count // per_shard)
    sizes = np.concatenate(
        [
            draw_sizes("web", min(CHUNK, count - first), first).astype(np.uint16)
            for first in range(0, count, CHUNK)
        ]
    )
    shapes, members = group_by_size(sizes[:, 0], sizes[:, 1])
    names = [f"part-{number:06d}.tar" for number in range(num_shards)]
    for name in names:
        with open(folder / name, "wb") as stream:
            stream.truncate(1 << 20)
    stored: dict[str, np.ndarray] = {"height": sizes[:, 0], "width": sizes[:, 1]}
    stored |= {"shapes": shapes, "members": members}
    # Broadcast zeros take no memory; they become holes.
    columns = {name: stored.get(name, np.broadcast_to(np.zeros(1, t), count)) for name, t in COLUMNS.items()}
    columns |= {"key_bytes": np.broadcast_to(np.zeros(1, np.uint8), count * key_bytes)}
    arrays = sorted((columns | stored).items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header = {
        "format": FORMAT,
        "shards": names,
        "shard_bytes": [1 << 20] * num_shards,
        "channels": 32,
        "text_width": 0,
        "num_classes": 1000,
        "num_bad": 0,
        "bad": [],
        "latent_dtype": "F16",
        "hash": "synthetic",
    }
    with open(folder / INDEX_NAME, "wb") as stream:
        stream.write(encode_header(arrays, header))
        for name, array in arrays:
            if name in stored:
                stream.write(np.ascontiguousarray(array).data)
            else:
                stream.seek(array.nbytes, os.SEEK_CUR)
        stream.truncate()


def resume(folder: Path) -> dict[str, float]:
    """Open the index of `folder` and plan one far step: what a resumed run does before it reads a sample."""
    before = _memory("RssAnon")
    started = time.perf_counter()
    index = load_index(folder)
    opened = time.perf_counter()
    plan = Plan(index.groups(1), tokens_per_pack=32_768, packs_per_step=512, seed=0)
    planned = time.perf_counter()
    far = 3 * plan.steps_per_epoch + plan.steps_per_epoch // 3
    step = plan.step(far)
    first = time.perf_counter()
    images = 0
    for number in range(far + 1, far + 101):
        images += plan.step(number).num_images
    walked = time.perf_counter()
    return {
        "samples": len(index),
        "open_s": opened - started,
        "plan_s": planned - opened,
        "first_step_s": first - planned,
        "resume_s": first - started,
        "steps_per_epoch": plan.steps_per_epoch,
        "images_of_step": step.num_images,
        "following_per_s": images / (walked - first),
        "private_mib": _memory("RssAnon") - before,
        "peak_mib": _memory("VmHWM"),
        "file_mib": os.stat(folder / INDEX_NAME).st_size / 2**20,
    }


def _memory(entry: str) -> float:
    """Memory of this process in MiB. RssAnon: not backed by files; VmHWM: the highest ever, mapped pages too.

    Not `resource.ru_maxrss`: a child starts with that of its parent.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024


def resume_lines(count: int) -> Iterator[str]:
    """What a resume costs in a fresh process, at `count` samples."""
    with tempfile.TemporaryDirectory(prefix="tim_ds_bench_") as name:
        started = time.perf_counter()
        write_synthetic_index(Path(name), count)
        yield f"synthetic index of {count:,} samples: written in {time.perf_counter() - started:.1f} s"
        command = [sys.executable, "-m", "data_pipeline.bench", "resume", name]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    yield (
        f"resume at {found['samples']:,.0f} samples: {found['resume_s']:.3f} s (open {found['open_s']:.3f}, "
        f"plan {found['plan_s']:.3f}, first step {found['first_step_s']:.3f}); "
        f"following steps {found['following_per_s'] / 1e6:.1f} M images/s"
    )
    yield (
        f"index file {found['file_mib']:,.0f} MiB, mapped; private memory of index and plan "
        f"{found['private_mib']:,.0f} MiB; peak of the process with torch {found['peak_mib']:,.0f} MiB"
    )


@dataclass(frozen=True)
class ReadingRow:
    """Speed of one way of reading, in packed latent tokens."""

    name: str
    tokens: int
    cpu_s: float
    wall_s: float


def write_latents(folder: Path, count: int, *, channels: int = CHANNELS, side: int = 32) -> None:
    """`count` latents like those of DC-AE f32c32 in four layouts: shards with mirror images and without, and
    one safetensors file an image, in float16 and in float32."""

    def samples(*, mirrored: bool) -> Iterator[Sample]:
        rng = torch.Generator().manual_seed(0)
        for number in range(count):
            latent = torch.randn(channels, side, side, generator=rng).half()
            flipped = latent.flip(-1) if mirrored else None
            yield Sample(f"s{number:08d}", latent, label=number % 1000, flipped=flipped)

    for name, mirrored in (("shards", True), ("plain", False)):
        (folder / name).mkdir()
        write_shards(folder / name, "part", samples(mirrored=mirrored), per_shard=500)
        build_index(folder / name, num_classes=1000, progress=False).save()
    for name, dtype in (("files", torch.float16), ("files32", torch.float32)):
        (folder / name).mkdir()
        for sample in samples(mirrored=True):
            # The authors' layout for class-to-image training: the latent, its mirror image, the label.
            assert sample.latent is not None and sample.flipped is not None and sample.label is not None
            both = torch.stack([sample.latent, sample.flipped]).to(dtype)
            stored = {"latent": both, "label": torch.tensor(float(sample.label))}
            save_file(stored, folder / name / f"{sample.key}.safetensors")


def read_bytes(folder: Path, tokens_per_pack: int) -> Iterator[Tensor]:
    """Packs of the latents' bytes in shard order, nothing looked at: no reader of shards is faster."""
    index = load_index(folder / "plain")
    rows = index.rows(range(len(index)))
    files = [os.open(folder / "plain" / name, os.O_RDONLY) for name in index.shards]
    # All rows hold one size, each with its latent at the end of its member.
    length = index.channels * rows[0].height * rows[0].width
    per_pack = tokens_per_pack // (rows[0].height * rows[0].width)
    try:
        for first in range(0, len(rows), per_pack):
            some = rows[first : first + per_pack]
            values = torch.empty(len(some), length, dtype=torch.float16)
            for place, row in zip(values.numpy(), some, strict=True):
                end = row.offset + row.latent_start + row.latent_size
                os.preadv(files[row.shard], [place], end - place.nbytes)
            yield values.reshape(-1)
    finally:
        for descriptor in files:
            os.close(descriptor)


def read_packs(folder: Path, tokens_per_pack: int) -> Iterator[Tensor]:
    """Packs of one epoch from this package's loader, without its cache."""
    config = _config(folder, tokens_per_pack, workers=0)
    loader = build_loader(config, patch_size=1, num_steps=sys.maxsize, cache_bytes=0)
    return (batch.latents.values for step in islice(loader, loader.steps_per_epoch) for batch in step)


def _config(folder: Path, tokens_per_pack: int, *, workers: int) -> DataConfig:
    return DataConfig(
        shards=str(folder / "shards"),
        tokens_per_pack=tokens_per_pack,
        packs_per_step=1,
        autoencoder=AutoencoderConfig(kind="dc_ae", path="synthetic"),
        workers=workers,
    )


def read_webdataset(folder: Path, tokens_per_pack: int) -> Iterator[Tensor]:
    """Packs from a plain webdataset pipeline, over shards without mirror images, which it would read too."""
    return pack(stream_latents(sorted((folder / "plain").glob("*.tar")), shuffle=100), tokens_per_pack)


def read_files(folder: Path, tokens_per_pack: int) -> Iterator[Tensor]:
    """Packs from one float16 file an image, in random order, the plain or the mirrored latent of each."""
    paths = sorted((folder / "files").glob("*.safetensors"))
    rng = generator(0, "bench.files", 0, 0)

    def latents() -> Iterator[tuple[Tensor, int]]:
        for number in rng.permutation(len(paths)).tolist():
            stored = load_file(paths[number])
            yield stored["latent"][int(rng.integers(2))], int(stored["label"])

    return pack(latents(), tokens_per_pack)


class _Files(Dataset[dict[str, Tensor]]):
    """One float32 file an image, read as the authors' class-to-image training reads it, the picture apart."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        stored = load_file(self._paths[number])
        mirrored = int(torch.rand(1) < 0.5)
        return {"latent": stored["latent"][mirrored], "label": stored["label"]}


def read_authors(folder: Path, tokens_per_pack: int) -> Iterator[Tensor]:
    """Batches of the authors' layout from torch's own loader, as large as a pack."""
    paths = sorted((folder / "files32").glob("*.safetensors"))
    height, width = load_file(paths[0])["latent"].shape[2:]
    order = generator(0, "bench.files", 0, 0).permutation(len(paths)).tolist()
    batches = DataLoader(_Files(paths), batch_size=tokens_per_pack // (height * width), sampler=order)
    return (batch["latent"].reshape(-1) for batch in batches)


def pack(latents: Iterator[tuple[Tensor, int]], tokens_per_pack: int) -> Iterator[Tensor]:
    """Latents as they come, end to end as they were stored; the labels collected beside them."""
    values: list[Tensor] = []
    labels: list[int] = []
    total = 0
    for latent, label in latents:
        length = latent.shape[1] * latent.shape[2]
        if total + length > tokens_per_pack:
            yield torch.cat(values)
            values, labels, total = [], [], 0
        values.append(latent.reshape(-1))
        labels.append(label)
        total += length
    yield torch.cat(values)


READERS: dict[str, Callable[[Path, int], Iterator[Tensor]]] = {
    "this loader": read_packs,
    "plain webdataset": read_webdataset,
    "one file an image, float16": read_files,
    "one file an image, the authors' float32": read_authors,
    "the latents' bytes alone": read_bytes,
}


def measure_reading(
    folder: Path, tokens_per_pack: int, *, side: int, tokens: bool, passes: int, cold: bool
) -> list[ReadingRow]:
    """The fastest of `passes` for each reader, the readers taking turns.

    Args:
        tokens: convert every pack to float32 tokens on the core that reads. Otherwise packs hold the stored
            values, as they are handed to a device, which converts them.
        cold: files leave the page cache before each pass. Otherwise they are in it as each reader's own first
            pass, not timed, left them there: what was just written lies in larger pages, faster to read.
    """
    best: dict[str, ReadingRow] = {}
    if not cold:
        _leave_page_cache(folder)
    for number in range(passes if cold else 1 + passes):
        for name, read in READERS.items():
            if cold:
                _leave_page_cache(folder)
            # Listing files and opening the index come first: they do not grow with what is read.
            packs = read(folder, tokens_per_pack)
            cpu, wall = time.process_time(), time.perf_counter()
            values = 0
            for packed in packs:
                values += packed.numel()
                if tokens:
                    images = packed.numel() // (CHANNELS * side * side)
                    Latents(packed, ((side, side),) * images, 1, CHANNELS).tokens()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            row, so_far = ReadingRow(name, values // CHANNELS, cpu, wall), best.get(name)
            if number == 0 and not cold:
                continue
            if so_far is None or (wall < so_far.wall_s if cold else cpu < so_far.cpu_s):
                best[name] = row
    return list(best.values())


def measure_worker(folder: Path, tokens_per_pack: int, *, epochs: int) -> ReadingRow:
    """This loader through one worker: processor time of both processes, the worker's start included."""
    config = _config(folder, tokens_per_pack, workers=1)
    steps = build_loader(config, patch_size=1, num_steps=0).steps_per_epoch
    packs = build_loader(config, patch_size=1, num_steps=epochs * steps)
    cpu, wall, tokens = _cpu_of_both(), time.perf_counter(), 0
    for step in packs:
        tokens += sum(batch.latents.num_tokens for batch in step)
    return ReadingRow("one worker", tokens, _cpu_of_both() - cpu, time.perf_counter() - wall)


def _cpu_of_both() -> float:
    """Seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _leave_page_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading_lines(
    count: int, side: int, tokens_per_pack: int, passes: int, where: Path | None
) -> Iterator[str]:
    """The table of reading speed, as Markdown."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tim_ds_bench_", dir=where) as name:
        folder = Path(name)
        write_latents(folder, count, side=side)
        yield f"{count} latents of 32 x {side} x {side}, float16, packs of {tokens_per_pack} tokens, one core"
        yield ""
        yield (
            "| | M tokens / s of processor time, as stored | this loader | the same, float32 tokens "
            "| this loader | M tokens / s from disk, as stored | this loader |"
        )
        yield "|---|---|---|---|---|---|---|"

        def measured(*, tokens: bool, passes: int, cold: bool) -> list[ReadingRow]:
            return measure_reading(
                folder, tokens_per_pack, side=side, tokens=tokens, passes=passes, cold=cold
            )

        stored = measured(tokens=False, passes=passes, cold=False)
        converted = measured(tokens=True, passes=passes, cold=False)
        disk = measured(tokens=False, passes=1, cold=True)
        columns = [[row.tokens / row.cpu_s / 1e6 for row in rows] for rows in (stored, converted)]
        columns.append([row.tokens / row.wall_s / 1e6 for row in disk])
        for row, *speeds in zip(stored, *columns, strict=True):
            cells = [f"{v:.2f} | {c[0] / v:.1f} x" for v, c in zip(speeds, columns, strict=True)]
            yield f"| {row.name} | {' | '.join(cells)} |"
        worker = measure_worker(folder, tokens_per_pack, epochs=WORKER_EPOCHS)
        yield ""
        yield (
            f"this loader through one worker: {worker.tokens / worker.cpu_s / 1e6:.2f} M tokens / s of "
            f"processor time of both processes"
        )


@command(DataError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the pipeline on this machine."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.bench", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="quality of packs, speed of planning, cost of a resume")
    plan.add_argument("--images", type=int, default=1_000_000, help="of each row of the table")
    plan.add_argument("--resume", type=int, default=10_000_000, help="samples of the synthetic index")
    plan.add_argument("--no-table", action="store_true")
    loader = commands.add_parser("loader", help="tokens a second, beside other layouts")
    loader.add_argument("--images", type=int, default=3000)
    loader.add_argument("--side", type=int, default=32, help="latent cells a side: 32 is 1024 pixels")
    loader.add_argument("--tokens-per-pack", type=int, default=32_768)
    loader.add_argument("--passes", type=int, default=5, help="of which the fastest counts")
    loader.add_argument(
        "--folder", type=Path, default=None, help="where to write (default: the temporary one)"
    )
    far = commands.add_parser("resume", help="open an index and plan a far step; prints JSON")
    far.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "plan":
        lines = [] if options.no_table else packing_table(options.images)
        for line in lines:
            print(line, flush=True)
        for line in resume_lines(options.resume):
            print(line, flush=True)
    elif options.command == "loader":
        for line in reading_lines(
            options.images, options.side, options.tokens_per_pack, options.passes, options.folder
        ):
            print(line, flush=True)
    else:
        print(json.dumps(resume(options.folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
