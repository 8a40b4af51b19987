"""The published benchmarks behind one interface: which pictures they ask for, how a set of them is scored.

`launch/evaluate.py geneval|dpg|mjhq|imagenet`, `resolution --scorer` and `train.evaluation.benchmarks` all
score through these classes, so that a number means the same wherever it was made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

from tim_ds.errors import RequestError
from tim_ds.eval import adm_npz, calibration, dpg, geneval, imagenet, mjhq
from tim_ds.eval.calibration import Calibration
from tim_ds.eval.clip import DEFAULT_CLIP, Clip
from tim_ds.eval.detector import DEFAULT_DETECTOR, Detector
from tim_ds.eval.generate import PictureSet, Wanted, load_picture, picture_set
from tim_ds.eval.inception import FeatureNetwork, Inception, clean_resizer
from tim_ds.eval.pretrained import fingerprint
from tim_ds.eval.report import markdown_table
from tim_ds.eval.results import Column, ResultRow, ScoreLog, SheetItem, kept_arrays, make_row, spread
from tim_ds.eval.vqa import Answerer, load_answerer
from tim_ds.model.weights import sha256
from tim_ds.pipeline import PromptLike, TiMPipeline

T = TypeVar("T")

_SHEET_COLUMNS = 6
_SHEET_SINGLES = 24
"""Of benchmarks with one picture a prompt."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """What a benchmark says of a set of pictures, and how a report shows it."""

    scores: dict[str, float | None]
    """By name; shares lie in 0 to 1."""
    details: dict[str, Any]
    columns: Sequence[Column]
    items: Sequence[SheetItem]
    """Of the contact sheet."""
    notes: str
    by_category: str = ""
    """A table of its own, in Markdown."""


class Benchmark(ABC):
    """One published benchmark, with its prompts read and its networks not yet."""

    name: ClassVar[str]
    condition: ClassVar[Literal["text", "class"]]
    """What a network must be conditioned on."""
    libraries: ClassVar[tuple[str, ...]]
    """Whose versions decide the scores."""
    plotted: ClassVar[Mapping[str, str]]
    """The scores that plots show, with their titles."""

    @property
    @abstractmethod
    def title(self) -> str: ...

    @property
    @abstractmethod
    def prompts(self) -> list[PromptLike]:
        """What to draw, one entry a picture, in the order in which `score` takes the pictures."""
        ...

    @abstractmethod
    def wanted(self, seed: int) -> list[Wanted]:
        """The pictures in the published layout of files."""
        ...

    @abstractmethod
    def found(self, folder: Path) -> list[Wanted]:
        """The pictures that another program left in `folder`, in the published layout.

        Raises:
            RequestError: if some are missing.
        """
        ...

    @abstractmethod
    def load(self) -> None:
        """Read the networks and references that scoring needs, on the CPU.

        Raises:
            RequestError: if one is missing or does not fit, or there are too few pictures for a score.
        """
        ...

    @abstractmethod
    def to(self, device: str) -> None:
        """Move the networks, once loaded."""
        ...

    @cached_property
    def scorer(self) -> dict[str, Any]:
        """Everything that decides the scores besides the pictures; read once, weights are gigabytes."""
        return self._scorer()

    @abstractmethod
    def _scorer(self) -> dict[str, Any]: ...

    def remarks(self) -> dict[str, Any]:
        """What the details of every row say besides what scoring found."""
        return {}

    @abstractmethod
    def score(
        self,
        pictures: PictureSet,
        cache: Path,
        *,
        references: Path | None = None,
        batch: int = 32,
        progress: bool = True,
    ) -> Scored:
        """Score a whole set. What is finished is kept in `cache` and not done again.

        Args:
            references: folder for what is made of reference pictures, which many sets share; None: `cache`.
            batch: pictures that a feature network sees at a time.
        """
        ...


def check_network(benchmark: Benchmark, pipeline: TiMPipeline, *, num_classes: int | None = None) -> None:
    """Raises RequestError if the network is conditioned on something else than the benchmark asks for."""
    model, name = pipeline.export.model, pipeline.export.source.name
    if model.condition != benchmark.condition:
        raise RequestError(
            f"{name}: expected a network conditioned on {benchmark.condition}, received one on "
            f"{model.condition}"
        )
    if num_classes is not None and model.num_classes != num_classes:
        raise RequestError(
            f"{name}: knows {model.num_classes} classes, expected {num_classes} (--num-classes)"
        )


def row_of(
    benchmark: Benchmark, pictures: PictureSet, scored: Scored, *, label: str | None, device: str
) -> ResultRow:
    """The result row of a set of pictures."""
    return make_row(
        evaluation=benchmark.name,
        title=benchmark.title,
        label=label,
        pictures=pictures,
        scorer=benchmark.scorer,
        scores=scored.scores,
        details=scored.details,
        libraries=benchmark.libraries,
        device=device,
    )


def notes_of(row: ResultRow, scored: Scored) -> str:
    """What stands below the table of a benchmark whose last row is `row`."""
    return scored.notes + (
        f"\n{row.label}, by category\n\n{scored.by_category}" if scored.by_category else ""
    )


def chosen(items: Sequence[T], limit: int | None) -> list[T]:
    """All of `items`, or `limit` of them spread evenly: files of prompts are sorted by task."""
    return list(items) if limit is None else [items[n] for n in spread(len(items), limit)]


@dataclass(kw_only=True, eq=False)
class Geneval(Benchmark):
    """GenEval, rebuilt with Mask2Former of transformers.

    Args:
        num: pictures a prompt.
        limit: prompts, spread over the file; None: all.
        calibration: what an earlier comparison with the published evaluator found (`calibration.json`).
        published: verdicts of the published evaluator on the pictures to be scored; makes a calibration.
    """

    metadata: Path
    num: int = 4
    limit: int | None = None
    detector: str = DEFAULT_DETECTOR
    clip: str = DEFAULT_CLIP
    calibration: Path | None = None
    published: Path | None = None
    rules: geneval.Rules = field(default_factory=geneval.Rules)
    name: ClassVar[str] = "geneval"
    plotted: ClassVar[Mapping[str, str]] = MappingProxyType({"overall": "GenEval (rebuilt), overall"})
    condition: ClassVar[Literal["text", "class"]] = "text"
    libraries: ClassVar[tuple[str, ...]] = ("transformers",)

    def __post_init__(self) -> None:
        self.tasks = chosen(geneval.read_metadata(self.metadata), self.limit)
        self.networks: tuple[Detector, Clip] | None = None
        self.results: list[dict[str, Any]] = []
        """Verdicts of the pictures scored last, in the published format."""
        self._scored: PictureSet | None = None
        if self.calibration is not None and self.published is not None:
            raise RequestError("--calibration: makes no sense beside --calibrate, which makes one")
        self.calibrated: Calibration | None = None
        if self.calibration is not None:
            self.calibrated = Calibration.read(self.calibration)
        self.reference = None if self.published is None else geneval.read_results(self.published)
        """Verdicts of the published evaluator, by picture."""

    @property
    def title(self) -> str:
        if self.calibrated is None:
            return f"{geneval.TITLE}; {calibration.NOT_CALIBRATED}"
        return f"{geneval.TITLE}; calibrated on {self.calibrated.num_pictures:,} pictures"

    def remarks(self) -> dict[str, Any]:
        found = self.calibrated
        return {"calibration": calibration.NOT_CALIBRATED if found is None else found.remark()}

    @property
    def prompts(self) -> list[PromptLike]:
        return [task.prompt for task in self.tasks for _ in range(self.num)]

    def wanted(self, seed: int) -> list[Wanted]:
        return geneval.wanted_pictures(self.tasks, num_per_prompt=self.num, seed=seed)

    def found(self, folder: Path) -> list[Wanted]:
        return geneval.pictures_of_layout(folder, self.tasks)

    def load(self) -> None:
        if self.calibrated is not None and self.calibration is not None:
            self.calibrated.refuse_other(self.scorer, self.calibration)
        self.networks = Detector.from_pretrained(self.detector), Clip.from_pretrained(self.clip)

    def to(self, device: str) -> None:
        for network in self.loaded:
            network.to(device)

    @property
    def loaded(self) -> tuple[Detector, Clip]:
        assert self.networks is not None, "load() comes first"
        return self.networks

    def _scorer(self) -> dict[str, Any]:
        return {
            "protocol": geneval.PROTOCOL,
            "metadata_sha256": sha256(self.metadata),
            "num_prompts": len(self.tasks),
            "is_published_suite": geneval.is_published_suite(self.tasks),
            "rules": {one.name: getattr(self.rules, one.name) for one in fields(self.rules)},
            "detector": fingerprint(self.detector),
            "clip": fingerprint(self.clip),
        }

    def score(
        self,
        pictures: PictureSet,
        cache: Path,
        *,
        references: Path | None = None,
        batch: int = 32,
        progress: bool = True,
    ) -> Scored:
        detector, clip = self.loaded
        self._scored = pictures
        log = ScoreLog(cache, self.name, {"pictures_sha256": pictures.sha256, "scorer": self.scorer})
        colours = geneval.ColourReader(clip)
        self.results = geneval.score_pictures(
            pictures, self.tasks, detector, colours, self.rules, log, progress=progress
        )
        if self.published is not None and self.reference is not None:
            self.calibrated = Calibration.of(
                geneval.calibrate(self.results, self.reference),
                self.scorer,
                pictures_sha256=pictures.sha256,
                results_sha256=sha256(self.published),
            )
        scores, details = geneval.summarise(self.results)
        found = self.calibrated
        if found is not None:
            # Of a part of the prompts, which may have a part of the tasks: the offset of that part.
            overall, offset = scores["overall"], found.offset_of(details["by_task"])
            scores["overall_less_offset"] = None if overall is None or offset is None else overall - offset
        per_prompt = len(pictures.names) // len(self.tasks)
        firsts = [
            next(n for n, task in enumerate(self.tasks) if task.tag == tag) for tag in details["by_task"]
        ]
        whole = geneval.is_published_suite(self.tasks)
        return Scored(
            scores=scores,
            details=details | self.remarks(),
            columns=[
                Column("overall", "overall", percent=True, plotted=True),
                Column("overall_less_offset", "less offset", percent=True),
                *(Column(tag, tag, percent=True) for tag in geneval.TASKS),
                Column("prompts", "any right", percent=True),
            ],
            items=[
                SheetItem(
                    self.tasks[n].prompt,
                    tuple(range(n * per_prompt, (n + 1) * per_prompt)),
                    tuple(not self.results[n * per_prompt + k]["correct"] for k in range(per_prompt)),
                )
                for n in firsts
            ],
            notes=(
                "Shares of right pictures in %, by task; overall is their plain mean; any right: prompts\n"
                "with a right picture among theirs. The detector is not that of the published evaluator.\n"
                + _calibration_note(found)
                + ("" if whole else "The prompts are not the published 553: a part or others.\n")
            ),
        )

    def judge_at_thresholds(
        self, thresholds: Sequence[float], cache: Path, *, progress: bool = True
    ) -> list[list[bool]]:
        """Of the pictures scored last, whether each is right at every threshold; kept in `cache`."""
        detector, clip = self.loaded
        assert self._scored is not None, "score() comes first"
        identity = {"pictures_sha256": self._scored.sha256, "scorer": self.scorer, "at": list(thresholds)}
        return geneval.judge_at_thresholds(
            self._scored,
            self.tasks,
            detector,
            geneval.ColourReader(clip),
            self.rules,
            thresholds,
            ScoreLog(cache, "geneval_thresholds", identity),
            progress=progress,
        )


@dataclass(kw_only=True, eq=False)
class Dpg(Benchmark):
    """DPG-Bench with a question answering model of transformers.

    Args:
        num: pictures a prompt; of a grid, those that count.
        limit: prompts, spread over the file; None: all.
    """

    questions: Path
    vqa: str | None = None
    num: int = 4
    limit: int | None = None
    layout: dpg.Layout = "files"
    name: ClassVar[str] = "dpg"
    plotted: ClassVar[Mapping[str, str]] = MappingProxyType({"overall": "DPG-Bench, overall"})
    condition: ClassVar[Literal["text", "class"]] = "text"
    libraries: ClassVar[tuple[str, ...]] = ("transformers",)

    def __post_init__(self) -> None:
        self.file = dpg.read_questions(self.questions)
        self.asked = chosen(self.file.prompts, self.limit)
        self.answerer: Answerer | None = None

    @property
    def title(self) -> str:
        name = None if self.vqa is None else fingerprint_name(self.vqa)
        return f"DPG-Bench (answers by {name}; published: {dpg.PUBLISHED_VQA})"

    @property
    def prompts(self) -> list[PromptLike]:
        return [prompt.text for prompt in self.asked for _ in range(self.num)]

    def wanted(self, seed: int) -> list[Wanted]:
        return dpg.wanted_pictures(self.asked, num_per_prompt=self.num, seed=seed, layout=self.layout)

    def found(self, folder: Path) -> list[Wanted]:
        return self.wanted(0)

    def load(self) -> None:
        if self.vqa is None:
            raise RequestError(
                "--vqa: needed to score; a folder or hub id of ViLT, BLIP or a vision-language chat model"
            )
        self.answerer = load_answerer(self.vqa)

    def to(self, device: str) -> None:
        assert self.answerer is not None, "load() comes first"
        self.answerer.model.to(device)

    def _scorer(self) -> dict[str, Any]:
        return {
            "protocol": dpg.PROTOCOL,
            "questions_sha256": sha256(self.questions),
            "num_prompts": len(self.asked),
            "num_per_prompt": self.num,
            "vqa": fingerprint(self.vqa or ""),
        }

    def score(
        self,
        pictures: PictureSet,
        cache: Path,
        *,
        references: Path | None = None,
        batch: int = 32,
        progress: bool = True,
    ) -> Scored:
        assert self.answerer is not None, "load() comes first"
        log = ScoreLog(cache, self.name, {"pictures_sha256": pictures.sha256, "scorer": self.scorer})
        answers = dpg.score_pictures(
            pictures,
            self.asked,
            self.answerer,
            log,
            layout=self.layout,
            num_of_grid=self.num,
            progress=progress,
        )
        scores, details = dpg.summarise(self.asked, answers)
        details |= {
            "num_unknown_parents": self.file.num_unknown_parents,
            "num_repeated_questions": self.file.num_repeated,
            "num_other_texts": self.file.num_other_texts,
        }
        per_prompt = len(pictures.names) // len(self.asked)
        return Scored(
            scores=scores,
            details=details,
            columns=[
                Column("overall", "overall", percent=True, plotted=True),
                *(Column(name, name, percent=True) for name in scores if name != "overall"),
            ],
            items=[
                SheetItem(_shortened(self.asked[n].text), tuple(range(n * per_prompt, (n + 1) * per_prompt)))
                for n in spread(len(self.asked), _SHEET_COLUMNS)
            ],
            notes=(
                "Questions met in %: overall by picture, then prompt; others over all questions of a\n"
                "category. A question counts as met if it and all it depends on are answered yes. Numbers\n"
                "of another model for the answers are not comparable.\n"
                + _part(len(self.asked), dpg.PUBLISHED_PROMPTS, "prompts")
            ),
        )


@dataclass(kw_only=True, eq=False)
class Mjhq(Benchmark):
    """FID and CLIP score on MJHQ-30K.

    Args:
        reference: the data set's pictures, CATEGORY/KEY.jpg.
        limit: entries, spread over the file; None: all.
        network: None loads torch-fidelity's Inception from `inception`.
    """

    metadata: Path
    reference: Path | None = None
    limit: int | None = None
    inception: Path | None = None
    clip: str = DEFAULT_CLIP
    network: FeatureNetwork | None = None
    name: ClassVar[str] = "mjhq"
    plotted: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"fid": "FID (lower is better)", "clip": "CLIP score"}
    )
    condition: ClassVar[Literal["text", "class"]] = "text"
    libraries: ClassVar[tuple[str, ...]] = ("torch-fidelity", "clean-fid", "transformers")

    def __post_init__(self) -> None:
        self.entries = chosen(mjhq.read_metadata(self.metadata), self.limit)
        self._clip: Clip | None = None
        self._real: PictureSet | None = None

    @property
    def title(self) -> str:
        return mjhq.TITLE

    @property
    def prompts(self) -> list[PromptLike]:
        return [one.prompt for one in self.entries]

    def wanted(self, seed: int) -> list[Wanted]:
        return mjhq.wanted_pictures(self.entries, seed=seed)

    def found(self, folder: Path) -> list[Wanted]:
        names = mjhq.picture_names(folder, self.entries, option="--pictures")
        return [Wanted(name, one.prompt, 0) for name, one in zip(names, self.entries, strict=True)]

    def load(self) -> None:
        if self.reference is None:
            raise RequestError("--reference: needed to score; the folder of MJHQ-30K's pictures")
        self.network = self.network or Inception.load(self.inception)
        clean_resizer()
        mjhq.check_counts(self.entries, self.network)
        names = mjhq.picture_names(self.reference, self.entries, option="--reference")
        self._clip = Clip.from_pretrained(self.clip)
        # Every picture is looked at, so that a damaged one is found before any work.
        self._real = picture_set(self.reference, names)

    def to(self, device: str) -> None:
        network, clip = self._loaded
        if isinstance(network, Inception):
            network.to(device)
        clip.to(device)

    @property
    def _loaded(self) -> tuple[FeatureNetwork, Clip]:
        assert self.network is not None and self._clip is not None, "load() comes first"
        return self.network, self._clip

    def _scorer(self) -> dict[str, Any]:
        return {
            "protocol": mjhq.PROTOCOL,
            "metadata_sha256": sha256(self.metadata),
            "num_prompts": len(self.entries),
            "reference_sha256": self._reference.sha256,
            "inception": self._loaded[0].identity,
            "clip": fingerprint(self.clip),
        }

    @property
    def _reference(self) -> PictureSet:
        assert self._real is not None, "load() comes first"
        return self._real

    def score(
        self,
        pictures: PictureSet,
        cache: Path,
        *,
        references: Path | None = None,
        batch: int = 32,
        progress: bool = True,
    ) -> Scored:
        network, clip = self._loaded
        reference = self._reference
        categories = [one.category for one in self.entries]
        scores: dict[str, float | None] = {}
        details: dict[str, Any] = {}
        for clean, name in ((False, "fid"), (True, "clean_fid")):
            made, real = (
                mjhq.features(which, network, place, clean=clean, batch=batch, progress=progress)
                for which, place in ((pictures, cache), (reference, references or cache))
            )
            scores[name], details[f"{name}_by_category"] = mjhq.distances(made, real, categories)
        clip_id = fingerprint(self.clip)
        weights = "".join(clip_id.get("weights_sha256", [clip_id["name"]]))[:12].replace("/", "-")
        values = kept_arrays(
            cache / f"clip_{pictures.sha256[:12]}_{sha256(self.metadata)[:12]}_{weights}.npz",
            lambda: {"clip": mjhq.clip_scores(pictures, self.entries, clip, batch=batch, progress=progress)},
        )["clip"]
        scores["clip"] = float(values.mean())
        details["clip_by_category"] = mjhq.by_category(values, categories)
        return Scored(
            scores=scores,
            details=details,
            columns=[
                Column("fid", "FID", plotted=True, is_lower_better=True),
                Column("clean_fid", "FID (clean)", is_lower_better=True),
                Column("clip", "CLIP", plotted=True),
            ],
            items=[
                SheetItem(_shortened(self.entries[n].prompt), (n,))
                for n in spread(len(self.entries), _SHEET_SINGLES)
            ],
            notes=(
                "FID: pictures at their own size into torch-fidelity's Inception, which resizes without "
                "filter, as\nthe first FID did; FID (clean): resized by clean-fid. CLIP: 100 x mean cosine "
                "with the prompt.\n" + _part(len(self.entries), mjhq.PUBLISHED_COUNT, "entries")
            ),
            by_category=_by_category(details),
        )


@dataclass(kw_only=True, eq=False)
class Imagenet(Benchmark):
    """FID, sFID, Inception score, precision and recall on ImageNet, as ADM defines them.

    Args:
        reference: reference batch of ADM's evaluator (npz).
        count: pictures, a multiple of the classes.
        network: None loads torch-fidelity's Inception from `inception`.
    """

    reference: Path | None = None
    count: int = imagenet.PUBLISHED_COUNT
    num_classes: int = 1000
    inception: Path | None = None
    network: FeatureNetwork | None = None
    name: ClassVar[str] = "imagenet"
    plotted: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"fid": "FID (lower is better)", "inception_score": "Inception score"}
    )
    condition: ClassVar[Literal["text", "class"]] = "class"
    libraries: ClassVar[tuple[str, ...]] = ("torch-fidelity", "scipy")

    def __post_init__(self) -> None:
        self._file: adm_npz.Reference | None = None
        self._device = "cpu"

    @property
    def title(self) -> str:
        return imagenet.TITLE

    @property
    def prompts(self) -> list[PromptLike]:
        return [one.prompt for one in self.wanted(0)]

    def wanted(self, seed: int) -> list[Wanted]:
        return imagenet.wanted_pictures(self.count, self.num_classes, seed=seed)

    def found(self, folder: Path) -> list[Wanted]:
        return self.wanted(0)

    def load(self) -> None:
        if self.reference is None:
            raise RequestError("--reference: needed to score; a reference batch of ADM's evaluator (npz)")
        self._file = adm_npz.read_reference(self.reference)
        self.network = self.network or Inception.load(self.inception)
        imagenet.check_counts(self.count, self._file, self.network)

    def to(self, device: str) -> None:
        self._device = device
        if isinstance(self.network, Inception):
            self.network.to(device)

    def _scorer(self) -> dict[str, Any]:
        assert self.network is not None and self.reference is not None, "load() comes first"
        return {
            "protocol": imagenet.PROTOCOL,
            "reference": self.reference.name,
            "reference_sha256": sha256(self.reference),
            "inception": self.network.identity,
        }

    def score(
        self,
        pictures: PictureSet,
        cache: Path,
        *,
        references: Path | None = None,
        batch: int = 32,
        progress: bool = True,
    ) -> Scored:
        assert self.network is not None and self._file is not None, "load() comes first"
        scores, details = imagenet.score(
            pictures,
            self._file,
            self.network,
            cache,
            references=references,
            batch=batch,
            device=self._device,
            progress=progress,
        )
        labels = self.prompts
        return Scored(
            scores=scores,
            details=details,
            columns=[
                Column("fid", "FID", plotted=True, is_lower_better=True),
                Column("sfid", "sFID", is_lower_better=True),
                Column("inception_score", "IS", plotted=True),
                Column("precision", "precision"),
                Column("recall", "recall"),
            ],
            items=[SheetItem(f"class {labels[n]}", (n,)) for n in spread(len(labels), _SHEET_SINGLES)],
            notes=(
                f"Against {self._file.path.name}: {details['reference_pictures']} pictures, statistics\n"
                f"{details['reference_statistics']}. Published tables use 50,000 pictures and ADM's own "
                f"evaluator,\nwhich reads the file of --samples-npz.\n"
                + self._other_size(pictures, details["reference_size"])
            ),
        )

    def _other_size(self, pictures: PictureSet, expected: str | None) -> str:
        first = load_picture(pictures.path(0))
        size = f"{first.height}x{first.width}"
        if expected in (None, size):
            return ""
        return f"The pictures are {size}, those of the reference {expected}: another benchmark.\n"


KINDS: Mapping[str, type[Benchmark]] = MappingProxyType(
    {kind.name: kind for kind in (Geneval, Dpg, Mjhq, Imagenet)}
)


def build(name: str, given: Mapping[str, Any], *, called: Callable[[str], str]) -> Benchmark:
    """The benchmark of a name with the settings that are not None.

    Args:
        called: what a setting is called where it was written, for messages.
    Raises:
        RequestError: if a setting is missing, or belongs to another benchmark, or a file does not fit.
    """
    kind = KINDS[name]
    known = {one.name: one for one in fields(kind) if one.init}  # type: ignore[arg-type]  # dataclasses
    values = {key: value for key, value in given.items() if value is not None}
    strange = [called(key) for key in values if key not in known]
    if strange:
        raise RequestError(f"{', '.join(strange)}: not read by {name}")
    missing = [
        called(one.name)
        for one in known.values()
        if one.default is MISSING and one.default_factory is MISSING and one.name not in values
    ]
    if missing:
        raise RequestError(f"{', '.join(missing)}: needed by {name}")
    for key in ("num", "limit", "count", "num_classes"):
        if values.get(key, 1) < 1:
            raise RequestError(f"{called(key)}: expected at least 1, received {values[key]}")
    return kind(**values)


def fingerprint_name(name: str) -> str:
    """What a model is called in titles: its hub id, or the last part of its folder."""
    return Path(name).name if Path(name).is_dir() else name


def _calibration_note(found: Calibration | None) -> str:
    if found is None:
        return (
            "Not calibrated: these are no numbers to stand beside published ones (--calibrate measures how\n"
            "far off this evaluator is, --calibration applies it).\n"
        )
    return (
        f"Calibrated on {found.num_pictures:,} pictures: there this evaluator scored "
        f"{100 * found.offset:+.2f} +- {100 * found.offset_error:.2f} points against the\n"
        "published one. Less offset: overall without them, an estimate of what that one would say, as far\n"
        "as these pictures are like those.\n"
    )


def _part(count: int, published: int, what: str) -> str:
    return "" if count == published else f"{count} {what}; the published protocol has {published}.\n"


def _by_category(details: dict[str, Any]) -> str:
    def show(name: str, category: str) -> str:
        value = details[name][category]
        return "-" if value is None else f"{value:.4g}"

    names = ("fid_by_category", "clean_fid_by_category", "clip_by_category")
    body = [(one, *(show(name, one) for name in names)) for one in details["clip_by_category"]]
    return markdown_table(("category", "FID", "FID (clean)", "CLIP"), body)


def _shortened(text: str, length: int = 120) -> str:
    return text if len(text) <= length else text[: length - 1].rsplit(" ", 1)[0] + " ..."
