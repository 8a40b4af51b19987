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
from tim_ds.eval import adm_npz, benchmark_report, calibration, dpg, geneval, imagenet, mjhq
from tim_ds.eval.benchmarks import (
    Benchmark,
    Dpg,
    Geneval,
    Imagenet,
    Mjhq,
    check_network,
    notes_of,
    row_of,
)
from tim_ds.eval.clip import DEFAULT_CLIP
from tim_ds.eval.detector import DEFAULT_DETECTOR
from tim_ds.eval.generate import (
    PictureSet,
    Sampling,
    Wanted,
    choose_dtype,
    generate,
    open_pictures,
    read_manifest,
)
from tim_ds.eval.inception import FeatureNetwork
from tim_ds.eval.results import RESULTS_NAME, ResultRow, add_row, read_rows
from tim_ds.eval.sample import device_of_process, place_of_process
from tim_ds.pipeline import TiMPipeline, check_device, refuse_unwritable

CACHE_FOLDER = "cache"
VERDICTS_NAME = "verdicts.jsonl"

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
        pictures, out = self.folder.resolve(), self.out.resolve()
        if pictures == out or pictures in out.parents:
            raise RequestError(
                f"--out {self.out}: lies in the folder of the pictures, {self.folder}, whose pictures are "
                f"counted; choose a folder beside it"
            )
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
    calibration: Path | None = None
    """What an earlier `calibrate` found (`calibration.json`)."""
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
    benchmark = Geneval(
        metadata=options.metadata,
        num=options.num,
        detector=options.detector,
        clip=options.clip,
        calibration=options.calibration,
        published=options.calibrate,
        rules=options.rules,
    )
    done = _run(options, benchmark)
    if done is None:
        return []
    geneval.write_results(options.out / VERDICTS_NAME, benchmark.results, evaluator=benchmark.title)
    print(f"written: {options.out / VERDICTS_NAME}")
    if benchmark.reference is not None:
        _calibrate(benchmark, benchmark.reference, options)
    return done


def run_dpg(options: DpgOptions) -> list[ResultRow]:
    """DPG-Bench with a question answering model of transformers."""
    benchmark = Dpg(questions=options.questions, vqa=options.vqa, num=options.num, layout=options.layout)
    grids = options.grids

    def write_grids(pictures: PictureSet) -> None:
        assert grids is not None
        dpg.write_grids(pictures, benchmark.asked, grids)

    return _run(options, benchmark, copy=None if grids is None else write_grids) or []


def run_mjhq(options: MjhqOptions, network: FeatureNetwork | None = None) -> list[ResultRow]:
    """FID and CLIP score on MJHQ-30K.

    Args:
        network: None loads torch-fidelity's Inception.
    """
    benchmark = Mjhq(
        metadata=options.metadata,
        reference=options.reference,
        inception=options.inception,
        clip=options.clip,
        network=network,
    )
    return _run(options, benchmark) or []


def run_imagenet(options: ImagenetOptions, network: FeatureNetwork | None = None) -> list[ResultRow]:
    """FID, sFID, Inception score, precision and recall on ImageNet.

    Args:
        network: None loads torch-fidelity's Inception.
    """
    benchmark = Imagenet(
        reference=options.reference,
        count=options.count,
        num_classes=options.num_classes,
        inception=options.inception,
        network=network,
    )
    samples = options.samples_npz

    def write_samples(pictures: PictureSet) -> None:
        assert samples is not None
        adm_npz.write_samples(samples, pictures.paths)

    return (
        _run(
            options,
            benchmark,
            num_classes=options.num_classes,
            copy=None if samples is None else write_samples,
        )
        or []
    )


def _run(
    options: BenchmarkOptions,
    benchmark: Benchmark,
    *,
    num_classes: int | None = None,
    copy: Callable[[PictureSet], None] | None = None,
) -> list[ResultRow] | None:
    """Both halves of a benchmark, or the one asked for; None if nothing was scored.

    Args:
        copy: writes the pictures in another layout too, once all are there.
    """
    options.check(benchmark.name)
    if options.scores:
        benchmark.load()
    wanted = benchmark.wanted(options.seed)
    if options.generates:
        _generate(options, benchmark, wanted, num_classes=num_classes)
        if isinstance(benchmark, Geneval):
            geneval.write_layout(options.folder, benchmark.tasks)
    is_whole = options.sampling.part[1] == 1
    if not options.scores and (copy is None or not is_whole):
        return None
    if not options.generates and read_manifest(options.folder) is None:
        wanted = benchmark.found(options.folder)
    pictures = open_pictures(options.folder, wanted, progress=options.progress)
    if copy is not None:
        copy(pictures)
    if not options.scores:
        return None
    benchmark.to(options.device)
    cache = options.out / CACHE_FOLDER
    scored = benchmark.score(pictures, cache, batch=options.batch_scored, progress=options.progress)
    row = row_of(benchmark, pictures, scored, label=options.label, device=options.device)
    rows = add_row(options.out / RESULTS_NAME, row)
    paths = benchmark_report.write_scored(rows, row, scored, pictures, options.out)
    print(f"\n{benchmark_report.table(rows, scored.columns, notes=notes_of(row, scored))}")
    for path in paths:
        print(f"written: {path}")
    return rows


def _generate(
    options: BenchmarkOptions, benchmark: Benchmark, wanted: Sequence[Wanted], *, num_classes: int | None
) -> None:
    assert options.export is not None
    pipeline = TiMPipeline.from_pretrained(
        options.export, device=options.device, dtype=choose_dtype(options.dtype)
    )
    check_network(benchmark, pipeline, num_classes=num_classes)
    generate(
        pipeline,
        wanted,
        options.folder,
        options.sampling,
        evaluation=benchmark.name,
        progress=options.progress,
    )


def _calibrate(benchmark: Geneval, reference: dict[str, dict[str, Any]], options: GenevalOptions) -> None:
    agreements = geneval.calibrate(benchmark.results, reference)
    verdicts = benchmark.judge_at_thresholds(
        calibration.THRESHOLDS, options.out / CACHE_FOLDER, progress=options.progress
    )
    of_tasks = calibration.curves(benchmark.results, verdicts, reference, options.rules)
    print(f"\n{calibration.report(agreements, of_tasks)}")
    assert benchmark.calibrated is not None, "scored against the same reference"
    for path in calibration.write(agreements, of_tasks, benchmark.calibrated, options.out):
        print(f"written: {path}")


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
        help="results (JSON lines) of the published evaluator on these pictures: agreement, offset, curves",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="JSON",
        help="calibration.json of an earlier --calibrate with this detector and CLIP: rows carry its offset",
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
        cfg_interval=pair(given["cfg_interval"]),
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


def pair(text: str | None) -> tuple[float, float] | None:
    """The two times of `--cfg-interval`.

    Raises:
        RequestError: if they are none.
    """
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
