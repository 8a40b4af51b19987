"""Contact sheets: every picture is there, at its place, enlarged pixel for pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tim_ds.eval import lettering
from tim_ds.eval.lettering import lettered, text_px, wrap
from tim_ds.eval.sheet import (
    Section,
    SheetBlock,
    SheetRow,
    contact_sheet,
    gallery,
    largest_px,
    read_reduced,
)

RED = (0xD1, 0x49, 0x5B)


def picture(height: int, width: int, seed: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def find(sheet: np.ndarray, small: np.ndarray, scale: int) -> list[tuple[int, int]]:
    """Places (row, column) where the picture stands, enlarged without smoothing."""
    wanted = np.broadcast_to(small, (*small.shape[:2], 3)).repeat(scale, axis=0).repeat(scale, axis=1)
    h, w = wanted.shape[:2]
    inner = sheet.shape[0] - h + 1, sheet.shape[1] - w + 1
    fits = np.ones(inner, bool)
    # Some of its pixels first, everywhere at once.
    for dy, dx in np.random.default_rng(0).integers(0, (h, w), (24, 2)):
        fits &= sheet[dy : dy + inner[0], dx : dx + inner[1], 0] == wanted[dy, dx, 0]
    places = [(int(y), int(x)) for y, x in zip(*np.nonzero(fits), strict=True)]
    return [(y, x) for y, x in places if (sheet[y : y + h, x : x + w] == wanted).all()]


@pytest.fixture
def rows() -> list[SheetRow]:
    sizes = [(8, 8), (8, 32), (16, 8)]
    return [SheetRow(f"{n} steps", [picture(h, w, 10 * n + h + w) for h, w in sizes]) for n in (1, 4)]


def test_every_picture_is_shown_once_in_its_row_and_column(rows: list[SheetRow]) -> None:
    sheet = contact_sheet(["one", "a longer caption of several words", "three"], [SheetBlock("title", rows)])
    places = [[find(sheet, p, scale=6) for p in row.pictures] for row in rows]
    assert all(len(found) == 1 for row in places for found in row)
    centres = np.array(
        [
            [
                (y + 3 * p.shape[0], x + 3 * p.shape[1])
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
    [(y, x)] = find(marked, rows[0].pictures[1], scale=6)
    # The frame lies around the picture and nowhere else.
    assert red[y - 1, x : x + 192].all() and red[y + 48, x : x + 192].all()
    assert not red[y : y + 48, x : x + 192].any()
    assert red.sum() == red[y - 3 : y + 51, x - 3 : x + 195].sum() > 0


def test_blocks_stand_below_each_other(rows: list[SheetRow]) -> None:
    other = [SheetRow(row.label, [255 - p for p in row.pictures]) for row in rows]
    sheet = contact_sheet(
        ["a", "b", "c"], [SheetBlock("first", rows), SheetBlock("second", other)], footnote="note"
    )
    [(above, x)] = find(sheet, rows[1].pictures[0], scale=6)
    [(below, same_x)] = find(sheet, other[0].pictures[0], scale=6)
    assert above < below and x == same_x


def test_captions_and_labels_are_drawn(rows: list[SheetRow]) -> None:
    captions = ["one", "two", "three"]
    with_text = contact_sheet(captions, [SheetBlock("title", rows)])
    without_captions = contact_sheet([" ", " ", " "], [SheetBlock("title", rows)])
    assert with_text.shape[0] > without_captions.shape[0]
    ink = np.asarray((with_text < 128).all(axis=-1))
    [(y, x)] = find(with_text, rows[0].pictures[0], scale=6)
    assert ink[:, : x - 40].any(), "row labels"
    assert (with_text[:y, x:] != 255).any(), "captions above the first row"


def test_large_pictures_are_reduced() -> None:
    sheet = contact_sheet(["large"], [SheetBlock("", [SheetRow("1 step", [picture(1024, 512, 0, 3)])])])
    assert 384 < sheet.shape[0] < 600


def test_a_long_title_and_a_page_of_a_caption_stay_on_the_sheet() -> None:
    row = SheetRow("1 step", [picture(8, 8, 0)])
    short = contact_sheet(["a"], [SheetBlock("title", [row])])
    title, caption = "a title of many words that no column is as wide as", "word " * 400
    sheet = contact_sheet([caption], [SheetBlock(title, [row])])
    # The margin stays white, and a caption takes six lines at most.
    assert (sheet[:, -15:] == 255).all() and sheet.shape[1] == short.shape[1]
    assert sheet.shape[0] - short.shape[0] < 250


class TestGallery:
    @pytest.mark.parametrize("count", [1, 2, 7])
    def test_every_picture_is_shown(self, count: int) -> None:
        pictures = [picture(16, 8, seed) for seed in range(count)]
        sheet = gallery([Section("", pictures, [f"caption {i}" for i in range(count)])])
        places = [find(sheet, p, scale=8) for p in pictures]
        assert all(len(found) == 1 for found in places)
        flat = [found[0] for found in places]
        assert flat == sorted(flat), "reading order"

    def test_small_pictures_of_all_sizes_share_a_factor_and_a_line_its_floor(self) -> None:
        sizes = [(24, 8), (8, 8), (8, 24)]
        pictures = [picture(h, w, n) for n, (h, w) in enumerate(sizes)]
        sheet = gallery([Section("", pictures, ["a", "b", "c"], ["24x8", "8x8", "8x24"])])
        # 128 pixels for the smallest, with which the largest stays within its limit.
        places = [find(sheet, p, scale=16) for p in pictures]
        assert [len(found) for found in places] == [1, 1, 1]
        floors = [y + 16 * h for [(y, _)], (h, _) in zip(places, sizes, strict=True)]
        assert floors[0] == floors[1] < floors[2]

    def test_one_large_picture_is_not_lost_and_does_not_hide_a_small_one(self) -> None:
        small = picture(96, 96, 1, 3)
        alone = gallery([Section("", [picture(2048, 2048, 0, 3)], ["large"])])
        assert 1024 < alone.shape[1] < 1100
        both = gallery([Section("", [picture(2048, 2048, 0, 3), small], ["large", "small"])])
        assert both.shape[1] > 768 and len(find(both, small, scale=1)) == 1

    def test_sections_have_titles_and_stand_side_by_side_where_there_is_room(self) -> None:
        sections = [Section(f"{n}", [picture(8, 8, n), picture(8, 8, 10 + n)], ["a", "b"]) for n in range(6)]
        sheet = gallery(sections, footnote="note")
        places = [find(sheet, section.pictures[0], scale=16)[0] for section in sections]
        assert places == sorted(places) and len({y for y, _ in places}) < 6
        untitled = gallery([Section("", s.pictures, s.captions) for s in sections], footnote="note")
        assert sheet.shape[0] > untitled.shape[0]

    def test_large_files_are_reduced_while_they_are_read(self, tmp_path: Path) -> None:
        for channels in (1, 3):
            pixels = picture(600, 300, 0, channels)
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(tmp_path / "a.png")
            assert read_reduced(tmp_path / "a.png", 200).shape == (200, 100, channels)
            np.testing.assert_array_equal(read_reduced(tmp_path / "a.png", 600), pixels)
        assert largest_px(1) > largest_px(4) > largest_px(12) > largest_px(64)


class TestLettering:
    def test_lines_fit_whatever_the_words(self) -> None:
        _, font = lettered("a", 15)
        for text in ("some words and a " + "x" * 400, "日" * 60, "a", ""):
            lines = wrap(text, font, 120)
            assert all(text_px(line, font) <= 120 for line in lines)
            assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        cut = wrap("word " * 50, font, 120, most=3)
        assert len(cut) == 3 and cut[-1].endswith(" ...") and text_px(cut[-1], font) <= 120

    def test_letters_are_drawn_or_written_as_their_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert lettered("naïve, ключ", 15)[0] == "naïve, ключ"
        monkeypatch.setattr(lettering, "_font_of_machine", lambda letters: None)
        lettering.font.cache_clear()
        assert lettered("a 日\N{RIGHT-TO-LEFT OVERRIDE}b", 15)[0].startswith("a \\u65e5")

    def test_a_font_of_the_machine_helps_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def serif(letters: str) -> Path:
            asked.append(letters)
            return lettering._own_font(False).with_name("DejaVuSerif.ttf")

        monkeypatch.setattr(lettering, "_font_of_machine", serif)
        lettering.font.cache_clear()
        text, font = lettered("a 日", 15)
        assert asked == ["日"] and "Serif" in str(font.path) and text == "a \\u65e5"

    def test_the_font_that_draws_the_names_of_scripts_is_not_taken(self) -> None:
        found = lettering._font_of_machine("a日")
        assert found is None or "LastResort" not in found.name
