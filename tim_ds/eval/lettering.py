"""Letters on pictures: a font that has them, or their codes, in lines that fit a width."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageFont

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

Font = ImageFont.FreeTypeFont

_CUT = " ..."


@lru_cache(maxsize=64)
def font(size_px: int, *, bold: bool = False, letters: str = "") -> Font:
    """DejaVu Sans, which matplotlib brings; for letters that it lacks, an installed font that has them."""
    own = _own_font(bold)
    missing = "".join(letter for letter in letters if not _has(own, letter))
    path = own if not missing else (_font_of_machine(missing) or own)
    return ImageFont.truetype(str(path), size_px)


def lettered(text: str, size_px: int, *, bold: bool = False) -> tuple[str, Font]:
    """`text` and the font to draw it in: letters that no font here has are written as their code."""
    letters = "".join(sorted({c for c in text if not c.isspace()}))
    chosen = font(size_px, bold=bold, letters=letters)
    path = Path(str(chosen.path))
    return "".join(c if c.isspace() or _has(path, c) else _code(c) for c in text), chosen


def wrap(text: str, chosen: Font, width_px: int, *, most: int | None = None) -> list[str]:
    """Lines no wider than `width_px`, broken at spaces, within a word only where it is wider alone.

    Args:
        most: lines beyond are cut, which three points at the end of the last one say.
    """
    lines: list[str] = []
    for word in text.split():
        if lines and chosen.getlength(f"{lines[-1]} {word}") <= width_px:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.extend(_pieces(word, chosen, width_px))
    if most is None or len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and chosen.getlength(last + _CUT) > width_px:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip() + _CUT]


def line_px(chosen: Font) -> int:
    """Height of a line."""
    return math.ceil(chosen.size * 1.3)


def text_px(text: str, chosen: Font) -> int:
    """Width of a text."""
    return math.ceil(chosen.getlength(text))


def _pieces(word: str, chosen: Font, width_px: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and chosen.getlength(pieces[-1] + letter) > width_px:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def _code(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def _own_font(bold: bool) -> Path:
    # Imported where a sheet is made: half a second that no other command should take.
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"


@lru_cache(maxsize=8)
def _face(path: Path) -> FT2Font:
    from matplotlib.ft2font import FT2Font

    return FT2Font(str(path))


def _has(path: Path, letter: str) -> bool:
    return _face(path).get_char_index(ord(letter)) != 0


@lru_cache(maxsize=256)
def _font_of_machine(letters: str) -> Path | None:
    """The first installed font, by name, that has all of `letters`."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    for entry in sorted(font_manager.fontManager.ttflist, key=lambda one: (one.name, one.fname)):
        if entry.name.startswith("Last Resort"):
            # Has every letter, and draws the name of its script.
            continue
        try:
            face = FT2Font(entry.fname)
        except (OSError, RuntimeError):
            continue
        if all(face.get_char_index(ord(letter)) for letter in letters):
            return Path(entry.fname)
    return None
