"""Quality against size and aspect ratio (`python launch/evaluate.py resolution`), the protocol of Table 4.

One network draws the same prompts at every size of a suite. Text-to-image networks are asked for the sizes
of the paper, scored by a published benchmark (the paper's scores are GenEval's) or whatever scorer is given;
handwriting networks for rows and columns of more digits than training shows, read back by the bundled
classifier. Every finished (network, steps, size) row is kept in `results.json`, and every picture in
`pictures/`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data_pipeline.draws import generator
from data_pipeline.handwriting import CELL_PX, REFERENCE_NAME, Orientation, Prompt, caption
from tim_ds.errors import RequestError
from tim_ds.eval.benchmarks import Benchmark, check_network
from tim_ds.eval.clip import Clip
from tim_ds.eval.draw import draw, find_finished, form_batches, picture_path
from tim_ds.eval.generate import PictureSet, digest, picture_set
from tim_ds.eval.handwriting import HandwritingScorer
from tim_ds.eval.handwriting import Scores as HandwritingScores
from tim_ds.eval.jobs import Job, read_lines
from tim_ds.eval.nfe import device_name, library_versions, read_manifest
from tim_ds.eval.pretrained import fingerprint
from tim_ds.eval.results import versions
from tim_ds.model.weights import sha256, write_aside
from tim_ds.pipeline import PromptLike, TiMPipeline, read_settings

PROTOCOL = 1
"""Raised whenever the meaning of a score changes: rows of an older protocol are computed again."""

RESULTS_NAME = "results.json"
PICTURES_FOLDER = "pictures"
CACHE_FOLDER = "cache"

TABLE_4_SIZES = (
    *("1024x2560", "1024x1856", "1024x1536", "1536x1024", "1856x1024", "2560x1024"),
    *("1024x1024", "1280x1280", "1536x1536", "2048x2048", "2560x2560", "3072x3072", "4096x4096"),
)
"""HEIGHTxWIDTH: the six aspect ratios of the paper, then its squares."""

Picture = NDArray[np.uint8]
Scores = dict[str, float | None]
"""By name; None: no value."""


@dataclass(frozen=True)
class Group:
    """The pictures of one size."""

    name: str
    size: str
    seen: bool | None
    """Whether training shows this size; None where that is not known."""
    family: str
    """Sizes of one family are joined by a line in the plot."""
    captions: tuple[PromptLike, ...]
    seeds: tuple[int, ...]


class PictureFiles(Sequence[Picture]):
    """Pictures of files, each read when it is asked for: thousands of 4096 x 4096 do not fit into memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, i: int) -> Picture: ...

    @overload
    def __getitem__(self, i: slice) -> PictureFiles: ...

    def __getitem__(self, i: int | slice) -> Picture | PictureFiles:
        return PictureFiles(self._paths[i]) if isinstance(i, slice) else load_picture(self._paths[i])


class Suite(Protocol):
    """What is drawn, and how it is scored."""

    groups: tuple[Group, ...]

    @property
    def plotted(self) -> Mapping[str, str]:
        """Scores that the report draws, with their titles; empty for all."""
        ...

    @property
    def libraries(self) -> Sequence[str]:
        """Whose versions decide the scores, besides those of every row."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything that decides the scores besides the pictures."""
        ...

    @property
    def title(self) -> str:
        """What is scored, as it may be quoted."""
        ...

    def remarks(self) -> dict[str, Any]:
        """What the details of every row say besides what scoring found."""
        ...

    def check(self, pipeline: TiMPipeline) -> None:
        """Raises RequestError if the network cannot draw this suite."""
        ...

    def score_files(self, group: Group, pictures: PictureSet, cache: Path) -> tuple[Scores, dict[str, Any]]:
        """(scores, details) of the pictures of a size, in the order of its captions.

        Args:
            cache: folder for what need not be done twice.
        """
        ...


class Scorer(Protocol):
    """Scores pictures of text-to-image networks. `--scorer package.module:name` names a callable that takes
    the device and returns one. Pictures are read from their files when they are asked for."""

    def identity(self) -> dict[str, Any]: ...

    def score(self, captions: Sequence[str], pictures: Sequence[Picture]) -> Scores: ...


class HandwritingSuite:
    """Rows of 1 to `longest` digits and columns of 2 to `longest`.

    Args:
        data: handwriting data set of the training, which says what was shown.
    Raises:
        RequestError: if the folder is no such data set.
    """

    plotted: Mapping[str, str] = MappingProxyType(
        {
            "frechet_distance": "Frechet distance to held-back scans (lower is better)",
            "digit_accuracy": "Digits read as asked for, %",
            "prompt_accuracy": "Pictures that show what the prompt says, %",
        }
    )
    libraries: Sequence[str] = ("scikit-learn",)
    title = "Handwriting, read back"

    def __init__(self, data: Path, *, pictures: int, longest: int, seed: int) -> None:
        if longest < 1 or pictures < 65:
            raise RequestError(
                f"--longest, --pictures: expected at least 1 and 65 (for a Frechet distance of {CELL_PX**2} "
                f"pixels), received {longest} and {pictures}"
            )
        made = read_manifest(data)
        self._scorer = HandwritingScorer.from_folder(data)
        self._scans_sha256 = sha256(data / REFERENCE_NAME)
        self._prompts: dict[str, tuple[Prompt, ...]] = {}
        groups = []
        families: tuple[tuple[Orientation, int], ...] = (("row", 1), ("column", 2))
        for family, first in families:
            for count in range(first, longest + 1):
                name = f"{family}_{count}"
                prompts, captions = [], []
                for i in range(pictures):
                    rng = generator(seed, f"resolution.{name}", 0, i)
                    prompts.append(Prompt(tuple(int(d) for d in rng.integers(0, 10, count)), family))
                    phrasing = made["phrasings"][int(rng.integers(len(made["phrasings"])))]
                    captions.append(caption(prompts[-1], phrasing))
                self._prompts[name] = tuple(prompts)
                height, width = prompts[0].size_px
                seen = count <= made["max_cells"] and not (family == "row" and count == 4)
                seeds = tuple(range(seed, seed + pictures))
                groups.append(Group(name, f"{height}x{width}", seen, family, tuple(captions), seeds))
        self.groups = tuple(groups)

    def identity(self) -> dict[str, Any]:
        return {"suite": "handwriting", "scans_sha256": self._scans_sha256}

    def remarks(self) -> dict[str, Any]:
        return {}

    def check(self, pipeline: TiMPipeline) -> None:
        check_handwriting(pipeline)

    def score(self, group: Group, pictures: Sequence[Picture]) -> Scores:
        return shares(self._scorer.score(self._prompts[group.name], pictures))

    def score_files(self, group: Group, pictures: PictureSet, cache: Path) -> tuple[Scores, dict[str, Any]]:
        return self.score(group, [load_picture(path) for path in pictures.paths]), {}


class PromptSuite:
    """The same captions at every size, scored by `scorer`; without one, time and memory alone are measured.

    `plotted` is empty: all scores are drawn.

    Raises:
        RequestError: if there is no prompt or no size, or a size twice.
    """

    plotted: Mapping[str, str] = MappingProxyType({})
    libraries: Sequence[str] = ("transformers",)
    title = "The same prompts at every size"

    def __init__(
        self, prompts: Path, sizes: Sequence[str], *, seed: int, scorer: Scorer | None = None
    ) -> None:
        captions = tuple(str(line.prompt) for line in read_lines(prompts))
        _check_sizes(sizes)
        self._scorer = scorer
        seeds = tuple(range(seed, seed + len(captions)))
        self.groups = tuple(Group(size, size, None, _family(size), captions, seeds) for size in sizes)

    def identity(self) -> dict[str, Any]:
        return {"suite": "prompts", "scorer": None if self._scorer is None else self._scorer.identity()}

    def remarks(self) -> dict[str, Any]:
        return {}

    def check(self, pipeline: TiMPipeline) -> None:
        if pipeline.export.model.condition != "text":
            raise RequestError(f"{pipeline.export.source.name}: expected a network that draws from captions")

    def score(self, group: Group, pictures: Sequence[Picture]) -> Scores:
        if self._scorer is None:
            return {}
        return self._scorer.score([str(text) for text in group.captions], pictures)

    def score_files(self, group: Group, pictures: PictureSet, cache: Path) -> tuple[Scores, dict[str, Any]]:
        return self.score(group, PictureFiles(pictures.paths)), {}


class BenchmarkSuite:
    """The pictures of a published benchmark at every size, scored as `launch/evaluate.py BENCHMARK` does.

    Args:
        benchmark: loaded, and moved to its device.
        batch: pictures that a feature network sees at a time.
    Raises:
        RequestError: if there is no size, or a size twice.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        sizes: Sequence[str],
        *,
        seed: int,
        batch: int = 32,
        progress: bool = True,
    ) -> None:
        _check_sizes(sizes)
        self.benchmark = benchmark
        self._batch, self._progress = batch, progress
        prompts = tuple(benchmark.prompts)
        seeds = tuple(range(seed, seed + len(prompts)))
        self.groups = tuple(Group(size, size, None, _family(size), prompts, seeds) for size in sizes)
        self.plotted = dict(benchmark.plotted)
        self.libraries = benchmark.libraries

    def identity(self) -> dict[str, Any]:
        return {"suite": self.benchmark.name, "scorer": self.benchmark.scorer}

    @property
    def title(self) -> str:
        return self.benchmark.title

    def remarks(self) -> dict[str, Any]:
        return self.benchmark.remarks()

    def check(self, pipeline: TiMPipeline) -> None:
        check_network(self.benchmark, pipeline)

    def score_files(self, group: Group, pictures: PictureSet, cache: Path) -> tuple[Scores, dict[str, Any]]:
        scored = self.benchmark.score(pictures, cache, batch=self._batch, progress=self._progress)
        return scored.scores, scored.details


@dataclass(frozen=True, kw_only=True)
class Row:
    """Scores of one network at one size."""

    label: str
    identity: dict[str, Any]
    """Everything that decides the pictures and scores; a row is reused while it is equal."""
    group: str
    size: str
    seen: bool | None
    num_pictures: int
    scores: Scores
    nfe: int
    seconds_per_picture: float | None
    """Sampling and decoding; None if that is not known any more."""
    peak_bytes: int | None
    """Of the device on a GPU, of the process on a CPU."""
    export: str
    model: str
    recipe_sha256: str | None
    step: int
    versions: dict[str, str]
    device: str
    seed: int | None = None
    """Of the first picture; the next takes the next number."""
    details: dict[str, Any] = field(default_factory=dict)
    """Counts and sub-scores."""

    @property
    def num_steps(self) -> int:
        return self.identity["settings"]["num_steps"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All that the report shows."""

    suite: Suite
    rows: list[Row]
    """By network and steps, then by size."""
    folders: dict[tuple[str, int, str], Path] = field(default_factory=dict)
    """Pictures by (label, steps, group)."""


def run(
    exports: Sequence[tuple[str | None, Path]],
    suite: Suite,
    out: Path,
    *,
    steps: Sequence[int],
    sampler: Mapping[str, Any] = MappingProxyType({}),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    part: tuple[int, int] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Draw and score every network at every step count and size.

    Args:
        sampler: fields of `SamplerConfig` besides the steps; None takes what the export says.
        dtype: of the networks' parameters.
        part: (k, n): draw every n-th batch from the k-th and score nothing, so that n processes share the
            work; None: draw what is missing, and score.
    Raises:
        RequestError: if a network cannot draw the suite, a size is too large for the device (before anything
            is drawn), a picture is damaged or another one, or `out` holds something else.
        CheckpointError: if an export is not whole, or the disk refuses.
    """
    pipelines = [
        (label, path, TiMPipeline.from_pretrained(path, device=device, dtype=dtype))
        for label, path in exports
    ]
    given_sampler = {name: value for name, value in sampler.items() if value is not None}
    for _, _, pipe in pipelines:
        suite.check(pipe)
        for num_steps in steps:
            for group in suite.groups:
                pipe.request(group.captions[0], group.size, num_steps=num_steps, **given_sampler)
    finished = _read_rows(out / RESULTS_NAME)
    evaluation = Evaluation(suite, [])
    pictures = sum(len(group.captions) for group in suite.groups)
    total = pictures * sum(steps) * len(exports)
    with tqdm(total=total, unit="step", unit_scale=True, desc="resolution", disable=not progress) as bar:
        for given, path, pipe in pipelines:
            label = given or pipe.export.source.name
            for num_steps in steps:
                for group in suite.groups:
                    bar.set_postfix_str(f"{label}, {num_steps} steps, {group.size}")
                    place = f"{pipe.weights_sha256[:12]}_steps{num_steps:04d}"
                    task = _Task(
                        pipe, group, num_steps, given_sampler, out / PICTURES_FOLDER / place / group.name
                    )
                    if part is not None:
                        task.draw(bar, part)
                        continue
                    row = task.row(suite, out / CACHE_FOLDER, finished, bar, label=label, export=path)
                    finished = [row, *(other for other in finished if other.identity != row.identity)]
                    _write_rows(out / RESULTS_NAME, finished)
                    evaluation.rows.append(row)
                    evaluation.folders[label, num_steps, group.name] = task.folder
    return evaluation


@dataclass(frozen=True)
class _Cost:
    """What drawing a size took, kept beside the pictures: scoring may be interrupted, or done again."""

    seconds_per_picture: float
    peak_bytes: int


class _Task:
    """The pictures of one network, step count and size."""

    def __init__(
        self,
        pipe: TiMPipeline,
        group: Group,
        num_steps: int,
        given_sampler: Mapping[str, Any],
        folder: Path,
    ) -> None:
        sampler = {"num_steps": num_steps, **given_sampler}
        self.pipe, self.group, self.folder = pipe, group, folder
        self.jobs = [
            Job(stem=f"{i:05d}", prompt=text, size=group.size, seed=seed, sampler=sampler)
            for i, (text, seed) in enumerate(zip(group.captions, group.seeds, strict=True))
        ]
        self.batches = form_batches(pipe, self.jobs)
        self._num_steps = num_steps
        self._cost_path = folder.with_name(f"{folder.name}.json")

    def draw(self, bar: tqdm, part: tuple[int, int] = (0, 1)) -> int:
        """Draw what is missing; returns how many pictures were."""
        mine = self.batches[part[0] :: part[1]]
        kept = find_finished(self.pipe, mine, self.folder)
        bar.update(len(kept) * self._num_steps)
        drawn = draw(self.pipe, mine, kept, self.folder, bar=bar)
        if drawn.count:
            cost = _Cost(round(drawn.seconds / drawn.count, 6), drawn.peak_bytes)
            text = json.dumps(asdict(cost)) + "\n"
            write_aside(self._cost_path, len(text), lambda aside: aside.write_text(text))
        return drawn.count

    def row(
        self,
        suite: Suite,
        cache: Path,
        finished: Sequence[Row],
        bar: tqdm,
        *,
        label: str,
        export: Path,
    ) -> Row:
        """The row of these pictures: the finished one if it is of them, or else drawn and scored."""
        pipe, group = self.pipe, self.group
        identity = {
            "protocol": PROTOCOL,
            **suite.identity(),
            "group": group.name,
            "size": group.size,
            "prompts_sha256": digest([group.captions, group.seeds]),
            "settings": pipe.settings(self.batches[0].request.config),
        }
        identity = json.loads(json.dumps(identity))
        count = self.draw(bar)
        row = next((row for row in finished if row.identity == identity), None)
        remarks = json.loads(json.dumps(suite.remarks()))
        if row is not None and not count and row.details | remarks == row.details:
            return replace(row, label=label)
        names = [picture_path(self.folder, job).name for job in self.jobs]
        scores, details = suite.score_files(group, picture_set(self.folder, names, progress=False), cache)
        cost = self._read_cost()
        return Row(
            label=label,
            identity=identity,
            group=group.name,
            size=group.size,
            seen=group.seen,
            num_pictures=len(self.jobs),
            scores=scores,
            nfe=_stored_nfe(self.folder / names[0]),
            seconds_per_picture=None if cost is None else cost.seconds_per_picture,
            peak_bytes=None if cost is None else cost.peak_bytes,
            export=str(export),
            model=pipe.export.source.name,
            recipe_sha256=pipe.export.source.recipe_sha256,
            step=pipe.export.step,
            versions={**library_versions(), **versions(suite.libraries)},
            device=device_name(pipe.device),
            seed=group.seeds[0],
            details=details | remarks,
        )

    def _read_cost(self) -> _Cost | None:
        try:
            return _Cost(**json.loads(self._cost_path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def check_handwriting(pipeline: TiMPipeline) -> None:
    """Raises RequestError unless the network draws grey pictures from captions."""
    condition, channels = pipeline.export.model.condition, pipeline.autoencoder.pixel_channels
    if condition != "text" or channels != 1:
        raise RequestError(
            f"{pipeline.export.source.name}: expected a network that draws grey pictures from captions, "
            f"received condition {condition!r} and {channels} colour channels"
        )


def shares(scores: HandwritingScores) -> Scores:
    """The scores that are compared, by name."""
    return {
        "frechet_distance": scores.frechet_distance,
        "frechet_floor": scores.frechet_floor,
        "digit_accuracy": scores.digit_accuracy,
        "count_accuracy": scores.count_accuracy,
        "prompt_accuracy": scores.prompt_accuracy,
    }


class ClipScorer:
    """Mean cosine of pictures and their captions, times 100: the CLIP score of `mjhq`.

    Args:
        name: folder or hub id of a CLIP model.
    """

    def __init__(self, name: str, device: str) -> None:
        self._name = name
        self._clip = Clip.from_pretrained(name, device=device)

    def identity(self) -> dict[str, Any]:
        return {"name": "clip_score", "weights": fingerprint(self._name)}

    def score(self, captions: Sequence[str], pictures: Sequence[Picture]) -> Scores:
        cosines = []
        for text, pixels in zip(captions, pictures, strict=True):
            image = Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
            vectors = self._clip.encode_pictures([image]), self._clip.encode_captions([text])
            cosines.append(float((vectors[0] * vectors[1]).sum()))
        return {"clip_score": 100 * sum(cosines) / len(cosines)}


def load_scorer(name: str, device: str) -> Scorer:
    """The scorer that `package.module:callable` gives for a device, or the CLIP score with `clip=FOLDER`.

    The published benchmarks bring prompts of their own: `BenchmarkSuite`.

    Raises:
        RequestError: if there is no such callable or no such model.
    """
    if name.startswith("clip="):
        return ClipScorer(name.removeprefix("clip="), device)
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)(device)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(
            f"--scorer {name}: expected clip=FOLDER, or package.module:callable that takes the device "
            f"and returns a scorer ({error})"
        ) from error


def _read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run; those of another protocol are left out."""
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text())
        if stored["evaluation"] != "resolution":
            raise ValueError(f"results of {stored['evaluation']!r}")
        return [Row(**row) for row in stored["rows"] if row["identity"]["protocol"] == PROTOCOL]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{path}: not the results of this evaluation ({error}); choose another --out, or delete the file"
        ) from error


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: (row.label, row.num_steps, row.group))
    text = json.dumps({"evaluation": "resolution", "rows": [asdict(row) for row in ordered]}, indent=2) + "\n"
    write_aside(path, len(text.encode()), lambda aside: aside.write_text(text))


def _stored_nfe(path: Path) -> int:
    return int(read_settings(path)["nfe"])


def _check_sizes(sizes: Sequence[str]) -> None:
    if not sizes or len(set(sizes)) != len(sizes):
        raise RequestError(f"--sizes: expected different sizes, received {', '.join(sizes) or 'none'}")


def _family(size: str) -> str:
    height, width = size.split("x")
    return "square" if height == width else "aspect"


def load_picture(path: Path) -> Picture:
    """uint8 [H, W, 1 or 3] of a PNG."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
