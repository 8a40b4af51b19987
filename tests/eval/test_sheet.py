"""Contact sheets: every picture is there, at its place, enlarged pixel for pixel."""

from __future__ import annotations

import numpy as np
import pytest

from tim_ds.eval.sheet import SheetBlock, SheetRow, contact_sheet, gallery

RED = (0xD1, 0x49, 0x5B)


def picture(height: int, width: int, seed: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def find(sheet: np.ndarray, small: np.ndarray, scale: int) -> list[tuple[int, int]]:
    """Places (row, column) where the picture stands, enlarged without smoothing."""
    wanted = np.broadcast_to(small, (*small.shape[:2], 3)).repeat(scale, axis=0).repeat(scale, axis=1)
    h, w = wanted.shape[:2]
    corner = np.flatnonzero((sheet[: -h + 1, : -w + 1] == wanted[0, 0]).all(axis=-1))
    places = (divmod(int(i), sheet.shape[1] - w + 1) for i in corner)
    return [(y, x) for y, x in places if (sheet[y : y + h, x : x + w] == wanted).all()]


@pytest.fixture
def rows() -> list[SheetRow]:
    sizes = [(8, 8), (8, 32), (16, 8)]
    return [SheetRow(f"{n} steps", [picture(h, w, 10 * n + h + w) for h, w in sizes]) for n in (1, 4)]


def test_every_picture_is_shown_once_in_its_row_and_column(rows: list[SheetRow]) -> None:
    sheet = contact_sheet(["one", "a longer caption of several words", "three"], [SheetBlock("title", rows)])
    places = [[find(sheet, p, scale=4) for p in row.pictures] for row in rows]
    assert all(len(found) == 1 for row in places for found in row)
    centres = np.array(
        [
            [
                (y + 2 * p.shape[0], x + 2 * p.shape[1])
                for [(y, x)], p in zip(found, row.pictures, strict=True)
            ]
            for found, row in zip(places, rows, strict=True)
        ]
    )
    # Columns share their x, rows share their y, in the order given.
    assert (centres[0, :, 1] == centres[1, :, 1]).all() and (np.diff(centres[0, :, 1]) > 0).all()
    assert (np.ptp(centres[..., 0], axis=1) == 0).all() and centres[1, 0, 0] > centres[0, 0, 0]


def test_wrong_pictures_have_a_red_frame(rows: list[SheetRow]) -> None:
    captions = ["one", "two", "three"]
    plain = contact_sheet(captions, [SheetBlock("", rows)])
    marked_rows = [SheetRow(rows[0].label, rows[0].pictures, [False, True, False]), rows[1]]
    marked = contact_sheet(captions, [SheetBlock("", marked_rows)])
    assert not (plain == RED).all(axis=-1).any()
    red = np.asarray((marked == RED).all(axis=-1))
    [(y, x)] = find(marked, rows[0].pictures[1], scale=4)
    # The frame lies around the picture and nowhere else.
    assert red[y - 1, x : x + 128].all() and red[y + 32, x : x + 128].all()
    assert not red[y : y + 32, x : x + 128].any()
    assert red.sum() == red[y - 3 : y + 35, x - 3 : x + 131].sum() > 0


def test_blocks_stand_below_each_other(rows: list[SheetRow]) -> None:
    other = [SheetRow(row.label, [255 - p for p in row.pictures]) for row in rows]
    sheet = contact_sheet(
        ["a", "b", "c"], [SheetBlock("first", rows), SheetBlock("second", other)], footnote="note"
    )
    [(above, x)] = find(sheet, rows[1].pictures[0], scale=4)
    [(below, same_x)] = find(sheet, other[0].pictures[0], scale=4)
    assert above < below and x == same_x


def test_captions_and_labels_are_drawn(rows: list[SheetRow]) -> None:
    captions = ["one", "two", "three"]
    with_text = contact_sheet(captions, [SheetBlock("title", rows)])
    without_captions = contact_sheet([" ", " ", " "], [SheetBlock("title", rows)])
    assert with_text.shape[0] > without_captions.shape[0]
    ink = np.asarray((with_text < 128).all(axis=-1))
    [(y, x)] = find(with_text, rows[0].pictures[0], scale=4)
    assert ink[:, : x - 40].any(), "row labels"
    assert (with_text[:y, x:] != 255).any(), "captions above the first row"


def test_large_pictures_are_reduced() -> None:
    sheet = contact_sheet(["large"], [SheetBlock("", [SheetRow("1 step", [picture(1024, 512, 0, 3)])])])
    assert 384 < sheet.shape[0] < 600


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_gallery_shows_every_picture(count: int) -> None:
    pictures = [picture(16, 8, seed) for seed in range(count)]
    sheet = gallery(pictures, [f"caption {i}" for i in range(count)])
    places = [find(sheet, p, scale=8) for p in pictures]
    assert all(len(found) == 1 for found in places)
    flat = [found[0] for found in places]
    assert flat == sorted(flat), "reading order"


def test_long_words_do_not_break_a_sheet() -> None:
    sheet = gallery([picture(8, 8, 0)], ["x" * 400])
    assert len(find(sheet, picture(8, 8, 0), scale=16)) == 1
