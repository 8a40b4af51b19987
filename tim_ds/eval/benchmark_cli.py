"""Command lines of the published benchmarks: `python launch/evaluate.py geneval|dpg|mjhq|imagenet ...`.

Each runs in two halves: pictures are generated, then scored. What scoring needs is loaded before the first
picture is made, so that a missing file costs no work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from tim_ds.errors import RequestError
from tim_ds.eval import adm_npz, benchmark_report, dpg, geneval, imagenet, mjhq
from tim_ds.eval.benchmark_report import Column, SheetItem, samples_sheet, spread
from tim_ds.eval.clip import DEFAULT_CLIP, Clip
from tim_ds.eval.detector import DEFAULT_DETECTOR, Detector
from tim_ds.eval.generate import (
    PictureSet,
    Sampling,
    Wanted,
    choose_dtype,
    generate,
    open_pictures,
    picture_set,
    read_manifest,
)
from tim_ds.eval.inception import FeatureNetwork, Inception, clean_resizer
from tim_ds.eval.pretrained import fingerprint
from tim_ds.eval.report import markdown_table
from tim_ds.eval.results import RESULTS_NAME, ResultRow, ScoreLog, add_row, kept_arrays, make_row, read_rows
from tim_ds.eval.sample import device_of_process, place_of_process
from tim_ds.eval.vqa import load_answerer
from tim_ds.model.weights import write_aside
from tim_ds.pipeline import TiMPipeline, check_device, refuse_unwritable, sha256

CACHE_FOLDER = "cache"
CALIBRATION_NAME = "calibration.md"
VERDICTS_NAME = "verdicts.jsonl"

_SHEET_COLUMNS = 6
O = TypeVar("O", bound="BenchmarkOptions")  # noqa: E741


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What every benchmark is told."""

    out: Path
    """Folder for scores, table, plot, sheet and what makes a second run short."""
    export: Path | None = None
    """Export folder of the network; None scores pictures that are there."""
    pictures: Path | None = None
    """Folder of the pictures; None: `pictures` in `out`."""
    only: Literal["generate", "score"] | None = None
    """One half; None: both."""
    label: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    """Of the network's parameters."""
    batch_scored: int = 32
    """Pictures that a scoring network sees at a time."""
    sampling: Sampling = field(default_factory=Sampling)
    progress: bool = True

    def __post_init__(self) -> None:
        if self.only == "score" and self.export is not None:
            raise RequestError("--export: not read with --only score; leave one of them away")
        if self.only != "score" and self.export is None:
            raise RequestError(
                "--export: needed to generate pictures; or score those there are (--only score)"
            )
        if self.only != "generate" and self.sampling.part[1] != 1:
            raise RequestError(
                "--part: a part cannot be scored; add --only generate, and score when all are done"
            )
        if self.batch_scored < 1:
            raise RequestError(f"--batch-scored: expected at least 1, received {self.batch_scored}")

    @property
    def generates(self) -> bool:
        return self.only != "score"

    @property
    def scores(self) -> bool:
        return self.only != "generate"

    @property
    def folder(self) -> Path:
        return self.out / "pictures" if self.pictures is None else self.pictures

    @property
    def seed(self) -> int:
        """Of the pictures that are there, or else as asked."""
        stored = None if self.generates else read_manifest(self.folder)
        return self.sampling.seed if stored is None else int(stored["seed"])

    def check(self, evaluation: str) -> None:
        """What can be told before any work: folders, device, an older results file."""
        refuse_unwritable(self.out)
        if self.generates:
            refuse_unwritable(self.folder)
        check_device(self.device, "--device")
        read_rows(self.out / RESULTS_NAME, evaluation)


@dataclass(frozen=True, kw_only=True)
class GenevalOptions(BenchmarkOptions):
    """GenEval."""

    metadata: Path
    num: int = 4
    """Pictures a prompt."""
    detector: str = DEFAULT_DETECTOR
    clip: str = DEFAULT_CLIP
    calibrate: Path | None = None
    """Results of the published evaluator on the same pictures."""
    rules: geneval.Rules = field(default_factory=geneval.Rules)

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("--num", self.num)
        if self.calibrate is not None and not self.scores:
            raise RequestError("--calibrate: compares scores; leave --only generate away")


@dataclass(frozen=True, kw_only=True)
class DpgOptions(BenchmarkOptions):
    """DPG-Bench."""

    questions: Path
    vqa: str | None = None
    num: int = 4
    """Pictures a prompt."""
    layout: dpg.Layout = "files"
    grids: Path | None = None
    """Folder for 2x2 grids, which the published evaluator reads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one("--num", self.num)
        if self.scores and self.vqa is None:
            raise RequestError(
                "--vqa: needed to score; a folder or hub id of ViLT, BLIP or a vision-language chat model"
            )
        if self.layout == "grid" and (self.generates or self.num > 4):
            raise RequestError(
                "--layout grid: reads grids of up to 4 pictures a prompt that are there (--only score); "
                "generate single files, and --grids for grids of them"
            )


@dataclass(frozen=True, kw_only=True)
class MjhqOptions(BenchmarkOptions):
    """MJHQ-30K."""

    metadata: Path
    reference: Path | None = None
    """The data set's pictures, CATEGORY/KEY.jpg."""
    inception: Path | None = None
    clip: str = DEFAULT_CLIP

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores and self.reference is None:
            raise RequestError("--reference: needed to score; the folder of MJHQ-30K's pictures")


@dataclass(frozen=True, kw_only=True)
class ImagenetOptions(BenchmarkOptions):
    """ImageNet."""

    reference: Path | None = None
    """Reference batch of ADM's evaluator (npz)."""
    count: int = imagenet.PUBLISHED_COUNT
    num_classes: int = 1000
    inception: Path | None = None
    samples_npz: Path | None = None
    """Where to write the pictures for the published evaluator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores and self.reference is None:
            raise RequestError("--reference: needed to score; a reference batch of ADM's evaluator (npz)")


def run_geneval(options: GenevalOptions) -> list[ResultRow]:
    """All six tasks of GenEval."""
    options.check("geneval")
    tasks = geneval.read_metadata(options.metadata)
    reference = None if options.calibrate is None else geneval.read_results(options.calibrate)
    scorers = None
    if options.scores:
        scorers = Detector.from_pretrained(options.detector), Clip.from_pretrained(options.clip)
    wanted = geneval.wanted_pictures(tasks, num_per_prompt=options.num, seed=options.seed)
    if options.generates:
        _generate(options, "geneval", wanted, condition="text")
        geneval.write_layout(options.folder, tasks)
    if scorers is None:
        return []
    if read_manifest(options.folder) is None:
        wanted = geneval.pictures_of_layout(options.folder, tasks)
    pictures = open_pictures(options.folder, wanted, progress=options.progress)
    scorer = {
        "protocol": geneval.PROTOCOL,
        "metadata_sha256": sha256(options.metadata),
        "is_published_suite": geneval.is_published_suite(tasks),
        "rules": _as_dict(options.rules),
        "detector": fingerprint(options.detector),
        "clip": fingerprint(options.clip),
    }
    log = ScoreLog(
        options.out / CACHE_FOLDER, "geneval", {"pictures_sha256": pictures.sha256, "scorer": scorer}
    )
    results = geneval.score_pictures(
        pictures,
        tasks,
        scorers[0].to(options.device),
        geneval.ColourReader(scorers[1].to(options.device)),
        options.rules,
        log,
        progress=options.progress,
    )
    geneval.write_results(options.out / VERDICTS_NAME, results)
    scores, details = geneval.summarise(results)
    row = _row(options, "geneval", geneval.TITLE, pictures, scorer, scores, details, ("transformers",))
    rows = add_row(options.out / RESULTS_NAME, row)
    columns = [
        Column("overall", "overall", percent=True, plotted=True),
        *(Column(tag, tag, percent=True) for tag in geneval.TASKS),
        Column("prompts", "any right", percent=True),
    ]
    per_prompt = len(pictures.names) // len(tasks)
    firsts = [next(n for n, task in enumerate(tasks) if task.tag == tag) for tag in details["by_task"]]
    items = [
        SheetItem(
            tasks[n].prompt,
            tuple(range(n * per_prompt, (n + 1) * per_prompt)),
            tuple(not results[n * per_prompt + k]["correct"] for k in range(per_prompt)),
        )
        for n in firsts
    ]
    suite = (
        "" if scorer["is_published_suite"] else "The prompts are not the published 553: a part or others.\n"
    )
    notes = (
        "Shares of right pictures in %, by task; overall is their plain mean; any right: prompts with a\n"
        "right picture among theirs. The detector is not that of the published evaluator: compare with\n"
        f"--calibrate before quoting a number beside published ones.\n{suite}"
    )
    sheet = samples_sheet(pictures, items, title=row.label, footnote="A red frame: judged wrong.")
    _report(rows, columns, options.out, notes, sheet)
    if reference is not None:
        _calibrate(results, reference, options.out)
    return rows


def run_dpg(options: DpgOptions) -> list[ResultRow]:
    """DPG-Bench with a question answering model of transformers."""
    options.check("dpg")
    questions = dpg.read_questions(options.questions)
    prompts = questions.prompts
    answerer = None if options.vqa is None or not options.scores else load_answerer(options.vqa)
    wanted = dpg.wanted_pictures(
        prompts, num_per_prompt=options.num, seed=options.seed, layout=options.layout
    )
    if options.generates:
        _generate(options, "dpg", wanted, condition="text")
    if options.grids is not None and options.sampling.part[1] == 1:
        pictures = open_pictures(options.folder, wanted, progress=options.progress)
        dpg.write_grids(pictures, prompts, options.grids)
    if answerer is None or options.vqa is None:
        return []
    pictures = open_pictures(options.folder, wanted, progress=options.progress)
    answerer.model.to(options.device)
    scorer = {
        "protocol": dpg.PROTOCOL,
        "questions_sha256": sha256(options.questions),
        "num_per_prompt": options.num,
        "vqa": fingerprint(options.vqa),
    }
    log = ScoreLog(options.out / CACHE_FOLDER, "dpg", {"pictures_sha256": pictures.sha256, "scorer": scorer})
    answers = dpg.score_pictures(
        pictures,
        prompts,
        answerer,
        log,
        layout=options.layout,
        num_of_grid=options.num,
        progress=options.progress,
    )
    scores, details = dpg.summarise(prompts, answers)
    details |= {
        "num_unknown_parents": questions.num_unknown_parents,
        "num_repeated_questions": questions.num_repeated,
    }
    title = f"DPG-Bench (answers by {scorer['vqa']['name']}; published: {dpg.PUBLISHED_VQA})"
    row = _row(options, "dpg", title, pictures, scorer, scores, details, ("transformers",))
    rows = add_row(options.out / RESULTS_NAME, row)
    columns = [
        Column("overall", "overall", percent=True, plotted=True),
        *(Column(name, name, percent=True) for name in scores if name != "overall"),
    ]
    per_prompt = len(pictures.names) // len(prompts)
    items = [
        SheetItem(_shortened(prompts[n].text), tuple(range(n * per_prompt, (n + 1) * per_prompt)))
        for n in spread(len(prompts), _SHEET_COLUMNS)
    ]
    notes = (
        "Questions met in %: overall by picture, then prompt; others over all questions of a category. A\n"
        "question counts as met if it and all it depends on are answered yes. Numbers of another model for\n"
        "the answers are not comparable.\n"
    )
    _report(rows, columns, options.out, notes, samples_sheet(pictures, items, title=row.label, footnote=""))
    return rows


def run_mjhq(options: MjhqOptions, network: FeatureNetwork | None = None) -> list[ResultRow]:
    """FID and CLIP score on MJHQ-30K.

    Args:
        network: None loads torch-fidelity's Inception.
    """
    options.check("mjhq")
    entries = mjhq.read_metadata(options.metadata)
    clip, names = None, []
    if options.scores and options.reference is not None:
        network = network or Inception.load(options.inception)
        clean_resizer()
        mjhq.check_counts(entries, network)
        names = mjhq.reference_names(options.reference, entries)
        clip = Clip.from_pretrained(options.clip)
    wanted = mjhq.wanted_pictures(entries, seed=options.seed)
    if options.generates:
        _generate(options, "mjhq", wanted, condition="text")
    if network is None or clip is None or options.reference is None or not options.scores:
        return []
    _move(network, options.device)
    if read_manifest(options.folder) is None:
        found = mjhq.reference_names(options.folder, entries)
        wanted = [Wanted(name, one.prompt, 0) for name, one in zip(found, entries, strict=True)]
    pictures = open_pictures(options.folder, wanted, progress=options.progress)
    reference = picture_set(options.reference, names, progress=options.progress)
    cache, categories = options.out / CACHE_FOLDER, [one.category for one in entries]
    scores: dict[str, float | None] = {}
    details: dict[str, Any] = {}
    for clean, name in ((False, "fid"), (True, "clean_fid")):
        made, real = (
            mjhq.features(
                which, network, cache, clean=clean, batch=options.batch_scored, progress=options.progress
            )
            for which in (pictures, reference)
        )
        scores[name], details[f"{name}_by_category"] = mjhq.distances(made, real, categories)
    clip_id = fingerprint(options.clip)
    key = sha256(options.metadata)[:12] + "_" + "".join(clip_id.get("weights_sha256", [clip_id["name"]]))[:12]
    values = kept_arrays(
        cache / f"clip_{pictures.sha256[:12]}_{key.replace('/', '-')}.npz",
        lambda: {
            "clip": mjhq.clip_scores(
                pictures,
                entries,
                clip.to(options.device),
                batch=options.batch_scored,
                progress=options.progress,
            )
        },
    )["clip"]
    scores["clip"] = float(values.mean())
    details["clip_by_category"] = mjhq.by_category(values, categories)
    scorer = {
        "protocol": mjhq.PROTOCOL,
        "metadata_sha256": sha256(options.metadata),
        "reference_sha256": reference.sha256,
        "inception": network.identity,
        "clip": clip_id,
    }
    row = _row(
        options,
        "mjhq",
        mjhq.TITLE,
        pictures,
        scorer,
        scores,
        details,
        ("torch-fidelity", "clean-fid", "transformers"),
    )
    rows = add_row(options.out / RESULTS_NAME, row)
    columns = [
        Column("fid", "FID", plotted=True, is_lower_better=True),
        Column("clean_fid", "FID (clean)", is_lower_better=True),
        Column("clip", "CLIP", plotted=True),
    ]
    items = [SheetItem(_shortened(entries[n].prompt), (n,)) for n in spread(len(entries), _SHEET_COLUMNS)]
    notes = (
        "FID: pictures at their own size into torch-fidelity's Inception, which resizes without filter, as\n"
        "the first FID did; FID (clean): resized by clean-fid. CLIP: 100 x mean cosine with the prompt.\n\n"
        + _by_category(row)
    )
    _report(rows, columns, options.out, notes, samples_sheet(pictures, items, title=row.label, footnote=""))
    return rows


def run_imagenet(options: ImagenetOptions, network: FeatureNetwork | None = None) -> list[ResultRow]:
    """FID, sFID, Inception score, precision and recall on ImageNet.

    Args:
        network: None loads torch-fidelity's Inception.
    """
    options.check("imagenet")
    reference = None
    if options.scores and options.reference is not None:
        reference = adm_npz.read_reference(options.reference)
        network = network or Inception.load(options.inception)
        imagenet.check_counts(options.count, reference, network)
    wanted = imagenet.wanted_pictures(options.count, options.num_classes, seed=options.seed)
    if options.generates:
        _generate(options, "imagenet", wanted, condition="class", num_classes=options.num_classes)
    if options.samples_npz is not None and options.sampling.part[1] == 1:
        pictures = open_pictures(options.folder, wanted, progress=options.progress)
        adm_npz.write_samples(options.samples_npz, pictures.paths)
    if network is None or reference is None or options.reference is None:
        return []
    _move(network, options.device)
    pictures = open_pictures(options.folder, wanted, progress=options.progress)
    scores, details = imagenet.score(
        pictures,
        reference,
        network,
        options.out / CACHE_FOLDER,
        batch=options.batch_scored,
        device=options.device,
        progress=options.progress,
    )
    scorer = {
        "protocol": imagenet.PROTOCOL,
        "reference": options.reference.name,
        "reference_sha256": sha256(options.reference),
        "inception": network.identity,
    }
    row = _row(
        options, "imagenet", imagenet.TITLE, pictures, scorer, scores, details, ("torch-fidelity", "scipy")
    )
    rows = add_row(options.out / RESULTS_NAME, row)
    columns = [
        Column("fid", "FID", plotted=True, is_lower_better=True),
        Column("sfid", "sFID", is_lower_better=True),
        Column("inception_score", "IS", plotted=True),
        Column("precision", "precision"),
        Column("recall", "recall"),
    ]
    items = [SheetItem(f"class {wanted[n].prompt}", (n,)) for n in spread(len(wanted), _SHEET_COLUMNS)]
    notes = (
        f"Against {options.reference.name}: {details['reference_pictures']} pictures, statistics\n"
        f"{details['reference_statistics']}. Published tables use 50,000 pictures and ADM's own evaluator,\n"
        f"which reads the file of --samples-npz.\n"
    )
    _report(rows, columns, options.out, notes, samples_sheet(pictures, items, title=row.label, footnote=""))
    return rows


def _generate(
    options: BenchmarkOptions,
    evaluation: str,
    wanted: Sequence[Wanted],
    *,
    condition: Literal["text", "class"],
    num_classes: int | None = None,
) -> None:
    assert options.export is not None
    pipeline = TiMPipeline.from_pretrained(
        options.export, device=options.device, dtype=choose_dtype(options.dtype)
    )
    model = pipeline.export.model
    if model.condition != condition:
        raise RequestError(
            f"{options.export}: expected a network conditioned on {condition}, received one on "
            f"{model.condition}"
        )
    if num_classes is not None and model.num_classes != num_classes:
        raise RequestError(
            f"{options.export}: knows {model.num_classes} classes, expected {num_classes} (--num-classes)"
        )
    generate(
        pipeline, wanted, options.folder, options.sampling, evaluation=evaluation, progress=options.progress
    )


def _row(
    options: BenchmarkOptions,
    evaluation: str,
    title: str,
    pictures: PictureSet,
    scorer: dict[str, Any],
    scores: dict[str, float | None],
    details: dict[str, Any],
    libraries: Sequence[str],
) -> ResultRow:
    return make_row(
        evaluation=evaluation,
        title=title,
        label=options.label,
        pictures=pictures,
        scorer=scorer,
        scores=scores,
        details=details,
        libraries=libraries,
        device=options.device,
    )


def _report(rows: Sequence[ResultRow], columns: Sequence[Column], out: Path, notes: str, sheet: Any) -> None:
    paths = benchmark_report.write(rows, columns, out, notes=notes, sheet=sheet)
    print(f"\n{benchmark_report.table(rows, columns, notes=notes)}")
    for path in paths:
        print(f"written: {path}")


def _calibrate(results: Sequence[dict[str, Any]], reference: dict[str, dict[str, Any]], out: Path) -> None:
    rows = geneval.calibrate(results, reference)
    header = ("task", "pictures", "agree %", "ours %", "theirs %", "only ours right", "only theirs right")
    body = [
        (
            one.task,
            str(one.num_pictures),
            f"{100 * one.agreement:.2f}",
            f"{100 * one.ours:.2f}",
            f"{100 * one.theirs:.2f}",
            str(one.only_ours),
            str(one.only_theirs),
        )
        for one in rows
    ]
    ours = sum(one.ours for one in rows) / len(rows)
    theirs = sum(one.theirs for one in rows) / len(rows)
    text = (
        f"{geneval.TITLE} against the verdicts of the published evaluator on the same pictures\n\n"
        f"{markdown_table(header, body)}\n"
        f"Overall: ours {100 * ours:.2f} %, theirs {100 * theirs:.2f} %, "
        f"difference {100 * (ours - theirs):+.2f} points.\n"
    )
    path = out / CALIBRATION_NAME
    write_aside(path, len(text.encode()), lambda aside: aside.write_text(text, encoding="utf-8"))
    print(f"\n{text}written: {path}")


def _by_category(row: ResultRow) -> str:
    header = ("category", "FID", "FID (clean)", "CLIP")
    found = row.details["clip_by_category"]

    def show(name: str, category: str) -> str:
        value = row.details[name][category]
        return "-" if value is None else f"{value:.4g}"

    body = [
        (one, *(show(name, one) for name in ("fid_by_category", "clean_fid_by_category", "clip_by_category")))
        for one in found
    ]
    return f"{row.label}, by category\n\n{markdown_table(header, body)}"


def _move(network: FeatureNetwork, device: str) -> None:
    if isinstance(network, Inception):
        network.to(device)


def _as_dict(rules: geneval.Rules) -> dict[str, Any]:
    return {one.name: getattr(rules, one.name) for one in fields(rules)}


def _shortened(text: str, length: int = 120) -> str:
    return text if len(text) <= length else text[: length - 1].rsplit(" ", 1)[0] + " ..."


def _at_least_one(option: str, value: int) -> None:
    if value < 1:
        raise RequestError(f"{option}: expected at least 1, received {value}")


def add_geneval(parser: argparse.ArgumentParser) -> None:
    """Options of `geneval`."""
    _add_common(parser, size="1024x1024")
    parser.add_argument("--metadata", type=Path, required=True, help=f"the prompts: {geneval.WHERE}")
    parser.add_argument("--num", type=int, default=4, help="pictures a prompt (default: %(default)s)")
    parser.add_argument(
        "--detector", default=DEFAULT_DETECTOR, help="Mask2Former, folder or hub id (default: %(default)s)"
    )
    parser.add_argument("--clip", default=DEFAULT_CLIP, help="CLIP, folder or hub id (default: %(default)s)")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="RESULTS",
        help="results (JSON lines) of the published evaluator on the same pictures: prints the agreement",
    )


def add_dpg(parser: argparse.ArgumentParser) -> None:
    """Options of `dpg`."""
    _add_common(parser, size="1024x1024")
    parser.add_argument("--questions", type=Path, required=True, help=f"the questions: {dpg.WHERE}")
    parser.add_argument("--vqa", help="ViLT, BLIP or a vision-language chat model, folder or hub id")
    parser.add_argument("--num", type=int, default=4, help="pictures a prompt (default: %(default)s)")
    parser.add_argument(
        "--layout",
        choices=("files", "grid"),
        default="files",
        help="of pictures to score: ITEM/0000k.png, or ITEM.png with 2x2 pictures (default: %(default)s)",
    )
    parser.add_argument("--grids", type=Path, help="write 2x2 grids there, for the published evaluator")


def add_mjhq(parser: argparse.ArgumentParser) -> None:
    """Options of `mjhq`."""
    _add_common(parser, size="1024x1024")
    parser.add_argument("--metadata", type=Path, required=True, help=f"the prompts: {mjhq.WHERE}")
    parser.add_argument("--reference", type=Path, help="the data set's pictures, CATEGORY/KEY.jpg")
    parser.add_argument("--inception", type=Path, help="torch-fidelity's weights (default: torch's cache)")
    parser.add_argument("--clip", default=DEFAULT_CLIP, help="CLIP, folder or hub id (default: %(default)s)")


def add_imagenet(parser: argparse.ArgumentParser) -> None:
    """Options of `imagenet`."""
    _add_common(parser, size="256x256")
    parser.add_argument("--reference", type=Path, help="reference batch of ADM's evaluator (npz)")
    parser.add_argument(
        "--count", type=int, default=imagenet.PUBLISHED_COUNT, help="pictures (default: %(default)s)"
    )
    parser.add_argument("--num-classes", type=int, default=1000, help="of the network (default: %(default)s)")
    parser.add_argument("--inception", type=Path, help="torch-fidelity's weights (default: torch's cache)")
    parser.add_argument("--samples-npz", type=Path, help="write the pictures there, for ADM's own evaluator")


def parse(options: argparse.Namespace, kind: type[O]) -> O:
    """The frozen options of a benchmark from its command line."""
    given = vars(options)
    sampling = Sampling(
        size=given["size"],
        num_steps=given["steps"],
        cfg_scale=given["cfg"],
        cfg_interval=_pair(given["cfg_interval"]),
        stochasticity=given["stochasticity"],
        mode=given["mode"],
        seed=given["seed"],
        batch=given["batch"],
        part=place_of_process() if given["part"] is None else _part(given["part"]),
    )
    names = {one.name for one in fields(kind)} - {"sampling", "progress", "rules", "device"}
    device = device_of_process(given["device"])
    return kind(sampling=sampling, device=device, **{name: given[name] for name in names})


def _add_common(parser: argparse.ArgumentParser, *, size: str) -> None:
    parser.add_argument("--export", type=Path, help="export folder of the network (RUN/export)")
    parser.add_argument("--out", type=Path, required=True, help="folder for scores, table, plot and sheet")
    parser.add_argument("--pictures", type=Path, help="folder of the pictures (default: OUT/pictures)")
    parser.add_argument("--only", choices=("generate", "score"), help="one half (default: both)")
    parser.add_argument("--label", help="name of the network in table and plot (default: of its run)")
    parser.add_argument("--size", default=size, help="HEIGHTxWIDTH in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="transitions from noise to picture (default: the export's)")
    parser.add_argument("--cfg", type=float, help="guidance scale; 1 is unguided (default: the export's)")
    parser.add_argument("--cfg-interval", metavar="LOW,HIGH", help="guided times (default: the export's)")
    parser.add_argument("--stochasticity", type=float, help="share of fresh noise (default: the export's)")
    parser.add_argument("--mode", choices=("transition", "diffusion"), help="default: the export's")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first picture; the next takes the next number"
    )
    parser.add_argument("--batch", type=int, default=16, help="pictures a call (default: %(default)s)")
    parser.add_argument(
        "--batch-scored", type=int, default=32, help="pictures scored at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--part",
        metavar="K/N",
        help="every N-th picture from the K-th (default: of the launcher's processes)",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: CUDA where there is some)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the sampled network's parameters (default: %(default)s)",
    )


def _pair(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError as error:
        raise RequestError(f"--cfg-interval: expected LOW,HIGH, received {text!r}") from error
    return low, high


def _part(text: str) -> tuple[int, int]:
    try:
        k, n = (int(word) for word in text.split("/"))
    except ValueError as error:
        raise RequestError(f"--part: expected K/N, received {text!r}") from error
    return k, n


def _geneval(options: argparse.Namespace) -> None:
    """GenEval, rebuilt with Mask2Former of transformers."""
    run_geneval(parse(options, GenevalOptions))


def _dpg(options: argparse.Namespace) -> None:
    """DPG-Bench with a question answering model of your choice."""
    run_dpg(parse(options, DpgOptions))


def _mjhq(options: argparse.Namespace) -> None:
    """FID and CLIP score on MJHQ-30K."""
    run_mjhq(parse(options, MjhqOptions))


def _imagenet(options: argparse.Namespace) -> None:
    """FID, sFID, IS, precision and recall on ImageNet, as ADM defines them."""
    run_imagenet(parse(options, ImagenetOptions))


BENCHMARKS: dict[
    str,
    tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None], str],
] = {
    "geneval": (
        add_geneval,
        _geneval,
        "--export RUN/export --metadata evaluation_metadata.jsonl --steps 4 --cfg 2.5 --out runs/geneval",
    ),
    "dpg": (
        add_dpg,
        _dpg,
        "--export RUN/export --questions dpg_bench.csv --vqa models/blip-vqa --steps 4 --cfg 2.5 "
        "--out runs/dpg",
    ),
    "mjhq": (
        add_mjhq,
        _mjhq,
        "--export RUN/export --metadata meta_data.json --reference mjhq30k_imgs --steps 4 --cfg 1.5 "
        "--out runs/mjhq",
    ),
    "imagenet": (
        add_imagenet,
        _imagenet,
        "--export RUN/export --reference VIRTUAL_imagenet256_labeled.npz --steps 1 --out runs/imagenet",
    ),
}
"""Subcommand: (options, what runs it, an example)."""
