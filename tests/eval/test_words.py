"""Scores of a new word: cells and prompts that an independent reader reads as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.handwriting import NUMERALS, Prompt, load_scans, parse
from data_pipeline.handwriting_words import NewName
from tim_ds.errors import RequestError
from tim_ds.eval import words
from tim_ds.pipeline import TiMPipeline

NAME = NewName.parse("five=quint")


class _Scribe:
    """Draws what a caption says, as far as it knows the words: the new one or not, and the old ones."""

    def __init__(self, knows_new: bool) -> None:
        self._knows_new = knows_new
        self._scans = load_scans()[0]

    def __call__(self, captions: list[str], sizes: Any, **_: Any) -> Any:
        images = [self._draw(text) for text in captions]
        assert [image.shape[:2] for image in images] == list(sizes)
        return type("Output", (), {"pixels": images})()

    def _draw(self, text: str) -> np.ndarray:
        known = NUMERALS[5] if self._knows_new else NUMERALS[6]
        prompt: Prompt = parse(text.replace("quint", known).replace("a eight", "an eight"))
        cells = []
        for cell in prompt.cells:
            rows = self._scans.images[self._scans.labels == cell] if cell is not None else np.zeros((1, 8, 8))
            cells.append(rows[0])
        ink = np.concatenate(cells, axis=1 if prompt.orientation == "row" else 0)
        return np.rint(ink.astype(float) / 16 * 255).astype(np.uint8)[..., None]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    train, held = load_scans()
    np.savez(
        tmp_path / "reference.npz",
        train_images=train.images,
        train_labels=train.labels,
        held_images=held.images,
        held_labels=held.labels,
    )
    return tmp_path


@pytest.mark.parametrize("knows_new", [True, False])
def test_a_word_counts_as_known_when_it_is_drawn(
    knows_new: bool, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TiMPipeline, "from_pretrained", lambda *_, **__: _Scribe(knows_new))
    found = words.score(Path("export"), data, NAME, count=40, num_steps=1)
    # Scans that the reader was trained on: it reads them all.
    assert (found.old_name_cells, found.old_cells, found.old_prompts) == (1.0, 1.0, 1.0)
    assert (found.new_cells, found.new_prompts) == ((1.0, 1.0) if knows_new else (0.0, 0.0))
    row = words.table(NAME, [("after", found)]).splitlines()[-1]
    assert row.startswith("| after | 100.0% |" if knows_new else "| after | 0.0% |")


def test_no_pictures_are_no_score(data: Path) -> None:
    with pytest.raises(RequestError, match="--pictures: expected at least 1"):
        words.score(Path("export"), data, NAME, count=0, num_steps=1)
