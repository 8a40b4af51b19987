"""Reads handwriting back: an independent classifier that says which digit each cell of a picture shows.

Letters used in shapes: N cells.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import SVC

from data_pipeline.handwriting import CELL_PX, REFERENCE_NAME, Orientation, Scans
from tim_ds.errors import RequestError

BLANK = 10
"""Class of a cell without ink."""

Cells = tuple[int | None, ...]
"""What a picture shows, left to right or top to bottom; None is a blank cell."""

# 98.6 % of the held-back scans are read right. gamma is scikit-learn's example for scans
# of values 0 to 16, 0.001, on values 8 times smaller: 0.001 * 8^2.
_GAMMA = 0.064
_C = 10.0
# A single point would be one support vector among 1,300 scans. With 30 the class stays blank under Gaussian
# noise up to 0.2 of full ink and for strokes below 0.3 of it, and no held-back scan is called blank
# (measured).
_NUM_BLANKS = 30


class DigitReader:
    """Support vector machine (radial basis) on 8x8 cells, trained on scans and a blank class."""

    def __init__(self, scans: Scans) -> None:
        ink = np.concatenate([_flat(scans_in_unit_range(scans)), np.full((_NUM_BLANKS, CELL_PX**2), -1.0)])
        labels = np.concatenate([scans.labels, np.full(_NUM_BLANKS, BLANK)])
        machine = SVC(kernel="rbf", gamma=_GAMMA, C=_C)  # type: ignore[arg-type]  # a number is documented
        self._classifier = machine.fit(_ink_share(ink), labels)

    def read_cells(self, cells: NDArray[Any]) -> NDArray[np.int64]:
        """Class of each cell, 0 to 9 or BLANK.

        Shapes:
            cells: [N, 8, 8] in [-1, 1]. Returns [N].
        """
        if len(cells) == 0:
            return np.empty(0, dtype=np.int64)
        return self._classifier.predict(_ink_share(_flat(cells))).astype(np.int64)

    def read(self, image: NDArray[Any], orientation: Orientation) -> Cells:
        """What one picture shows, cell by cell.

        Shapes:
            image: [8, 8 n] (row) or [8 n, 8] (column), or the same with a channel axis; uint8, or
                float in [-1, 1].
        """
        return self.read_many([image], [orientation])[0]

    def read_many(self, images: Sequence[NDArray[Any]], orientations: Sequence[Orientation]) -> list[Cells]:
        """`read` of several pictures in one call of the classifier."""
        parts = [split_cells(image, o) for image, o in zip(images, orientations, strict=True)]
        if not parts:
            return []
        classes = self.read_cells(np.concatenate(parts))
        ends = np.cumsum([len(part) for part in parts])[:-1]
        return [tuple(None if c == BLANK else int(c) for c in read) for read in np.split(classes, ends)]

    def accuracy(self, scans: Scans) -> float:
        """Share of scans whose digit is read right."""
        return float((self.read_cells(scans_in_unit_range(scans)) == scans.labels).mean())


def scans_in_unit_range(scans: Scans) -> NDArray[np.float64]:
    """Scans of values 0 to 16 as cells [N, 8, 8] in [-1, 1], as training pictures show them."""
    return scans.images.astype(np.float64) / 8.0 - 1.0


def split_cells(image: NDArray[Any], orientation: Orientation) -> NDArray[np.float64]:
    """The cells of a picture, in reading order.

    Shapes:
        image: [H, W] or [H, W, 1]; uint8, or float in [-1, 1]. Returns [N, 8, 8] in [-1, 1].
    Raises:
        RequestError: if the picture is not a row or column of whole cells.
    """
    picture = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    across, along = (0, 1) if orientation == "row" else (1, 0)
    if picture.ndim != 2 or picture.shape[across] != CELL_PX or picture.shape[along] % CELL_PX:
        raise RequestError(
            f"reading a {orientation}: expected grey cells of {CELL_PX}x{CELL_PX} pixels in one "
            f"{orientation}, received a picture of shape {list(image.shape)}"
        )
    values = picture.astype(np.float64)
    if image.dtype == np.uint8:
        values = values / 127.5 - 1.0
    return np.stack(np.split(values, picture.shape[along] // CELL_PX, axis=along))


def load_reference(folder: str | Path) -> tuple[Scans, Scans]:
    """The (training, held-back) scans that a handwriting data set was built from.

    Raises:
        RequestError: if the folder holds no such file, or another file of that name.
    """
    path = Path(folder) / REFERENCE_NAME
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = [Scans(file[f"{part}_images"], file[f"{part}_labels"]) for part in ("train", "held")]
    except FileNotFoundError as error:
        raise RequestError(
            f"{path}: not found; build the data with `python -m data_pipeline.handwriting --out {folder}`"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise RequestError(f"{path}: not the scans of a handwriting data set ({error})") from error
    for scans in parts:
        if scans.images.shape != (len(scans.labels), CELL_PX, CELL_PX):
            raise RequestError(f"{path}: expected scans [N, 8, 8], received {list(scans.images.shape)}")
    return parts[0], parts[1]


def _flat(cells: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(cells, dtype=np.float64).reshape(len(cells), -1)


def _ink_share(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values * 0.5 + 0.5
