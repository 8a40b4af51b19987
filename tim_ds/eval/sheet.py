"""Contact sheets: sampled pictures side by side with their captions, large enough to be looked at.

Small pictures are enlarged by a whole factor without smoothing, so that every pixel shows; large ones are
reduced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tim_ds.eval.lettering import font, lettered, line_px, text_px, wrap

Picture = NDArray[np.uint8]
"""uint8 [H, W, C], C = 1 or 3."""

_PAPER, _INK, _GREY, _RULE, _WRONG = "#ffffff", "#1c1c1c", "#6b6b6b", "#c9c9c9", "#d1495b"
_GAP_PX = 14
_MARGIN_PX = 20
_FONT_PX = 15
_NOTE_PX = 13
_TITLE_PX = 18
_NARROWEST_COLUMN_PX = 120
_MOST_LINES = 6
"""Of a caption: prompts may be pages."""
_LARGEST_PICTURE_PX = 384
_TARGET_PICTURE_PX = 192
"""Longest side that small pictures are enlarged to, about."""
_LARGEST_OF_GALLERY = ((1, 1024), (4, 768), (12, 512))
"""(up to so many pictures, longest side); of more pictures `_LARGEST_PICTURE_PX`."""
_SMALLEST_OF_GALLERY_PX = 128
"""Longest side that the smallest picture of a gallery is enlarged to, where the largest leaves room."""


@dataclass(frozen=True, eq=False)
class SheetRow:
    """One row: a picture for each column."""

    label: str
    pictures: Sequence[Picture]
    wrong: Sequence[bool] | None = None
    """Pictures to be marked by a red frame."""


@dataclass(frozen=True, eq=False)
class SheetBlock:
    """Rows under one title."""

    title: str
    rows: Sequence[SheetRow]


@dataclass(frozen=True, eq=False)
class Section:
    """Pictures of a gallery under one title, with a caption each and perhaps a note below it."""

    title: str
    pictures: Sequence[Picture]
    captions: Sequence[str]
    notes: Sequence[str] | None = None


def contact_sheet(captions: Sequence[str], blocks: Sequence[SheetBlock], *, footnote: str = "") -> Picture:
    """A sheet with one column a caption and one row a setting: uint8 [H, W, 3].

    All pictures of the sheet share one scale; columns are as wide as their pictures and captions need.
    """
    everything = [picture for block in blocks for row in block.rows for picture in row.pictures]
    scale = _scale(everything)
    widths = [
        max(
            _NARROWEST_COLUMN_PX,
            *(_scaled(row.pictures[c], scale)[1] for block in blocks for row in block.rows),
        )
        for c in range(len(captions))
    ]
    label_font = font(_FONT_PX)
    label_px = max((text_px(row.label, label_font) for block in blocks for row in block.rows), default=0)
    left = _MARGIN_PX + label_px + _GAP_PX
    width = left + sum(widths) + _GAP_PX * (len(widths) - 1) + _MARGIN_PX
    inner_px = width - 2 * _MARGIN_PX

    heads = [_Text(caption, w, most=_MOST_LINES) for caption, w in zip(captions, widths, strict=True)]
    caption_px = max((head.height_px for head in heads), default=0) + _GAP_PX // 2
    titles = [_Text(block.title, inner_px, size_px=_TITLE_PX, bold=True) for block in blocks]
    heights = [
        [max(_scaled(p, scale)[0] for p in row.pictures) + _GAP_PX for row in block.rows] for block in blocks
    ]
    note = _Text(footnote, inner_px)
    height = (
        2 * _MARGIN_PX
        + caption_px
        + sum(title.block_px for title in titles)
        + sum(map(sum, heights))
        + note.height_px
    )

    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    starts = [left + sum(widths[:c]) + _GAP_PX * c for c in range(len(widths))]
    y = _MARGIN_PX
    for x, w, head in zip(starts, widths, heads, strict=True):
        head.draw(draw, x + w // 2, y + caption_px - _GAP_PX // 2 - head.height_px, centred=True)
    y += caption_px
    for block, title, row_heights in zip(blocks, titles, heights, strict=True):
        y = _draw_title(draw, title, _MARGIN_PX, y, inner_px)
        for row, row_height in zip(block.rows, row_heights, strict=True):
            middle = y + (row_height - _GAP_PX) // 2
            draw.text((left - _GAP_PX, middle), row.label, font=label_font, fill=_INK, anchor="rm")
            for c, (x, w) in enumerate(zip(starts, widths, strict=True)):
                h, picture_width = _scaled(row.pictures[c], scale)
                is_wrong = row.wrong is not None and bool(row.wrong[c])
                place = (x + (w - picture_width) // 2, middle - h // 2)
                _paste(sheet, draw, row.pictures[c], scale, place, is_wrong)
            y += row_height
    note.draw(draw, _MARGIN_PX, y)
    return np.asarray(sheet)


def gallery(sections: Sequence[Section], *, footnote: str = "") -> Picture:
    """Pictures in reading order, each above its caption, about as wide as high: uint8 [H, W, 3].

    Pictures that fit are enlarged by one factor; those that do not are each reduced to the longest side that
    fits, so that a small one beside a large one is not lost: where sizes differ, a note should name them.
    Sections stand side by side where there is room.
    """
    everything = [picture for section in sections for picture in section.pictures]
    cells = [
        [
            _Cell(section, i, _scale_in_gallery(picture, everything))
            for i, picture in enumerate(section.pictures)
        ]
        for section in sections
    ]
    area = sum((cell.width_px + _GAP_PX) * (cell.height_px + 2 * _GAP_PX) for row in cells for cell in row)
    # A little more than the root: lines are rarely full.
    width_px = max(round(1.15 * math.sqrt(area)), *(cell.width_px for row in cells for cell in row))
    blocks = [_Block(s.title, _lines(row, width_px)) for s, row in zip(sections, cells, strict=True)]
    lines = _lines(blocks, width_px)
    inner_px = max(sum(one.width_px + _GAP_PX for one in line) - _GAP_PX for line in lines)
    note = _Text(footnote, inner_px)
    heights = [max(block.height_px for block in line) for line in lines]
    size = inner_px + 2 * _MARGIN_PX, sum(heights) + note.height_px + 2 * _MARGIN_PX
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = _MARGIN_PX
    for line, height in zip(lines, heights, strict=True):
        x = _MARGIN_PX
        for block in line:
            block.draw(sheet, draw, x, y)
            x += block.width_px + _GAP_PX
        y += height
    note.draw(draw, _MARGIN_PX, y)
    return np.asarray(sheet)


class _Text:
    """A text set in a width: measured first, drawn later."""

    def __init__(
        self,
        text: str,
        width_px: int,
        *,
        size_px: int = _FONT_PX,
        bold: bool = False,
        most: int | None = None,
    ) -> None:
        text, self.font = lettered(text, size_px, bold=bold)
        self.lines = wrap(text, self.font, width_px, most=most)

    @property
    def height_px(self) -> int:
        return len(self.lines) * line_px(self.font)

    @property
    def block_px(self) -> int:
        """As a title, with its rule and the room around it; nothing without words."""
        return self.height_px + _GAP_PX if self.lines else 0

    def draw(
        self, draw: ImageDraw.ImageDraw, x: int, y: int, *, fill: str = _GREY, centred: bool = False
    ) -> None:
        for n, line in enumerate(self.lines):
            place = (x, y + n * line_px(self.font))
            draw.text(place, line, font=self.font, fill=fill, anchor="ma" if centred else "la")


class _Cell:
    """One picture of a gallery with its caption and note."""

    def __init__(self, section: Section, i: int, scale: float) -> None:
        self._picture, self._scale = section.pictures[i], scale
        self.picture_px, self._shown_width = _scaled(self._picture, scale)
        self.width_px = max(_NARROWEST_COLUMN_PX, self._shown_width)
        self._caption = _Text(section.captions[i], self.width_px, most=_MOST_LINES)
        note = "" if section.notes is None else section.notes[i]
        self._note = _Text(note, self.width_px, size_px=_NOTE_PX, most=2)

    @property
    def text_px(self) -> int:
        return _GAP_PX // 2 + self._caption.height_px + self._note.height_px

    @property
    def height_px(self) -> int:
        return self.picture_px + self.text_px

    def draw(self, sheet: Image.Image, draw: ImageDraw.ImageDraw, x: int, bottom: int) -> None:
        """The picture stands on `bottom`, where its caption begins."""
        place = (x + (self.width_px - self._shown_width) // 2, bottom - self.picture_px)
        _paste(sheet, draw, self._picture, self._scale, place, False)
        middle, y = x + self.width_px // 2, bottom + _GAP_PX // 2
        self._caption.draw(draw, middle, y, fill=_INK, centred=True)
        self._note.draw(draw, middle, y + self._caption.height_px, centred=True)


class _Block:
    """A section of a gallery: its title above lines of pictures."""

    def __init__(self, title: str, lines: Sequence[Sequence[_Cell]]) -> None:
        self._cells = lines
        self.width_px = max(sum(cell.width_px + _GAP_PX for cell in line) - _GAP_PX for line in lines)
        self._title = _Text(title, self.width_px, size_px=_TITLE_PX, bold=True)
        self._bands = [max(c.picture_px for c in line) for line in lines]
        self._texts = [max(c.text_px for c in line) + 2 * _GAP_PX for line in lines]

    @property
    def height_px(self) -> int:
        return self._title.block_px + sum(self._bands) + sum(self._texts)

    def draw(self, sheet: Image.Image, draw: ImageDraw.ImageDraw, left: int, y: int) -> None:
        y = _draw_title(draw, self._title, left, y, self.width_px)
        for line, band, text in zip(self._cells, self._bands, self._texts, strict=True):
            x = left
            for cell in line:
                cell.draw(sheet, draw, x, y + band)
                x += cell.width_px + _GAP_PX
            y += band + text


class _Wide(Protocol):
    width_px: int


W = TypeVar("W", bound=_Wide)


def _lines(parts: Sequence[W], width_px: int) -> list[list[W]]:
    """Parts side by side in lines no wider than `width_px`."""
    lines: list[list[W]] = []
    used = 0
    for part in parts:
        if not lines or used + part.width_px > width_px:
            lines.append([])
            used = 0
        lines[-1].append(part)
        used += part.width_px + _GAP_PX
    return lines


def largest_px(count: int) -> int:
    """Longest side that a gallery of so many pictures shows."""
    return next((px for most, px in _LARGEST_OF_GALLERY if count <= most), _LARGEST_PICTURE_PX)


def read_reduced(path: Path, longest_px: int) -> Picture:
    """A picture of a file, reduced to a longest side: many large ones would not fit into memory."""
    with Image.open(path) as image:
        image = image if image.mode == "L" else image.convert("RGB")
        factor = longest_px / max(image.size)
        if factor < 1:
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _scale(pictures: Sequence[Picture]) -> float:
    """One factor for all pictures: whole when it enlarges."""
    longest = max(max(p.shape[:2]) for p in pictures)
    if longest > _LARGEST_PICTURE_PX:
        return _LARGEST_PICTURE_PX / longest
    return max(1, round(_TARGET_PICTURE_PX / longest))


def _scale_in_gallery(picture: Picture, pictures: Sequence[Picture]) -> float:
    """The factor of one picture among all of a gallery."""
    sides = [max(p.shape[:2]) for p in pictures]
    limit = largest_px(len(sides))
    if max(sides) > limit:
        return min(1.0, limit / max(picture.shape[:2]))
    return max(1, min(limit // max(sides), round(_SMALLEST_OF_GALLERY_PX / min(sides))))


def _scaled(picture: Picture, scale: float) -> tuple[int, int]:
    """(height, width) in pixels of the sheet."""
    return max(1, round(picture.shape[0] * scale)), max(1, round(picture.shape[1] * scale))


def _draw_title(draw: ImageDraw.ImageDraw, title: _Text, x: int, y: int, width_px: int) -> int:
    """The title below a rule as wide as what it stands over; returns where its pictures begin."""
    if title.lines:
        draw.line([(x, y), (x + width_px, y)], fill=_RULE)
        title.draw(draw, x, y + _GAP_PX // 2, fill=_INK)
    return y + title.block_px


def _paste(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    picture: Picture,
    scale: float,
    place: tuple[int, int],
    is_wrong: bool,
) -> None:
    height, width = _scaled(picture, scale)
    image = Image.fromarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
    sampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    sheet.paste(image.resize((width, height), sampling), place)
    if is_wrong:
        x, y = place
        draw.rectangle((x - 3, y - 3, x + width + 2, y + height + 2), outline=_WRONG, width=3)
