"""Jobs to files: batches that do not depend on who draws them, pictures that are kept once finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tim_ds.errors import RequestError
from tim_ds.eval.jobs import Job
from tim_ds.model.memory import peak_bytes, reset_peak
from tim_ds.pipeline import Request, TiMPipeline, read_settings, write_png

# What follows from the other settings, or says only who wrote the file.
_NOT_COMPARED = ("nfe", "version")


@dataclass(frozen=True)
class Batch:
    """Pictures of one network call."""

    request: Request
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Drawn:
    """What drawing took."""

    count: int = 0
    """Pictures that were written."""
    nfe: frozenset[int] = frozenset()
    """Network evaluations a picture: one number for each setting that was drawn."""
    seconds: float = 0.0
    """Time of sampling and decoding."""
    peak_bytes: int = 0


def draw(
    pipe: TiMPipeline,
    batches: Sequence[Batch],
    finished: set[str],
    out: Path,
    *,
    on_picture: Callable[[Path, float, int], None] | None = None,
    bar: bool | tqdm = False,
) -> Drawn:
    """Draw what is not finished, a batch at a time, and write it as it comes.

    A batch of which some pictures are finished is drawn whole, so that the others come out as they would.

    Args:
        finished: stems that are kept.
        on_picture: told of every picture written: file, seconds and peak memory of its batch.
        bar: show one, or a bar that is counted up.
    Raises:
        CheckpointError: if the disk refuses; nothing half-written is left.
    """
    missing = [batch for batch in batches if any(job.stem not in finished for job in batch.jobs)]
    count, nfe, seconds, highest = 0, set[int](), 0.0, 0
    total = sum(len(batch.jobs) * batch.request.config.num_steps for batch in missing)
    own_bar = tqdm(total=total, unit="step", desc="sample", leave=False, disable=bar is not True)
    with own_bar:
        for batch in missing:
            reset_peak(pipe.device)
            output = pipe.run(batch.request, bar if isinstance(bar, tqdm) else own_bar)
            peak = peak_bytes(pipe.device) or 0
            highest = max(highest, peak)
            nfe.add(output.nfe)
            each = output.seconds / len(batch.jobs)
            for i, job in enumerate(batch.jobs):
                if job.stem in finished:
                    continue
                path = picture_path(out, job)
                write_png(path, output.pixels[i], output.picture_settings(i))
                count, seconds = count + 1, seconds + each
                if on_picture is not None:
                    on_picture(path, each, peak)
    return Drawn(count, frozenset(nfe), seconds, highest)


def picture_path(out: Path, job: Job) -> Path:
    return out / f"{job.stem}.png"


def form_batches(pipe: TiMPipeline, jobs: Sequence[Job]) -> list[Batch]:
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
            negative_prompts=[job.negative_prompt for job in group],
            **group[0].sampler,
        )
        for numbers in pipe.batches(request):
            batches.append(Batch(request.part(numbers), tuple(group[i] for i in numbers)))
    return batches


def find_finished(pipe: TiMPipeline, batches: Sequence[Batch], out: Path) -> set[str]:
    """Stems of the pictures that are there already, drawn as asked for.

    Raises:
        RequestError: if a file of that name is another picture; it is not overwritten.
    """
    found = set()
    for batch in batches:
        settings = pipe.settings(batch.request.config)
        for i, job in enumerate(batch.jobs):
            path = picture_path(out, job)
            if not path.exists():
                continue
            wanted = settings | batch.request.own_settings(i)
            try:
                stored = {k: v for k, v in read_settings(path).items() if k not in _NOT_COMPARED}
            except RequestError as error:
                raise RequestError(
                    f"{error}; delete it, if it is not yours, and it is drawn again"
                ) from error
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
