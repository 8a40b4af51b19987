"""Quality against the number of steps, on handwriting (`python launch/evaluate.py nfe`).

The same prompts and seeds are sampled at every step count from one network, or from two to compare. Every
finished (network, steps) row is kept in `results.json` and not computed again while nothing that decides it
has changed.
"""

from __future__ import annotations

import itertools
import json
import platform
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from data_pipeline.draws import generator
from data_pipeline.handwriting import (
    CELL_PX,
    MANIFEST_NAME,
    MAX_CELLS,
    PHRASINGS,
    REFERENCE_NAME,
    Phrasing,
    Prompt,
    caption,
    draw_prompt,
)
from tim_ds import __version__
from tim_ds.errors import RequestError
from tim_ds.eval.generate import digest
from tim_ds.eval.handwriting import HandwritingScorer, Scores
from tim_ds.model.export_folder import EXPORT_FILE
from tim_ds.model.weights import sha256, write_aside
from tim_ds.pipeline import PipelineOutput, TiMPipeline

PROTOCOL = 1
"""Raised whenever the meaning of a score changes: rows of an older protocol are computed again."""

RESULTS_NAME = "results.json"
SAMPLES_FOLDER = "samples"

_LIBRARIES = ("torch", "numpy", "scikit-learn", "pillow")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is sampled."""

    steps: tuple[int, ...] = (1, 2, 4, 8, 32)
    num_seen: int = 800
    """Pictures of sizes that training showed."""
    num_held_back: int = 200
    """Pictures of four digits in a row, which training never showed."""
    seed: int = 0
    """Of the prompts; picture i starts from noise of seed `seed + i`."""
    cfg_scale: float | None = None
    """None: the export's own."""

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or any(a >= b for a, b in itertools.pairwise(self.steps)):
            raise RequestError(f"--steps: expected rising numbers of at least 1, received {list(self.steps)}")
        for name, value, least in (("pictures", self.num_seen, 65), ("held-back", self.num_held_back, 17)):
            if value < least:
                raise RequestError(
                    f"--{name}: expected at least {least} for a Frechet distance of {CELL_PX**2} pixels, "
                    f"received {value}"
                )


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are scored together."""

    name: str
    title: str
    prompts: tuple[Prompt, ...]
    captions: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Scores of one network at one number of steps."""

    label: str
    identity: dict[str, Any]
    """Everything that decides the scores; a row is reused while it is equal."""
    model: str
    """Name of the run that trained the network."""
    export: str
    recipe_sha256: str | None
    step: int
    """Optimiser steps behind the weights."""
    nfe: int
    seconds: float
    """Sampling time of all pictures."""
    seconds_per_picture: float
    scores: dict[str, Scores]
    """By prompt set."""
    reader_accuracy: float
    versions: dict[str, str]
    device: str
    seed: int | None = None
    """Of the first picture of each set; the next takes the next number."""

    @property
    def num_steps(self) -> int:
        return self.identity["num_steps"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All that the report shows.

    Shapes:
        samples: by row and prompt set, uint8 [H, W, 1] a prompt.
    """

    rows: list[Row]
    """By network, then by steps."""
    samples: list[dict[str, list[NDArray[np.uint8]]]]
    sets: tuple[PromptSet, ...]
    scorer: HandwritingScorer

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(row.label for row in self.rows))


def run(
    exports: Sequence[tuple[str | None, Path]],
    data: Path,
    out: Path,
    settings: Settings,
    *,
    device: str = "cpu",
    progress: bool = True,
) -> Evaluation:
    """Score the networks of `exports` at every step count.

    Args:
        exports: (label, export folder); a label of None is the name of the run.
        data: handwriting data set that the networks were trained on.
        out: `results.json` and the pictures (`samples/`) are kept here, and read back while they are valid.
    Raises:
        RequestError: if the data are not handwriting, or a network cannot draw it.
        CheckpointError: if an export is not whole, or the disk refuses.
    """
    sets = draw_prompt_sets(data, settings)
    scorer = HandwritingScorer.from_folder(data)
    common = {
        "protocol": PROTOCOL,
        "prompts_sha256": digest([[s.name, s.captions, s.seeds] for s in sets]),
        "scans_sha256": sha256(data / REFERENCE_NAME),
    }
    networks = [_Network.load(label, folder, device) for label, folder in exports]
    _check_networks(networks)

    def identity(network: _Network, num_steps: int) -> dict[str, Any]:
        return {**common, **network.identity(num_steps, settings.cfg_scale)}

    finished = [
        replace(row, label=network.label)
        for row in read_rows(out / RESULTS_NAME)
        for network in networks
        if row.identity == identity(network, row.num_steps)
    ]
    rows: list[Row] = []
    samples: list[dict[str, list[NDArray[np.uint8]]]] = []
    pictures = sum(len(s.prompts) for s in sets)
    total = pictures * sum(settings.steps) * len(networks)
    with tqdm(total=total, unit="step", unit_scale=True, desc="nfe", disable=not progress) as bar:
        for network, num_steps in itertools.product(networks, settings.steps):
            bar.set_postfix_str(f"{network.label}, {num_steps} step{'s' * (num_steps > 1)}")
            wanted = identity(network, num_steps)
            path = out / SAMPLES_FOLDER / f"{network.pipeline.weights_sha256[:12]}_steps{num_steps:04d}.npz"
            row = next((row for row in finished if row.identity == wanted), None)
            found = None if row is None else _read_samples(path, sets)
            if row is None or found is None:
                outputs = {s.name: network.sample(s, num_steps, settings.cfg_scale, bar) for s in sets}
                found = {name: output.pixels for name, output in outputs.items()}
                row = network.score(sets, outputs, wanted, scorer)
                _write_samples(path, found)
                finished = [row, *(other for other in finished if other.identity != wanted)]
                _write_rows(out / RESULTS_NAME, finished)
            else:
                bar.update(pictures * num_steps)
            rows.append(row)
            samples.append(found)
    _write_rows(out / RESULTS_NAME, finished)
    return Evaluation(rows, samples, sets, scorer)


def draw_prompt_sets(data: Path, settings: Settings) -> tuple[PromptSet, PromptSet]:
    """Prompts like those of the data set in `data`, and the held-back ones: four digits in a row.

    Raises:
        RequestError: if the folder is not a handwriting data set.
    """
    made = read_manifest(data)
    phrasings: tuple[Phrasing, ...] = made["phrasings"]
    seen, held_back = [], []
    for i in range(settings.num_seen):
        rng = generator(settings.seed, "nfe.seen", 0, i)
        prompt = draw_prompt(rng, max_cells=made["max_cells"], gap_share=made["gap_share"])
        seen.append((prompt, phrasings[int(rng.integers(len(phrasings)))]))
    for i in range(settings.num_held_back):
        rng = generator(settings.seed, "nfe.held_back", 0, i)
        prompt = Prompt(tuple(int(d) for d in rng.integers(0, 10, MAX_CELLS)), "row")
        held_back.append((prompt, phrasings[int(rng.integers(len(phrasings)))]))
    return (
        _prompt_set("seen", "Sizes seen in training", seen, settings.seed),
        _prompt_set("held_back", "Held back: four digits in a row", held_back, settings.seed),
    )


def _prompt_set(name: str, title: str, drawn: Sequence[tuple[Prompt, Phrasing]], seed: int) -> PromptSet:
    return PromptSet(
        name,
        title,
        tuple(prompt for prompt, _ in drawn),
        tuple(caption(prompt, phrasing) for prompt, phrasing in drawn),
        tuple(range(seed, seed + len(drawn))),
    )


def read_manifest(data: Path) -> dict[str, Any]:
    """What pictures a handwriting data set shows: `max_cells`, `gap_share`, `phrasings`.

    Raises:
        RequestError: if the folder is not one.
    """
    path = data / MANIFEST_NAME
    try:
        made = json.loads(path.read_text())["settings"]
        return {
            "max_cells": int(made["max_cells"]),
            "gap_share": float(made["gap_share"]),
            "phrasings": tuple(p for p in PHRASINGS if p in made["phrasings"]),
        }
    except FileNotFoundError as error:
        raise RequestError(
            f"{path}: not found; build the data with "
            f"`python -m data_pipeline.handwriting --out {path.parent}`"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{path}: not the manifest of a handwriting data set ({error!r}). This evaluation is of "
            "handwriting alone; for other pictures: `launch/evaluate.py resolution --prompts-file`, and the "
            "published benchmarks"
        ) from error


@dataclass(eq=False)
class _Network:
    """One of the networks compared."""

    label: str
    folder: Path
    export_sha256: str
    pipeline: TiMPipeline

    @classmethod
    def load(cls, label: str | None, folder: Path, device: str) -> _Network:
        pipeline = TiMPipeline.from_pretrained(folder, device=device)
        export = pipeline.export
        if export.model.condition != "text" or pipeline.autoencoder.pixel_channels != 1:
            raise RequestError(
                f"{folder}: expected a network that draws grey pictures from captions, received condition "
                f"{export.model.condition!r} and {pipeline.autoencoder.pixel_channels} colour channels"
            )
        if CELL_PX % pipeline.size_multiple:
            raise RequestError(
                f"{folder}: draws multiples of {pipeline.size_multiple} pixels, which do not divide the "
                f"{CELL_PX} of a handwriting cell"
            )
        return cls(label or export.source.name, folder, sha256(folder / EXPORT_FILE), pipeline)

    def identity(self, num_steps: int, cfg_scale: float | None) -> dict[str, Any]:
        sampler = self.pipeline.export.sampler
        return {
            "weights_sha256": self.pipeline.weights_sha256,
            "export_sha256": self.export_sha256,
            "num_steps": num_steps,
            "mode": sampler.mode,
            "cfg_scale": sampler.cfg_scale if cfg_scale is None else cfg_scale,
            "stochasticity": sampler.stochasticity,
        }

    def sample(
        self, prompts: PromptSet, num_steps: int, cfg_scale: float | None, bar: tqdm
    ) -> PipelineOutput:
        return self.pipeline(
            prompts.captions,
            [prompt.size_px for prompt in prompts.prompts],
            num_steps=num_steps,
            cfg_scale=cfg_scale,
            seeds=prompts.seeds,
            progress=bar,
        )

    def score(
        self,
        sets: Sequence[PromptSet],
        outputs: dict[str, PipelineOutput],
        identity: dict[str, Any],
        scorer: HandwritingScorer,
    ) -> Row:
        seconds = sum(output.seconds for output in outputs.values())
        export = self.pipeline.export
        return Row(
            label=self.label,
            identity=identity,
            model=export.source.name,
            export=str(self.folder),
            recipe_sha256=export.source.recipe_sha256,
            step=export.step,
            nfe=outputs[sets[0].name].nfe,
            seconds=round(seconds, 3),
            seconds_per_picture=round(seconds / sum(len(s.prompts) for s in sets), 6),
            scores={s.name: scorer.score(s.prompts, outputs[s.name].pixels) for s in sets},
            reader_accuracy=scorer.reader_accuracy,
            versions=library_versions(),
            device=device_name(self.pipeline.device),
            seed=sets[0].seeds[0],
        )


def library_versions() -> dict[str, str]:
    """What computed the scores."""
    return {
        "tim_ds": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def device_name(device: torch.device) -> str:
    """What the numbers were made on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _check_networks(networks: Sequence[_Network]) -> None:
    """Two networks must be two, and have two names."""
    for n, network in enumerate(networks):
        for other in networks[:n]:
            if network.pipeline.weights_sha256 == other.pipeline.weights_sha256:
                raise RequestError(
                    f"{network.folder}: holds the same weights as {other.folder}; compare with another"
                )
            if network.label == other.label:
                raise RequestError(
                    f"{network.folder}: both networks are called {network.label!r}; "
                    f"give --label or --baseline-label"
                )


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run; those of another protocol are left out.

    Raises:
        RequestError: if the file is there and is something else.
    """
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text())["rows"]
        stored = [row for row in stored if row["identity"]["protocol"] == PROTOCOL]
        return [
            Row(**{**row, "scores": {name: Scores(**scores) for name, scores in row["scores"].items()}})
            for row in stored
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{path}: not the results of this evaluation ({error!r}); "
            f"choose another --out, or delete the file"
        ) from error


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: (row.label, row.num_steps))
    text = json.dumps({"evaluation": "nfe", "rows": [asdict(row) for row in ordered]}, indent=2) + "\n"

    def write(aside: Path) -> None:
        aside.write_text(text)

    write_aside(path, len(text), write)


def _write_samples(path: Path, samples: dict[str, list[NDArray[np.uint8]]]) -> None:
    flat = {
        name: np.concatenate([picture.ravel() for picture in pictures]) for name, pictures in samples.items()
    }

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **flat)

    write_aside(path, sum(part.nbytes for part in flat.values()), write)


def _read_samples(path: Path, sets: Sequence[PromptSet]) -> dict[str, list[NDArray[np.uint8]]] | None:
    """The pictures of a finished row, or None if the file is gone or damaged: then they are sampled again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {s.name: list(_cut(file[s.name], s.prompts)) for s in sets}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None


def _cut(flat: NDArray[np.uint8], prompts: Sequence[Prompt]) -> Iterator[NDArray[np.uint8]]:
    ends = np.cumsum([p.size_px[0] * p.size_px[1] for p in prompts])
    if len(flat) != ends[-1]:
        raise ValueError(f"expected {ends[-1]} pixels, received {len(flat)}")
    for part, prompt in zip(np.split(flat, ends[:-1]), prompts, strict=True):
        yield part.reshape(*prompt.size_px, 1)
