"""Contact sheets: sampled pictures side by side with their captions, large enough to be looked at.

Small pictures are enlarged by a whole factor without smoothing, so that every pixel shows; large ones are
reduced.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
"""uint8 [H, W, C], C = 1 or 3."""

_PAPER, _INK, _GREY, _RULE, _WRONG = "#ffffff", "#1c1c1c", "#6b6b6b", "#c9c9c9", "#d1495b"
_GAP_PX = 14
_MARGIN_PX = 20
_FONT_PX = 15
_TITLE_PX = 19
_NARROWEST_COLUMN_PX = 104
_LARGEST_PICTURE_PX = 384
_TARGET_PICTURE_PX = 128
"""Longest side that small pictures are enlarged to, about."""


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


def contact_sheet(captions: Sequence[str], blocks: Sequence[SheetBlock], *, footnote: str = "") -> Picture:
    """A sheet with one column a caption and one row a setting: uint8 [H, W, 3].

    All pictures of the sheet share one scale; columns are as wide as their pictures and captions need.
    """
    everything = [picture for block in blocks for row in block.rows for picture in row.pictures]
    scale = _scale(everything)
    font, bold = _font(_FONT_PX), _font(_TITLE_PX)
    widths = [
        max(
            _NARROWEST_COLUMN_PX,
            *(_scaled(row.pictures[c], scale)[1] for block in blocks for row in block.rows),
        )
        for c in range(len(captions))
    ]
    wrapped = [_wrap(caption, font, width) for caption, width in zip(captions, widths, strict=True)]
    label_px = max((_text_px(row.label, font) for block in blocks for row in block.rows), default=0) + _GAP_PX
    caption_px = max((len(lines) for lines in wrapped), default=0) * _line_px(font) + _GAP_PX // 2
    heights = [
        [max(_scaled(p, scale)[0] for p in row.pictures) + _GAP_PX for row in block.rows] for block in blocks
    ]
    titles_px = [(_line_px(bold) + _GAP_PX) if block.title else 0 for block in blocks]
    left = _MARGIN_PX + label_px
    width = left + sum(widths) + _GAP_PX * (len(widths) - 1) + _MARGIN_PX
    notes = _wrap(footnote, font, width - 2 * _MARGIN_PX) if footnote else []
    height = (
        2 * _MARGIN_PX + caption_px + sum(titles_px) + sum(map(sum, heights)) + len(notes) * _line_px(font)
    )

    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    starts = [left + sum(widths[:c]) + _GAP_PX * c for c in range(len(widths))]
    y = _MARGIN_PX
    for x, w, lines in zip(starts, widths, wrapped, strict=True):
        top = y + caption_px - _GAP_PX // 2 - len(lines) * _line_px(font)
        _draw_centred(draw, lines, font, x, top, w)
    y += caption_px
    for block, title_px, row_heights in zip(blocks, titles_px, heights, strict=True):
        if block.title:
            draw.line([(_MARGIN_PX, y), (width - _MARGIN_PX, y)], fill=_RULE)
            draw.text((_MARGIN_PX, y + _GAP_PX // 2), block.title, font=bold, fill=_INK)
            y += title_px
        for row, row_height in zip(block.rows, row_heights, strict=True):
            middle = y + (row_height - _GAP_PX) // 2
            draw.text((left - _GAP_PX, middle), row.label, font=font, fill=_INK, anchor="rm")
            for c, (x, w) in enumerate(zip(starts, widths, strict=True)):
                h, picture_width = _scaled(row.pictures[c], scale)
                is_wrong = row.wrong is not None and bool(row.wrong[c])
                _paste(
                    sheet,
                    draw,
                    row.pictures[c],
                    scale,
                    x + (w - picture_width) // 2,
                    middle - h // 2,
                    is_wrong,
                )
            y += row_height
    _draw_left(draw, notes, font, _MARGIN_PX, y)
    return np.asarray(sheet)


def gallery(pictures: Sequence[Picture], captions: Sequence[str]) -> Picture:
    """Pictures in reading order, each above its caption, about as wide as high: uint8 [H, W, 3]."""
    scale = _scale(pictures)
    font = _font(_FONT_PX)
    cell_width = max(_NARROWEST_COLUMN_PX, *(_scaled(p, scale)[1] for p in pictures))
    wrapped = [_wrap(caption, font, cell_width) for caption in captions]
    picture_px = max(_scaled(p, scale)[0] for p in pictures)
    cell_height = picture_px + _GAP_PX // 2 + max(map(len, wrapped)) * _line_px(font)
    columns = max(1, min(len(pictures), round(math.sqrt(len(pictures) * cell_height / cell_width))))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new(
        "RGB",
        (
            2 * _MARGIN_PX + columns * (cell_width + _GAP_PX) - _GAP_PX,
            2 * _MARGIN_PX + rows * (cell_height + _GAP_PX) - _GAP_PX,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x = _MARGIN_PX + (i % columns) * (cell_width + _GAP_PX)
        y = _MARGIN_PX + (i // columns) * (cell_height + _GAP_PX)
        h, w = _scaled(picture, scale)
        _paste(sheet, draw, picture, scale, x + (cell_width - w) // 2, y + (picture_px - h) // 2, False)
        _draw_centred(draw, lines, font, x, y + picture_px + _GAP_PX // 2, cell_width)
    return np.asarray(sheet)


def _scale(pictures: Sequence[Picture]) -> float:
    """One factor for all pictures: whole when it enlarges."""
    longest = max(max(p.shape[:2]) for p in pictures)
    if longest > _LARGEST_PICTURE_PX:
        return _LARGEST_PICTURE_PX / longest
    return max(1, round(_TARGET_PICTURE_PX / longest))


def _scaled(picture: Picture, scale: float) -> tuple[int, int]:
    """(height, width) in pixels of the sheet."""
    return max(1, round(picture.shape[0] * scale)), max(1, round(picture.shape[1] * scale))


def _paste(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    picture: Picture,
    scale: float,
    x: int,
    y: int,
    is_wrong: bool,
) -> None:
    height, width = _scaled(picture, scale)
    image = Image.fromarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
    sampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    sheet.paste(image.resize((width, height), sampling), (x, y))
    if is_wrong:
        draw.rectangle((x - 3, y - 3, x + width + 2, y + height + 2), outline=_WRONG, width=3)


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what Pillow gives whenever a size is asked for
    return font


def _line_px(font: ImageFont.FreeTypeFont) -> int:
    return math.ceil(font.size * 1.3)


def _text_px(text: str, font: ImageFont.FreeTypeFont) -> int:
    return math.ceil(font.getlength(text))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width`, broken at spaces; a single word may stick out."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines


def _draw_centred(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], font: ImageFont.FreeTypeFont, x: int, y: int, width: int
) -> None:
    for n, line in enumerate(lines):
        draw.text((x + width // 2, y + n * _line_px(font)), line, font=font, fill=_GREY, anchor="ma")


def _draw_left(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], font: ImageFont.FreeTypeFont, x: int, y: int
) -> None:
    for n, line in enumerate(lines):
        draw.text((x, y + n * _line_px(font)), line, font=font, fill=_GREY)
