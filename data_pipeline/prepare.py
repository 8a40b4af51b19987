"""Pictures and captions to shards that the loader reads: once, before training.

    python -m data_pipeline.prepare PICTURES --out shards/web --autoencoder dc_ae \\
        --autoencoder-path mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers --text-encoder gemma \\
        --text-encoder-path google/gemma-3-1b-it --workers 4

The source is cut into parts of `--per-shard` items, in source order. Any number of processes take parts, by
rank and by worker; a part's shard is written aside and renamed, then its report. Whatever was finished when a
process died is kept, the rest is done again, and the result is the same bytes. Whoever finishes the last part
writes the index and the manifest.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tqdm import tqdm

from data_pipeline.command import command
from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from data_pipeline.encoders.identity import latent_shape, revision
from data_pipeline.errors import DataError
from data_pipeline.index import INDEX_NAME, build_index, load_index
from data_pipeline.parts import (
    PartEncoder,
    PartReport,
    Settings,
    null_states,
    part_ranges,
    read_part,
    shard_name,
)
from data_pipeline.resolution import SizeRules, parse_buckets, parse_size
from data_pipeline.schema import MANIFEST_NAME, NULL_NAME
from data_pipeline.sources import KINDS, Source, detect_kind, open_source

FORMAT = 1

WORK_NAME = ".prepare"
"""Folder in the output with settings, locks and reports of finished parts, until the manifest is written."""

EARLY_ITEMS = 1000
"""Items after which a run stops for its drops before it has seen the whole source."""

_OPTION_OF_KEY = {
    "data.autoencoder.path": "--autoencoder-path",
    "data.text_encoder.path": "--text-encoder-path",
    "data.text_encoder.width": "--text-width",
    "data.text_encoder.max_tokens": "--max-tokens",
}


@dataclass(frozen=True)
class Job:
    """What every process of a preparation needs to know. Picklable."""

    source: Source
    settings: Settings
    out: Path
    devices: tuple[str, ...]
    dry_run: bool = False

    @property
    def items(self) -> int:
        return min(len(self.source), self.settings.limit or len(self.source))

    @property
    def parts(self) -> list[range]:
        return part_ranges(self.items, self.settings.per_shard)

    @property
    def work(self) -> Path:
        return self.out / WORK_NAME

    def report_path(self, part: int) -> Path:
        return self.work / f"{part:06d}.json"

    def finished(self, part: int) -> PartReport | None:
        """The report of a part whose shard lies there as reported; None if it is to be done."""
        report = read_part(self.report_path(part))
        if report is None or report.items != len(self.parts[part]):
            return None
        for name, entry in report.shards.items():
            path = self.out / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                return None
        return report


def _write_aside(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path, *, block: bool) -> Iterator[bool]:
    """Hold a lock file while the block runs; yields False if another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            # A file system without locks: ranks have parts of their own, and renames keep files whole.
            yield True
            return
        yield True


def run_part(encoder: PartEncoder, job: Job, part: int, on_item: Callable[[], object]) -> PartReport | None:
    """Do one part; None if another process is at it."""
    numbers = job.parts[part]
    if job.dry_run:
        return encoder.weigh(numbers, shard_name(part), on_item=on_item)
    with _lock(job.work / f"{part:06d}.lock", block=False) as mine:
        if not mine:
            return None
        done = job.finished(part)
        if done is None:
            done = encoder.write(numbers, job.out / shard_name(part), on_item=on_item)
            _write_aside(job.report_path(part), json.dumps(done.to_json(), sort_keys=True))
    return done


# One worker process: its encoders are loaded once.
_encoder: PartEncoder | None = None
_job: Job | None = None


def _start_worker(job: Job, counter: Any) -> None:
    global _encoder, _job
    # Ctrl-C meets the whole group; what is to be said of it says the parent.
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    _leave_with_parent()
    torch.set_num_threads(1)
    with counter.get_lock():
        place = counter.value
        counter.value += 1
    _job = job
    _encoder = PartEncoder(
        job.source, job.settings, device=job.devices[place % len(job.devices)], outline=job.dry_run
    )


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        # A parent that was killed cannot tell its workers; they would wait for parts for ever.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(part: int) -> tuple[int, PartReport | None]:
    assert _encoder is not None and _job is not None
    return part, run_part(_encoder, _job, part, lambda: None)


def _check_drops(total: PartReport, max_drop_share: float, *, final: bool) -> None:
    """Raises DataError if more than the share of the items seen so far were dropped."""
    if not final and total.items < EARLY_ITEMS:
        return
    if total.num_dropped > max_drop_share * total.items:
        reasons = "; ".join(
            f"{count} x {reason} (such as {total.examples.get(reason, ['?'])[0]})"
            for reason, count in total.dropped.most_common(5)
        )
        raise DataError(
            f"{total.num_dropped} of {total.items} items are dropped, more than --max-drop-share "
            f"{max_drop_share:g}: {reasons}. Mend the source or change the rules; if that many are meant to "
            f"go, raise --max-drop-share: finished parts are kept"
        )


def run_parts(
    job: Job,
    *,
    rank: int,
    world_size: int,
    workers: int,
    max_drop_share: float,
    progress: bool,
) -> PartReport:
    """Do the parts of this rank that are not finished; returns what is known of all parts seen."""
    mine = range(rank, len(job.parts), world_size)
    total = PartReport()
    todo: list[int] = []
    for part in mine:
        done = None if job.dry_run else job.finished(part)
        if done is None:
            todo.append(part)
        else:
            total.add(done)
    bar = tqdm(
        total=sum(len(job.parts[part]) for part in mine),
        initial=total.items,
        desc="weigh" if job.dry_run else "prepare",
        unit="picture",
        disable=not progress,
    )
    with bar:
        if not todo:
            return total
        if workers == 1:
            encoder = PartEncoder(job.source, job.settings, device=job.devices[0], outline=job.dry_run)
            for part in todo:
                report = run_part(encoder, job, part, lambda: bar.update())
                _add(total, report, bar, max_drop_share)
        else:
            _run_workers(job, todo, workers, total, bar, max_drop_share)
    return total


def _add(total: PartReport, report: PartReport | None, bar: Any, max_drop_share: float) -> None:
    if report is not None:
        total.add(report)
        bar.set_postfix(samples=total.samples, dropped=total.num_dropped)
        _check_drops(total, max_drop_share, final=False)


@contextmanager
def _unheard_by_children() -> Iterator[None]:
    """Processes that are started within do not hear Ctrl-C until they listen to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


def _run_workers(
    job: Job, todo: list[int], workers: int, total: PartReport, bar: Any, max_drop_share: float
) -> None:
    # Spawned: a forked process cannot use CUDA, and inherits locks of threads that it does not have.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(todo)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(job, context.Value("i", 0)),
    )
    reports: dict[int, PartReport] = {}
    with pool:
        with _unheard_by_children():
            waiting = {pool.submit(_work, part) for part in todo}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_EXCEPTION, timeout=0.2)
                for future in done:
                    part, report = future.result()
                    bar.update(len(job.parts[part]))
                    if report is not None:
                        reports[part] = report
                        _add(total, report, bar, max_drop_share)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (out of memory?); start the command again to go on, with fewer "
                "--workers or a smaller --batch-pixels"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def record_of(job: Job, kind: str, path: str) -> dict[str, Any]:
    """What determines the shards, as it is stored and compared."""
    settings = job.settings
    record = {
        "format": FORMAT,
        "source": {
            "kind": kind,
            "path": path,
            "items": len(job.source),
            "hash": job.source.fingerprint(),
        },
        "settings": asdict(settings),
        "revisions": {
            "autoencoder": revision(settings.autoencoder.path),
            "text_encoder": None if settings.text_encoder is None else revision(settings.text_encoder.path),
        },
    }
    return json.loads(json.dumps(record))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found.update(_flat(inner, f"{prefix}.{name}" if prefix else name))
    return found


def _check_same(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    # Where the same files lie is no difference: a disk may be mounted elsewhere on the next day.
    there, asked = _flat(found), _flat(wanted)
    moved = ("source.path", "settings.autoencoder.path", "settings.text_encoder.path")
    differing = [
        f"{name} (there {there.get(name)!r}, asked {asked.get(name)!r})"
        for name in sorted({*there, *asked})
        if name not in moved and there.get(name) != asked.get(name)
    ]
    if differing:
        raise DataError(
            f"{where}: was started with other settings: {', '.join(differing)}; give the same ones to go on, "
            f"choose another --out, or delete the folder"
        )


def begin(job: Job, record: dict[str, Any]) -> bool:
    """Make the output ready. Returns False when it is already finished with these settings.

    Raises:
        DataError: if it holds something else.
    """
    out = job.out
    path = out / MANIFEST_NAME
    started = job.work / "settings.json"
    if path.is_file():
        try:
            manifest = json.loads(path.read_text())
            found = {name: manifest[name] for name in record}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: not a manifest of this tool ({error!r}); choose another --out"
            ) from error
        _check_same(found, record, out)
        if load_index(out).hash != manifest["index_hash"]:
            raise DataError(
                f"{out}: the index is not the one of the manifest; delete the folder and start again"
            )
        shutil.rmtree(job.work, ignore_errors=True)
        return False
    if started.is_file():
        try:
            found = json.loads(started.read_text())
        except ValueError as error:
            raise DataError(f"{started}: not readable ({error}); delete {out} and start again") from error
        _check_same(found, record, out)
        return True
    if out.exists() and (not out.is_dir() or any(entry.name != WORK_NAME for entry in out.iterdir())):
        raise DataError(f"{out}: is not empty and was not started by this tool; choose another --out")
    job.work.mkdir(parents=True, exist_ok=True)
    _write_aside(started, json.dumps(record, indent=2) + "\n")
    return True


def finish(
    job: Job, record: dict[str, Any], *, max_drop_share: float, progress: bool, processes: int = 1
) -> PartReport | None:
    """Write index and manifest if every part is finished; None if some are not.

    Raises:
        DataError: if too many items were dropped, or all of them.
    """
    with _lock(job.work / "finish.lock", block=True):
        if (job.out / MANIFEST_NAME).is_file():
            # Another rank was first. The lock has brought back the folder that it had taken away.
            manifest = json.loads((job.out / MANIFEST_NAME).read_text())
            shutil.rmtree(job.work, ignore_errors=True)
            return PartReport.from_json(manifest["report"])
        total = PartReport()
        for part in range(len(job.parts)):
            report = job.finished(part)
            if report is None:
                return None
            total.add(report)
        _check_drops(total, max_drop_share, final=True)
        if total.samples == 0:
            raise DataError(f"{job.out}: no item of the source can be used: {dict(total.dropped)}")
        settings = job.settings
        index = build_index(
            job.out,
            num_classes=settings.num_classes or len(_classes(job)) or None,
            progress=progress,
            processes=processes,
            max_bad_share=0.0,
        )
        null = null_states(settings, job.devices[0])
        if null:
            aside = job.out / f".{NULL_NAME}.partial"
            aside.write_bytes(save(null))
            os.replace(aside, job.out / NULL_NAME)
        index.save()
        manifest = {
            **record,
            "samples": total.samples,
            "augmentation": "mirror image stored beside the picture" if _has_flips(job) else "none",
            "autoencoder": asdict(settings.autoencoder),
            "text_encoder": None if settings.text_encoder is None else asdict(settings.text_encoder),
            "dtype": settings.dtype,
            "classes": list(_classes(job)),
            "index_hash": index.hash,
            "report": total.to_json(),
        }
        _write_aside(job.out / MANIFEST_NAME, json.dumps(manifest, indent=2) + "\n")
        for aside in job.out.glob(".*.partial"):
            aside.unlink(missing_ok=True)
        shutil.rmtree(job.work, ignore_errors=True)
    return total


def _has_flips(job: Job) -> bool:
    return job.settings.flip or job.source.kind == "tim_latents"


def _classes(job: Job) -> tuple[str, ...]:
    return (job.settings.classes or job.source.classes) if job.settings.condition == "class" else ()


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent first; of equals by name, whatever order they were counted in."""
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def describe(job: Job, total: PartReport, *, rows: int = 20) -> str:
    """The text that the command prints: counts, drops, sizes, bytes."""
    settings = job.settings
    lines = [f"items            {total.items}", f"samples          {total.samples}"]
    lines.append(f"dropped          {total.num_dropped} ({total.num_dropped / max(1, total.items):.2%})")
    for reason, count in _ranked(total.dropped):
        lines.append(f"  {count:>9}  {reason}: {total.examples.get(reason, ['?'])[0]}")
    if total.notes:
        lines.append("handled")
        lines += [f"  {count:>9}  {note}" for note, count in _ranked(total.notes)]
    sizes = sorted(total.sizes.items(), key=lambda entry: (-entry[1], parse_size(entry[0])))
    lines.append(f"sizes            {len(sizes)} (height x width in pixels)")
    for size, count in sizes[:rows]:
        share = count / max(1, total.samples)
        lines.append(f"  {size:>11}  {count:>9}  {share:6.1%}  {'#' * round(40 * share)}")
    if len(sizes) > rows:
        lines.append(f"  and {len(sizes) - rows} more")
    stride = latent_shape(settings.autoencoder).stride
    cells = Counter[int]()
    for size, count in total.sizes.items():
        height, width = parse_size(size)
        cells[height * width // stride**2] += count
    lines.append(
        f"latent cells     {min(cells, default=0)} to {max(cells, default=0)}, "
        f"total {sum(length * count for length, count in cells.items())}"
    )
    lines.append(f"largest stretch  {total.max_stretch:.2%}, largest crop {total.max_crop:.2%}")
    shards = [entry["bytes"] for entry in total.shards.values()]
    if shards:
        lines.append(
            f"shards           {len(shards)}, {sum(shards) / 2**20:.1f} MiB in all, "
            f"{min(shards) / 2**20:.1f} to {max(shards) / 2**20:.1f} MiB each"
        )
    per = max(1, total.samples)
    for name, size in sorted(total.bytes.items(), key=lambda entry: -entry[1]):
        if name != "shards":
            lines.append(f"  {name:<22} {size / 2**20:10.1f} MiB  {size / per / 1024:8.1f} KiB a sample")
    if total.text_tokens:
        lines.append(
            f"caption tokens   {total.text_tokens}: as 16-bit states "
            f"{total.text_tokens * total.text_width * 2 / 2**20:.1f} MiB, "
            f"as ids {total.text_tokens * 4 / 2**20:.1f} MiB"
        )
    return "\n".join(lines)


def choose_devices(name: str, local_rank: int) -> tuple[str, ...]:
    """Devices that the workers of this process take in turn.

    Raises:
        DataError: if CUDA is asked for and not there.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if available else "cpu"
    if name != "cuda":
        if name.startswith("cuda") and not available:
            raise DataError(f"--device {name}: this machine offers no CUDA device; use --device cpu")
        return (name,)
    if not available:
        raise DataError("--device cuda: this machine offers no CUDA device; use --device cpu")
    return tuple(f"cuda:{(local_rank + n) % available}" for n in range(available))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.prepare", description=main.__doc__)
    add = parser.add_argument
    add("path", type=Path, help="a folder, a .jsonl or .parquet list ('*.parquet' for several), or a .tar")
    add("--out", type=Path, required=True, help="folder to create")
    add("--source", default="auto", choices=("auto", *KINDS), help="layout of the source")
    add("--root", type=Path, default=None, help="folder that a list's paths start from and must stay in")
    add("--condition", choices=("caption", "class"), default=None, help="default: class for tim_latents")
    add(
        "--classes",
        type=Path,
        default=None,
        help="text file with a class name a line, in the order of labels",
    )
    add("--num-classes", type=int, default=None, help="labels are below this number")
    add("--keep", default="", help="comma-separated further columns to carry into the samples' json")
    add("--limit", type=int, default=None, help="only this many items")

    group = parser.add_argument_group("encoders")
    add = group.add_argument
    add("--autoencoder", choices=("dc_ae", "sd_vae", "pixels"), required=True)
    add("--autoencoder-path", default=None, help="folder or hub name of the weights")
    add("--factor", type=int, default=2, help="pixels: side of the block that becomes channels")
    add("--pixel-channels", type=int, default=3, choices=(1, 3), help="pixels: 1 is grey")
    add("--text-encoder", choices=("gemma", "t5", "words"), default=None)
    add("--text-encoder-path", default=None, help="folder or hub name of the weights")
    add("--text-width", type=int, default=64, help="words: width of a state")
    add("--max-tokens", type=int, default=256, help="longest caption")
    add("--dtype", choices=("float16", "bfloat16"), default="float16", help="of stored latents and states")
    add("--pictures", choices=("latent", "png", "original"), default="latent", help="what is stored of one")
    add("--text", choices=("states", "ids", "caption"), default="states", help="what is stored of a caption")
    add("--flip", action="store_true", help="store the latent of the mirror image too")
    add("--batch-pixels", type=int, default=1 << 22, help="pixels of one batch of the autoencoder")

    group = parser.add_argument_group("sizes")
    add = group.add_argument
    defaults = SizeRules(multiple=1)
    add("--size", choices=("native", "buckets"), default="native", help="keep the aspect, or take a bucket's")
    add(
        "--patch-size",
        type=int,
        default=1,
        help="latent cells a side of a token: sides are multiples of it too",
    )
    add("--max-area", default="1024x1024", help="pixels, as HEIGHTxWIDTH or a number; larger is reduced")
    add("--min-area", default="1", help="pixels; smaller is enlarged within --max-upscale, or refused")
    add("--max-aspect", type=float, default=defaults.max_aspect, help="long side over short side")
    add("--max-upscale", type=float, default=defaults.max_upscale, help="largest growth of a side")
    add("--max-stretch", type=float, default=defaults.max_stretch, help="one axis over the other, less 1")
    add("--max-crop", type=float, default=defaults.max_crop, help="share that the crop may take")
    add("--buckets", default="", help="HxW,HxW,... (default: sizes of --max-area)")

    group = parser.add_argument_group("rules")
    add = group.add_argument
    add("--captions", choices=("all", "first"), default="all", help="store all captions, or the first")
    add("--max-caption-characters", type=int, default=10_000, help="longer captions are cut, and counted")
    add("--empty-captions", choices=("drop", "keep"), default="drop")
    add("--frames", choices=("first", "refuse"), default="first", help="of animations")
    add("--max-pixels", type=int, default=1 << 27, help="of an original; beyond it, it is refused undecoded")
    add("--max-drop-share", type=float, default=0.1, help="share of dropped items that stops the run")

    group = parser.add_argument_group("processes")
    add = group.add_argument
    add("--per-shard", type=int, default=1000, help="source items of one shard")
    add("--rank", type=int, default=None, help="of this process (default: RANK, or 0)")
    add("--world-size", type=int, default=None, help="number of ranks (default: WORLD_SIZE, or 1)")
    add("--workers", type=int, default=1, help="local processes")
    add("--device", default="auto", help="auto, cpu, cuda (all of them in turn) or cuda:N")
    add("--dry-run", action="store_true", help="report sizes, drops and shard sizes; write nothing")
    add("--no-progress", action="store_true")
    return parser


def _area(text: str, name: str) -> int:
    if text.isascii() and text.isdigit() and 0 < len(text) <= 12:
        return int(text)
    try:
        height, width = parse_size(text)
    except DataError as error:
        raise DataError(f"{name}: expected a number of pixels or HEIGHTxWIDTH, received {text!r}") from error
    return height * width


def _settings(options: argparse.Namespace, kind: str) -> Settings:
    condition = options.condition or ("class" if kind == "tim_latents" else "caption")
    try:
        autoencoder = AutoencoderConfig(
            kind=options.autoencoder,
            path=options.autoencoder_path,
            factor=options.factor,
            channels=options.pixel_channels,
        )
        text_encoder = (
            TextEncoderConfig(
                kind=options.text_encoder,
                path=options.text_encoder_path,
                width=options.text_width,
                max_tokens=options.max_tokens,
            )
            if options.text_encoder
            else None
        )
    except ValueError as error:
        raise DataError(str(error)) from error
    if options.patch_size < 1:
        raise DataError(f"--patch-size: expected at least 1, received {options.patch_size}")
    classes: tuple[str, ...] = ()
    if options.classes is not None:
        try:
            names = options.classes.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"--classes {options.classes}: expected text in UTF-8 ({error})") from error
        classes = tuple(name.strip() for name in names if name.strip())
    return Settings(
        condition=condition,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        sizes=SizeRules(
            multiple=latent_shape(autoencoder).stride * options.patch_size,
            mode=options.size,
            min_area=_area(options.min_area, "--min-area"),
            max_area=_area(options.max_area, "--max-area"),
            max_aspect=options.max_aspect,
            max_upscale=options.max_upscale,
            max_stretch=options.max_stretch,
            max_crop=options.max_crop,
            buckets=parse_buckets(options.buckets),
        ),
        pictures=options.pictures,
        text=options.text,
        dtype=options.dtype,
        flip=options.flip,
        captions=options.captions,
        max_caption_characters=options.max_caption_characters,
        empty_captions=options.empty_captions,
        frames=options.frames,
        max_pixels=options.max_pixels,
        per_shard=options.per_shard,
        limit=options.limit,
        batch_pixels=options.batch_pixels,
        classes=classes,
        num_classes=options.num_classes,
        keep=_names(options.keep),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _place(options: argparse.Namespace) -> tuple[int, int]:
    """(rank, world size) from the options, else from the environment of a launcher."""
    found = []
    for given, variable, default in (
        (options.rank, "RANK", "0"),
        (options.world_size, "WORLD_SIZE", "1"),
    ):
        text = os.environ.get(variable, default) if given is None else str(given)
        if not text.lstrip("-").isdigit():
            raise DataError(f"{variable}: expected a number, received {text!r}")
        found.append(int(text))
    rank, world_size = found
    if not 0 <= rank < world_size:
        raise DataError(f"--rank: expected 0 to {world_size - 1}, received {rank}")
    if options.workers < 1:
        raise DataError(f"--workers: expected at least 1, received {options.workers}")
    if not 0.0 <= options.max_drop_share <= 1.0:
        raise DataError(f"--max-drop-share: expected 0 to 1, received {options.max_drop_share}")
    return rank, world_size


def prepare(options: argparse.Namespace) -> str:
    """Do what the command line asks; returns the text to print.

    Raises:
        DataError: if a setting, the source or the output is wrong, or too many items are dropped.
    """
    rank, world_size = _place(options)
    kind = detect_kind(options.path) if options.source == "auto" else options.source
    settings = _settings(options, kind)
    source = open_source(options.path, kind, root=options.root, keep=settings.keep)
    local_rank = os.environ.get("LOCAL_RANK", "0")
    job = Job(
        source,
        settings,
        options.out,
        choose_devices(options.device, int(local_rank) if local_rank.isdigit() else 0),
        options.dry_run,
    )
    progress = not options.no_progress
    record = {} if job.dry_run else record_of(job, kind, str(options.path))
    if not job.dry_run and not begin(job, record):
        return f"{job.out}: already there with these settings, left as it is"
    total = run_parts(
        job,
        rank=rank,
        world_size=world_size,
        workers=options.workers,
        # A dry run is there to show the drops, however many.
        max_drop_share=1.0 if job.dry_run else options.max_drop_share,
        progress=progress,
    )
    if job.dry_run:
        return f"{describe(job, total)}\nnothing was written"
    whole = finish(
        job,
        record,
        max_drop_share=options.max_drop_share,
        progress=progress,
        processes=options.workers,
    )
    if whole is None:
        missing = sum(job.finished(part) is None for part in range(len(job.parts)))
        return (
            f"{job.out}: rank {rank} of {world_size} is done; {missing} of {len(job.parts)} parts are still "
            f"to come from others, the last of them writes {INDEX_NAME} and {MANIFEST_NAME}"
        )
    return f"{describe(job, whole)}\n{job.out}: finished"


@command(DataError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Turn pictures and captions (or labels) into shards."""
    options = _parser().parse_args(arguments)
    try:
        done = prepare(options)
    except (DataError, OSError) as error:
        raise DataError(_by_option(str(error))) from error
    print(done)
    return 0


def _by_option(message: str) -> str:
    """A message of the encoders, which know the keys of a recipe, with the options of this command."""
    for key, option in _OPTION_OF_KEY.items():
        message = message.replace(key, option)
    return message


if __name__ == "__main__":
    sys.exit(main())
