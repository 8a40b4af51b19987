"""A folder of captioned handwriting in which a digit has a new name: something small to fine-tune on.

    python -m data_pipeline.handwriting_words --rename five=quint --count 300 --out runs/quint

writes `00000.png`, `00000.txt`, ... as anybody's folder of captioned pictures, for `data_pipeline.prepare`.
Every picture shows the renamed digit at least once.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipeline.command import command
from data_pipeline.draws import generator
from data_pipeline.errors import DataError
from data_pipeline.handwriting import (
    GAP,
    MAX_CELLS,
    NUMERALS,
    PHRASINGS,
    Phrasing,
    Prompt,
    caption,
    compose,
    draw_prompt,
    load_scans,
)


@dataclass(frozen=True)
class NewName:
    """Another word for a digit."""

    digit: int
    word: str

    @classmethod
    def parse(cls, text: str) -> NewName:
        """From `numeral=word`.

        Raises:
            DataError: for another form, a numeral that is none, or a word that captions already have.
        """
        numeral, _, word = text.partition("=")
        if numeral not in NUMERALS:
            raise DataError(f"--rename: expected one of {', '.join(NUMERALS)} before '=', received {text!r}")
        if not re.fullmatch(r"[a-z]+", word) or word in (*NUMERALS, GAP) or word[0] in "aeiou":
            raise DataError(
                f"--rename: expected a new word of small letters, with a consonant first, received {text!r}"
            )
        return cls(NUMERALS.index(numeral), word)

    def caption(self, prompt: Prompt, phrasing: Phrasing) -> str:
        """Caption of a prompt, the digit under its new name."""
        return re.sub(rf"\b{NUMERALS[self.digit]}\b", self.word, caption(prompt, phrasing))

    def draw(self, rng: np.random.Generator, *, max_cells: int = MAX_CELLS) -> tuple[Prompt, Phrasing]:
        """A training prompt that shows the digit, and its phrasing."""
        prompt = draw_prompt(rng, max_cells=max_cells, gap_share=0.1)
        cells = list(prompt.cells)
        if self.digit not in cells:
            cells[int(rng.integers(len(cells)))] = self.digit
        return Prompt(tuple(cells), prompt.orientation), PHRASINGS[int(rng.integers(len(PHRASINGS)))]


def write_pictures(out: Path, name: NewName, count: int, *, seed: int = 0) -> None:
    """Write `count` captioned pictures of training scans.

    Raises:
        DataError: if the folder holds something already.
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty; choose another --out, or delete the folder")
    out.mkdir(parents=True, exist_ok=True)
    scans, _ = load_scans()
    for number in tqdm(range(count), desc="compose", unit="picture"):
        rng = generator(seed, "handwriting.words", 0, number)
        prompt, phrasing = name.draw(rng)
        ink = compose(prompt, scans, rng)[0]
        picture = np.rint((ink + 1.0) * 127.5).astype(np.uint8)
        Image.fromarray(picture).save(out / f"{number:05d}.png")
        (out / f"{number:05d}.txt").write_text(name.caption(prompt, phrasing) + "\n", encoding="utf-8")


@command(DataError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Write captioned pictures in which a digit has a new name."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.handwriting_words", description=main.__doc__
    )
    parser.add_argument("--rename", required=True, metavar="NUMERAL=WORD", help="such as five=quint")
    parser.add_argument("--count", type=int, default=300, help="pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and compositions")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    options = parser.parse_args(arguments)
    name = NewName.parse(options.rename)
    write_pictures(options.out, name, options.count, seed=options.seed)
    print(f"{options.out}: {options.count} pictures, {NUMERALS[name.digit]} is called {name.word}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
