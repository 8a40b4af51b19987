"""Encoded picture files to pixels of the stored size: what is handled, and what is refused by rule.

Every way in which a file can be unusable ends in `Refused` with one of the reasons below, so that a run
counts it and goes on. Handled: EXIF orientation, palettes, transparency (on white), CMYK, 16-bit grey,
embedded colour profiles (to sRGB), several frames (the first).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.resolution import Fit

MAX_PIXELS = 1 << 27
"""Pixels of the largest picture that is decoded (134 million, 11,585 squared): beyond it, a bomb."""

EMPTY = "empty file"
NOT_A_PICTURE = "not a picture"
BOMB = "more pixels than the limit"
TRUNCATED = "truncated picture"
DAMAGED = "damaged picture"
UNSUPPORTED = "pixel format without a rule"
ANIMATED = "several frames"

ORIENTATION_TAG = 0x0112

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
"""Of the pictures that telephones take, in the first bytes of the file."""


class Refused(Exception):
    """A source item that is left out by rule. `reason` is counted, `detail` is kept as an example."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, upright, in mode RGB, and what was done to get there."""

    image: Image.Image
    format: str
    """Pillow's name of the file's format."""
    rotated: bool = False
    """Whether EXIF turned or mirrored it."""
    notes: tuple[str, ...] = ()
    """What was handled: counted in the manifest."""

    @property
    def height(self) -> int:
        return self.image.height

    @property
    def width(self) -> int:
        return self.image.width


@contextmanager
def _reasons() -> Iterator[None]:
    """Turns whatever a decoder raises into `Refused`."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of bombs and of bad EXIF; both are counted here instead.
            warnings.simplefilter("ignore")
            yield
    except Refused:
        raise
    except Image.UnidentifiedImageError as error:
        raise Refused(NOT_A_PICTURE, "no known picture format") from error
    except Image.DecompressionBombError as error:
        raise Refused(BOMB, str(error)) from error
    except MemoryError as error:
        raise Refused(BOMB, "does not fit into memory") from error
    except Exception as error:
        # Decoders of untrusted bytes raise nearly anything (OSError, SyntaxError, struct.error, KeyError...).
        text = f"{type(error).__name__}: {error}"
        lower = text.lower()
        cut = isinstance(error, EOFError) or "truncated" in lower or "unexpected end" in lower
        raise Refused(TRUNCATED if cut else DAMAGED, text[:300]) from error


def open_picture(data: bytes, *, frames: str = "first", max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a picture file.

    Args:
        data: the file's bytes.
        frames: `first` takes the first frame of an animation, `refuse` refuses it.
        max_pixels: largest height x width, checked before any pixel is decoded.

    Raises:
        Refused: with the reason, whatever is wrong with the bytes.
    """
    if not data:
        raise Refused(EMPTY, "0 bytes")
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        raise Refused(NOT_A_PICTURE, "HEIC, which is not read here; convert it to JPEG or PNG")
    notes: list[str] = []
    with _reasons(), Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
        if width * height > max_pixels:
            raise Refused(BOMB, f"{height}x{width} pixels, allowed {max_pixels}")
        # A phone's JPEG with an embedded preview (MPO) has two frames but is one picture.
        if getattr(opened, "is_animated", False) and opened.format != "MPO":
            if frames == "refuse":
                raise Refused(ANIMATED, f"{opened.format} with {getattr(opened, 'n_frames', '?')} frames")
            notes.append("first of several frames")
            opened.seek(0)
        opened.load()
        file_format = opened.format or ""
        orientation = _orientation(opened, notes)
        profile = opened.info.get("icc_profile")
        image = _to_rgb(opened, profile, notes)
    rotated = orientation in _UPRIGHT
    if rotated:
        image = _UPRIGHT[orientation](image)
        notes.append("turned by EXIF")
    return Picture(image, file_format, rotated, tuple(notes))


_UPRIGHT: dict[Any, Any] = {
    2: ImageOps.mirror,
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: ImageOps.flip,
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_90),
}
"""EXIF orientation to the operation that makes the picture upright."""


def _orientation(opened: Image.Image, notes: list[str]) -> int | None:
    try:
        return opened.getexif().get(ORIENTATION_TAG)
    except Exception:
        # A picture with a broken EXIF block is still a picture; which way is up is then unknown.
        notes.append("unreadable EXIF")
        return None


def _to_rgb(image: Image.Image, profile: Any, notes: list[str]) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise Refused(UNSUPPORTED, f"mode {mode} with values {levels.min()} to {levels.max()}")
        notes.append("16-bit grey")
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
        return image.convert("RGB")
    if mode not in (
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
    ):
        raise Refused(UNSUPPORTED, f"mode {mode}")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _on_white(_to_srgb(image.convert("RGBA"), profile, notes), notes)
    if mode == "P":
        notes.append("palette")
        image = image.convert("RGB")
    if mode in ("CMYK", "LAB"):
        notes.append(mode)
        converted = _to_srgb(image, profile, notes)
        if converted.mode == "RGB":
            return converted
        if mode == "LAB":
            return _lab_to_rgb(image)
        return image.convert("RGB")
    return _to_srgb(image.convert("RGB"), profile, notes)


def _on_white(image: Image.Image, notes: list[str]) -> Image.Image:
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] != 255:
        notes.append("transparency on white")
    white = Image.new("RGB", image.size, "white")
    white.paste(image.convert("RGB"), mask=alpha)
    return white


def _to_srgb(image: Image.Image, profile: Any, notes: list[str]) -> Image.Image:
    """The picture in sRGB when it carries a profile of its own mode that says otherwise."""
    if not isinstance(profile, bytes) or not profile:
        return image
    try:
        embedded: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = embedded.profile.xcolor_space.strip()
        wanted = {"RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK", "LAB": "Lab"}.get(image.mode)
        if space != wanted or (
            space == "RGB" and "srgb" in str(embedded.profile.profile_description).lower()
        ):
            return image
        target = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, embedded, _srgb(), outputMode=target)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.append("unreadable colour profile")
        return image
    notes.append("colour profile to sRGB")
    return converted if converted is not None else image


@lru_cache(maxsize=1)
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    converted = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), _srgb(), outputMode="RGB")
    return converted if converted is not None else image


def apply_fit(image: Image.Image, fitted: Fit) -> Image.Image:
    """Resize (bicubic, with the low-pass filter that a reduction needs) and crop."""
    if image.size != (fitted.resize_width, fitted.resize_height):
        size = (fitted.resize_width, fitted.resize_height)
        image = image.resize(size, Image.Resampling.BICUBIC)
    if image.size == (fitted.width, fitted.height):
        return image
    return image.crop((fitted.left, fitted.top, fitted.left + fitted.width, fitted.top + fitted.height))


def to_pixels(image: Image.Image, channels: int) -> Tensor:
    """uint8 [channels, H, W] of an RGB picture; one channel is its luma.

    Raises:
        DataError: for another number of channels.
    """
    if channels not in (1, 3):
        raise DataError(f"pixels: expected 1 or 3 channels, received {channels}")
    array = np.array(image.convert("L") if channels == 1 else image)
    return torch.from_numpy(array.reshape(image.height, image.width, channels)).permute(2, 0, 1).contiguous()


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def to_png(image: Image.Image) -> bytes:
    """The picture as a PNG, losslessly, without any metadata."""
    out = io.BytesIO()
    # Level 1: photographs gain a few per cent from level 6 for three times the time.
    image.save(out, format="PNG", compress_level=1)
    return out.getvalue()
