"""The embedded data set: real handwriting in strips and columns, with captions that say what is in each cell.

    python -m data_pipeline.handwriting --out runs/handwriting

Scans are scikit-learn's bundled UCI digits: 1,797 grey pictures of 8x8 pixels, values 0 to 16. A fixed seed
splits them into training scans and held-back scans; training pictures are composed from the former only.

Grammar. A prompt is one or more cells, in training up to four, left to right in a row or top to bottom in a
column; a cell is a digit or blank (`a gap`). The caption determines every cell:

    one cell        a three
    row,  chained   a three before a gap before a seven
    row,  listed    a three, a gap, a seven in a row
    column, chained a three above a seven
    column, listed  a three, a seven in a column

A row of four cells never appears in training: that aspect ratio is held back for evaluation. Columns of four
do, so the count and the length of the captions are known.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import save
from tqdm import tqdm

from data_pipeline.command import command
from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from data_pipeline.draws import generator
from data_pipeline.encoders.autoencoder import PixelAutoencoder
from data_pipeline.encoders.text import WordsEncoder
from data_pipeline.errors import DataError
from data_pipeline.index import build_index, load_index
from data_pipeline.schema import MANIFEST_NAME, NULL_NAME, Sample
from data_pipeline.shards import write_shards

CELL_PX = 8
"""Side of one cell, the size of a scan."""

MAX_CELLS = 4
"""Cells of a training picture."""
MAX_PROMPT_CELLS = 32
"""Cells that the grammar knows: evaluation asks for pictures longer than training shows."""

NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GAP = "gap"

Orientation = Literal["row", "column"]
Phrasing = Literal["chained", "listed"]
PHRASINGS: tuple[Phrasing, ...] = ("chained", "listed")
JOINERS: dict[Orientation, str] = {"row": " before ", "column": " above "}

REFERENCE_NAME = "reference.npz"
FORMAT = 1


@dataclass(frozen=True)
class Prompt:
    """What a picture shows: the digit in each cell (None: blank), and how the cells are laid out.

    A single cell is a row. At least one cell holds a digit.
    """

    cells: tuple[int | None, ...]
    orientation: Orientation = "row"

    def __post_init__(self) -> None:
        if not 1 <= len(self.cells) <= MAX_PROMPT_CELLS:
            raise DataError(f"prompt: expected 1 to {MAX_PROMPT_CELLS} cells, received {len(self.cells)}")
        for cell in self.cells:
            if cell is not None and cell not in range(10):
                raise DataError(f"prompt: a cell is a digit 0 to 9 or None, received {cell!r}")
        if all(cell is None for cell in self.cells):
            raise DataError("prompt: at least one cell must hold a digit")
        if self.orientation not in JOINERS:
            raise DataError(f"prompt: orientation is 'row' or 'column', received {self.orientation!r}")
        if len(self.cells) == 1 and self.orientation != "row":
            raise DataError("prompt: a single cell is a row")

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of the picture."""
        length = len(self.cells) * CELL_PX
        return (CELL_PX, length) if self.orientation == "row" else (length, CELL_PX)


def caption(prompt: Prompt, phrasing: Phrasing = "chained") -> str:
    """The caption of a prompt (a single cell reads the same in both phrasings)."""
    phrases = [_phrase(cell) for cell in prompt.cells]
    if phrasing == "chained" or len(phrases) == 1:
        return JOINERS[prompt.orientation].join(phrases)
    return f"{', '.join(phrases)} in a {prompt.orientation}"


def parse(text: str) -> Prompt:
    """The prompt that a caption describes: the inverse of `caption`.

    Raises:
        DataError: if the text does not follow the grammar.
    """
    orientation: Orientation = "row"
    phrases = [text]
    for candidate, joiner in JOINERS.items():
        ending = f" in a {candidate}"
        if text.endswith(ending):
            orientation, phrases = candidate, text[: -len(ending)].split(", ")
            break
        if joiner in text:
            orientation, phrases = candidate, text.split(joiner)
            break
    prompt = Prompt(tuple(_cell(phrase, text) for phrase in phrases), orientation)
    if text not in {caption(prompt, phrasing) for phrasing in PHRASINGS}:
        raise DataError(f"caption {text!r}: does not follow the grammar; did you mean {caption(prompt)!r}?")
    return prompt


def _phrase(cell: int | None) -> str:
    word = GAP if cell is None else NUMERALS[cell]
    return f"an {word}" if word[0] in "aeiou" and word != "one" else f"a {word}"


def _cell(phrase: str, text: str) -> int | None:
    for cell in (None, *range(10)):
        if phrase == _phrase(cell):
            return cell
    raise DataError(
        f"caption {text!r}: {phrase!r} is no cell; "
        f"expected {', '.join(repr(_phrase(cell)) for cell in (*range(10), None))}"
    )


@dataclass(frozen=True, eq=False)
class Scans:
    """Handwritten digits. images: uint8 [N, 8, 8], 0 to 16; labels: int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def load_scans(*, num_train: int = 1297, split_seed: int = 0) -> tuple[Scans, Scans]:
    """The bundled scans, split into (training, held back) by a fixed seed.

    Raises:
        DataError: if a part would lack a digit.
    """
    from sklearn.datasets import load_digits

    bunch = cast(Any, load_digits())
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.int64)
    order = generator(split_seed, "handwriting.split", 0, 0).permutation(len(labels))
    parts = [Scans(images[part], labels[part]) for part in (order[:num_train], order[num_train:])]
    for name, part in zip(("training", "held-back"), parts, strict=True):
        if len(set(part.labels.tolist())) < 10:
            raise DataError(f"num_train {num_train}: the {name} scans ({len(part)}) do not show every digit")
    return parts[0], parts[1]


def compose(prompt: Prompt, scans: Scans, rng: np.random.Generator) -> np.ndarray:
    """A picture of the prompt, one random scan a digit: float32 [1, H, W] in [-1, 1], blank is -1."""
    cells = []
    for cell in prompt.cells:
        if cell is None:
            cells.append(np.zeros((CELL_PX, CELL_PX), dtype=np.uint8))
        else:
            cells.append(scans.images[rng.choice(np.flatnonzero(scans.labels == cell))])
    ink = np.concatenate(cells, axis=1 if prompt.orientation == "row" else 0)
    return (ink.astype(np.float32) / 8.0 - 1.0)[None]


def draw_prompt(rng: np.random.Generator, *, max_cells: int, gap_share: float) -> Prompt:
    """A random training prompt: every count of cells equally likely, then row or column, then the cells.

    Four cells are always a column: the row of four is held back.
    """
    count = int(rng.integers(1, max_cells + 1))
    turned = rng.random() < 0.5
    orientation: Orientation = "row" if count == 1 or (turned and count < MAX_CELLS) else "column"
    digits = rng.integers(0, 10, count)
    gaps = rng.random(count) < gap_share
    if gaps.all():
        # One cell keeps its digit, so that no picture is blank.
        gaps[rng.integers(count)] = False
    return Prompt(tuple(None if gap else int(d) for d, gap in zip(digits, gaps, strict=True)), orientation)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines the data; recorded in the manifest, compared before reuse."""

    samples: int = 20_000
    seed: int = 0
    num_train: int = 1297
    max_cells: int = MAX_CELLS
    gap_share: float = 0.1
    phrasings: tuple[Phrasing, ...] = PHRASINGS
    factor: int = 4
    text_width: int = 64
    per_shard: int = 5000

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError(f"--samples: expected at least 1, received {self.samples}")
        if not 1 <= self.max_cells <= MAX_CELLS:
            raise DataError(f"--max-cells: expected 1 to {MAX_CELLS}, received {self.max_cells}")
        if not 0.0 <= self.gap_share < 1.0:
            raise DataError(f"--gap-share: expected 0 up to but not 1, received {self.gap_share}")
        if not self.phrasings or any(p not in PHRASINGS for p in self.phrasings):
            raise DataError(
                f"--phrasings: expected some of {', '.join(PHRASINGS)}, received {self.phrasings}"
            )
        if self.factor < 1 or CELL_PX % self.factor:
            raise DataError(f"--factor: expected a divisor of {CELL_PX}, received {self.factor}")


def make_samples(settings: Settings, scans: Scans) -> Iterator[Sample]:
    """Training samples in order; sample n depends on the settings and n alone."""
    autoencoder = PixelAutoencoder(settings.factor, channels=1)
    encoder = WordsEncoder(settings.text_width)
    states: dict[str, torch.Tensor] = {}
    for number in range(settings.samples):
        rng = generator(settings.seed, "handwriting.samples", 0, number)
        prompt = draw_prompt(rng, max_cells=settings.max_cells, gap_share=settings.gap_share)
        text = caption(prompt, settings.phrasings[int(rng.integers(len(settings.phrasings)))])
        if text not in states:
            states[text] = encoder.encode([text])[0].to(torch.float16)
        pixels = torch.from_numpy(compose(prompt, scans, rng))
        height, width = prompt.size_px
        yield Sample(
            key=f"{number:08d}",
            # Scans have 17 levels, so pixels are multiples of 1/8: float16 holds them exactly.
            latent=autoencoder.encode(pixels[None])[0].to(torch.float16),
            states=states[text],
            meta={"caption": text, "height_px": height, "width_px": width},
        )


def build(out: Path, settings: Settings, *, progress: bool = True) -> bool:
    """Write the data set to `out`. Returns False when it was already there, built with the same settings.

    Everything is written to a hidden folder beside `out` and renamed at the end: `out` is complete or absent.

    Raises:
        DataError: if `out` holds something else.
    """
    wanted = json.loads(json.dumps(asdict(settings)))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _check_finished(out, wanted)
        return False
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write(aside, settings, wanted, progress=progress)
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return True


def _write(folder: Path, settings: Settings, wanted: dict[str, Any], *, progress: bool) -> None:
    train, held_back = load_scans(num_train=settings.num_train)
    samples = tqdm(
        make_samples(settings, train),
        total=settings.samples,
        desc="compose",
        unit="picture",
        disable=not progress,
    )
    shards = write_shards(folder, "handwriting", samples, per_shard=settings.per_shard)
    null = WordsEncoder(settings.text_width).encode([""])[0].to(torch.float16)
    (folder / NULL_NAME).write_bytes(save({"states": null}))
    index = build_index(folder, progress=progress)
    index.save()
    np.savez(
        folder / REFERENCE_NAME,
        train_images=train.images,
        train_labels=train.labels,
        held_images=held_back.images,
        held_labels=held_back.labels,
    )
    manifest = {
        "format": FORMAT,
        "source": "scikit-learn load_digits (UCI optical recognition of handwritten digits)",
        "settings": wanted,
        "augmentation": "none",
        "samples": len(index),
        "scans": {"train": len(train), "held_back": len(held_back)},
        "held_back": "four digits in a row or column; all held-back scans",
        "autoencoder": asdict(AutoencoderConfig(kind="pixels", factor=settings.factor, channels=1)),
        "text_encoder": asdict(TextEncoderConfig(kind="words", width=settings.text_width)),
        "dtype": "float16",
        "index_hash": index.hash,
        "blake2b": {path.name: blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in shards},
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")


def _check_finished(out: Path, wanted: dict[str, Any]) -> None:
    """Raises DataError unless `out` is a finished data set of these settings."""
    advice = "choose another --out, or delete the folder"
    path = out / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{out}: is not empty and holds no {MANIFEST_NAME}; {advice}")
    try:
        manifest = json.loads(path.read_text())
        found, recorded_hash = manifest["settings"], manifest["index_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest of this tool ({error!r}); {advice}") from error
    differing = [
        f"{name} (there {found.get(name)!r}, asked {wanted.get(name)!r})"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if manifest.get("format") != FORMAT:
        differing.append(f"format (there {manifest.get('format')!r}, asked {FORMAT!r})")
    if differing:
        raise DataError(f"{out}: holds data with other settings: {', '.join(differing)}; {advice}")
    if load_index(out).hash != recorded_hash:
        raise DataError(
            f"{out}: the index is not the one of the manifest; delete the folder and build it again"
        )


@command(DataError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Build the embedded data set, or say that it is there."""
    default = Settings()
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.handwriting", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--samples", type=int, default=default.samples, help="composed training pictures")
    parser.add_argument("--seed", type=int, default=default.seed, help="of prompts and compositions")
    parser.add_argument(
        "--num-train", type=int, default=default.num_train, help="training scans; the rest is held back"
    )
    parser.add_argument(
        "--max-cells", type=int, default=default.max_cells, help="cells of a training picture, 1 to 4"
    )
    parser.add_argument(
        "--gap-share", type=float, default=default.gap_share, help="probability that a cell is blank"
    )
    parser.add_argument(
        "--phrasings", default=",".join(default.phrasings), help="comma-separated caption forms"
    )
    parser.add_argument("--factor", type=int, default=default.factor, help="pixels a side of a latent cell")
    parser.add_argument(
        "--text-width", type=int, default=default.text_width, help="width of the words encoder"
    )
    parser.add_argument("--per-shard", type=int, default=default.per_shard, help="samples in one tar")
    options = vars(parser.parse_args(arguments))
    out: Path = options.pop("out")
    options["phrasings"] = tuple(name.strip() for name in options["phrasings"].split(",") if name.strip())
    built = build(out, Settings(**options))
    index = load_index(out)
    state = "built" if built else "already there with these settings, left as it is"
    print(f"{out}: {state}; {len(index)} samples in {len(index.shards)} shards, index {index.hash}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
