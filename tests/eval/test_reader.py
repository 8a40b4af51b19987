"""The reader of handwriting: accuracy on scans it never saw, blanks, layout, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.handwriting import Orientation, Prompt, Scans, compose
from tim_ds.errors import RequestError
from tim_ds.eval.handwriting import HandwritingScorer
from tim_ds.eval.reader import BLANK, DigitReader, load_reference, scans_in_unit_range, split_cells


@pytest.fixture(scope="module")
def reader(scorer: HandwritingScorer) -> DigitReader:
    return scorer.reader


def test_reads_scans_it_never_saw(reader: DigitReader, scans: tuple[Scans, Scans]) -> None:
    held_back = scans[1]
    assert len(held_back) == 500
    # Measured 0.986; a reader under 0.97 would bound the accuracy of a perfect model noticeably.
    assert reader.accuracy(held_back) >= 0.97


def test_no_held_back_scan_is_called_blank(reader: DigitReader, scans: tuple[Scans, Scans]) -> None:
    assert (reader.read_cells(scans_in_unit_range(scans[1])) != BLANK).all()


def test_blank_cells_stay_blank_under_noise(reader: DigitReader) -> None:
    rng = np.random.default_rng(0)
    empty = np.full((100, 8, 8), -1.0)
    noisy = np.clip(empty + rng.normal(0, 0.2, empty.shape), -1, 1)
    assert (reader.read_cells(empty) == BLANK).all()
    assert (reader.read_cells(noisy) == BLANK).all()


@pytest.mark.parametrize("orientation", ["row", "column"])
def test_cells_come_in_reading_order(
    reader: DigitReader, scans: tuple[Scans, Scans], orientation: Orientation
) -> None:
    prompt = Prompt((3, None, 7), orientation)
    image = compose(prompt, scans[0], np.random.default_rng(1))[0]
    assert reader.read(image, orientation) == (3, None, 7)
    as_bytes = np.round((image[..., None] + 1) * 127.5).astype(np.uint8)
    assert reader.read(as_bytes, orientation) == (3, None, 7)


def test_reading_many_is_reading_each(reader: DigitReader, scans: tuple[Scans, Scans]) -> None:
    rng = np.random.default_rng(2)
    prompts = [Prompt((5,)), Prompt((1, 2), "column"), Prompt((None, 9, 0))]
    images = [compose(p, scans[1], rng)[0] for p in prompts]
    orientations: list[Orientation] = [p.orientation for p in prompts]
    one_by_one = [reader.read(x, p.orientation) for x, p in zip(images, prompts, strict=True)]
    assert reader.read_many(images, orientations) == one_by_one
    assert [len(cells) for cells in one_by_one] == [1, 2, 3]
    assert reader.read_many([], []) == []


def test_split_maps_bytes_onto_the_scans_own_range() -> None:
    image = np.zeros((8, 16, 1), dtype=np.uint8)
    image[:, 8:] = 255
    first, second = split_cells(image, "row")
    assert (first == -1).all() and (second == 1).all()


@pytest.mark.parametrize("shape", [(8, 12), (16, 16), (8, 8, 3), (8,)])
def test_pictures_that_are_no_row_of_cells_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="expected grey cells of 8x8 pixels in one row"):
        split_cells(np.zeros(shape), "row")


def test_missing_reference_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"python -m data_pipeline.handwriting --out"):
        load_reference(tmp_path)


def test_damaged_reference_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reference.npz").write_bytes(b"not an archive")
    with pytest.raises(RequestError, match="not the scans of a handwriting data set"):
        load_reference(tmp_path)
    np.savez(tmp_path / "reference.npz", train_images=np.zeros((30, 8, 8)))
    whole = (tmp_path / "reference.npz").read_bytes()
    (tmp_path / "reference.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match="not the scans of a handwriting data set"):
        load_reference(tmp_path)
    np.savez(tmp_path / "reference.npz", train_images=np.zeros((3, 8, 8)))
    with pytest.raises(RequestError, match="not the scans"):
        load_reference(tmp_path)


def test_reference_comes_back_as_it_was_split(tmp_path: Path, scans: tuple[Scans, Scans]) -> None:
    train, held = scans
    np.savez(
        tmp_path / "reference.npz",
        train_images=train.images,
        train_labels=train.labels,
        held_images=held.images,
        held_labels=held.labels,
    )
    for read, wanted in zip(load_reference(tmp_path), scans, strict=True):
        np.testing.assert_array_equal(read.images, wanted.images)
        np.testing.assert_array_equal(read.labels, wanted.labels)
