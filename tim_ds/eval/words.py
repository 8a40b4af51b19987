"""What a network makes of a new word and of its old ones, on handwriting (`launch/evaluate.py words`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.draws import generator
from data_pipeline.handwriting import MAX_CELLS, NUMERALS, PHRASINGS, Prompt, caption, draw_prompt
from data_pipeline.handwriting_words import NewName
from tim_ds.errors import RequestError
from tim_ds.eval.reader import DigitReader, load_reference
from tim_ds.pipeline import TiMPipeline


@dataclass(frozen=True)
class WordScores:
    """Shares, 0 to 1, of what an independent reader reads as asked."""

    new_cells: float
    """Cells that the new word asks for, in prompts that have it."""
    new_prompts: float
    """Whole prompts with the new word."""
    old_name_cells: float
    """Cells of the same digit, asked for by its old name."""
    old_cells: float
    """All digits of prompts in old words."""
    old_prompts: float
    """Whole prompts in old words."""


def score(
    export: Path, data: Path, name: NewName, *, count: int, num_steps: int, seed: int = 0, device: str = "cpu"
) -> WordScores:
    """Sample `count` prompts with the new word and as many in old words, and read them back.

    Raises:
        CheckpointError, RequestError: if the export or the data set cannot be used.
    """
    if count < 1:
        raise RequestError(f"--pictures: expected at least 1, received {count}")
    reader = DigitReader(load_reference(data)[0])
    pipeline = TiMPipeline.from_pretrained(export, device=device)
    prompts: list[Prompt] = []
    captions: list[str] = []
    for number in range(count):
        prompt, phrasing = name.draw(generator(seed, "eval.words.new", 0, number))
        prompts.append(prompt)
        captions.append(name.caption(prompt, phrasing))
    for number in range(count):
        rng = generator(seed, "eval.words.old", 0, number)
        prompt = draw_prompt(rng, max_cells=MAX_CELLS, gap_share=0.1)
        prompts.append(prompt)
        captions.append(caption(prompt, PHRASINGS[int(rng.integers(len(PHRASINGS)))]))
    output = pipeline(captions, [p.size_px for p in prompts], num_steps=num_steps, seeds=seed, progress=True)
    read = reader.read_many(output.pixels, [p.orientation for p in prompts])
    pairs = [list(zip(p.cells, r, strict=True)) for p, r in zip(prompts, read, strict=True)]
    new, old = pairs[:count], pairs[count:]
    return WordScores(
        new_cells=_share([a == b for cells in new for a, b in cells if a == name.digit]),
        new_prompts=_share([all(a == b for a, b in cells) for cells in new]),
        old_name_cells=_share([a == b for cells in old for a, b in cells if a == name.digit]),
        old_cells=_share([a == b for cells in old for a, b in cells if a is not None]),
        old_prompts=_share([all(a == b for a, b in cells) for cells in old]),
    )


def table(name: NewName, rows: Sequence[tuple[str, WordScores]]) -> str:
    """Markdown, a row a network."""
    lines = [
        f"| network | '{name.word}' read as {name.digit} | prompts with '{name.word}' "
        f"| '{NUMERALS[name.digit]}' read as {name.digit} | digits in old words | prompts in old words |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, scores in rows:
        shares = (
            scores.new_cells,
            scores.new_prompts,
            scores.old_name_cells,
            scores.old_cells,
            scores.old_prompts,
        )
        lines.append(f"| {label} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines)


def _share(hits: Sequence[bool]) -> float:
    return float(np.mean(hits)) if hits else float("nan")
