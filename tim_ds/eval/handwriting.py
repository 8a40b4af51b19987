"""Scores of sampled handwriting: how real the digits look, and whether prompts are followed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.handwriting import NUMERALS, Prompt, Scans
from tim_ds.errors import RequestError
from tim_ds.eval.frechet import GaussianFit, fit_gaussian, frechet_distance
from tim_ds.eval.reader import Cells, DigitReader, load_reference, scans_in_unit_range, split_cells


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one set of pictures. Shares are 0 to 1; None where no picture qualifies."""

    num_pictures: int
    num_digit_cells: int
    """Cells that should hold a digit."""
    frechet_distance: float
    """Between those cells and held-back scans in the prompts' mix of digits, pixels in [-1, 1]."""
    frechet_floor: float
    """The same distance for the training scans: what copying them perfectly would score."""
    prompt_accuracy: float
    """Pictures in which every cell reads as the prompt says."""
    digit_accuracy: float
    """Cells naming a digit that read as that digit."""
    digit_accuracy_by_digit: dict[str, float | None]
    count_accuracy: float
    """Pictures with as many inked cells as the prompt has digits."""
    position_accuracy: float | None
    """Of the pictures that show the prompt's digits in some order, those that show them in the right cells.
    Prompts whose cells are all alike, which have one order only, do not enter."""
    num_position_pictures: int
    """Pictures that the position accuracy is taken over."""


class HandwritingScorer:
    """Scores pictures against prompts, with a reader trained on the training scans.

    Args:
        train: scans that the model was trained on; the reader learns from them too.
        held_back: scans that neither has seen.
    """

    def __init__(self, train: Scans, held_back: Scans) -> None:
        self._train, self._held_back = train, held_back
        self.reader = DigitReader(train)
        self.reader_accuracy = self.reader.accuracy(held_back)
        """Share of held-back scans that the reader reads right: the ceiling of every accuracy."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> HandwritingScorer:
        """The scorer of the handwriting data set in `folder`."""
        return cls(*load_reference(folder))

    def score(self, prompts: Sequence[Prompt], images: Sequence[NDArray[Any]]) -> Scores:
        """Scores of `images`, one a prompt.

        Shapes:
            images: uint8 [H, W, 1] (or float in [-1, 1]), of the prompt's size.
        Raises:
            RequestError: if counts or sizes do not fit, or there are too few digits for a Frechet distance.
        """
        if not prompts or len(prompts) != len(images):
            raise RequestError(
                f"scores: expected one picture a prompt and at least one ({len(prompts)}), "
                f"received {len(images)}"
            )
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            if tuple(image.shape[:2]) != prompt.size_px:
                raise RequestError(
                    f"scores: picture {i} is {image.shape[0]}x{image.shape[1]}, "
                    f"its prompt asks for {prompt.size_px[0]}x{prompt.size_px[1]}"
                )
        cells = np.concatenate([split_cells(x, p.orientation) for p, x in zip(prompts, images, strict=True)])
        wanted = np.array([-1 if c is None else c for p in prompts for c in p.cells])
        named = wanted >= 0
        read = self.read(prompts, images)
        got = np.array([-1 if c is None else c for cells in read for c in cells])
        right = got[named] == wanted[named]
        digits = wanted[named]
        ordered = [
            r == p.cells for p, r in zip(prompts, read, strict=True) if _shows_digits_in_some_order(p, r)
        ]
        return Scores(
            num_pictures=len(prompts),
            num_digit_cells=int(named.sum()),
            frechet_distance=frechet_distance(
                fit_gaussian(cells[named].reshape(-1, cells[0].size)), self._fit(self._held_back, digits)
            ),
            frechet_floor=frechet_distance(
                self._fit(self._train, digits), self._fit(self._held_back, digits)
            ),
            prompt_accuracy=_share([r == p.cells for p, r in zip(prompts, read, strict=True)]),
            digit_accuracy=_share(right),
            digit_accuracy_by_digit={
                name: _share_or_none(right[digits == d]) for d, name in enumerate(NUMERALS)
            },
            count_accuracy=_share([_inked(r) == _inked(p.cells) for p, r in zip(prompts, read, strict=True)]),
            position_accuracy=_share_or_none(ordered),
            num_position_pictures=len(ordered),
        )

    def read(self, prompts: Sequence[Prompt], images: Sequence[NDArray[Any]]) -> list[Cells]:
        """What each picture shows."""
        return self.reader.read_many(images, [p.orientation for p in prompts])

    def _fit(self, scans: Scans, digits: NDArray[np.int64]) -> GaussianFit:
        """Fit of `scans`, weighted to the mix of digits of the prompts."""
        wanted = np.bincount(digits, minlength=10) / len(digits)
        present = np.bincount(scans.labels, minlength=10)
        # The stored scans are all there is. A mix of few digits uses few of them, which the floor shows,
        # being taken from the same rows.
        return fit_gaussian(
            scans_in_unit_range(scans).reshape(len(scans), -1),
            (wanted / present)[scans.labels],
            minimum_count=2,
        )


def _inked(cells: Cells) -> int:
    return sum(cell is not None for cell in cells)


def _shows_digits_in_some_order(prompt: Prompt, read: Cells) -> bool:
    return len(set(prompt.cells)) > 1 and Counter(read) == Counter(prompt.cells)


def _share(hits: Sequence[bool] | NDArray[np.bool_]) -> float:
    return float(np.mean(hits))


def _share_or_none(hits: Sequence[bool] | NDArray[np.bool_]) -> float | None:
    return _share(hits) if len(hits) else None
