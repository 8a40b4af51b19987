"""Picture files of every odd kind, made from one known picture."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms

HEIGHT, WIDTH = 40, 56


def scene(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [H, W, 3]: a smooth picture whose corners all differ."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * x // (width - 1)
    green = 255 * y // (height - 1)
    return np.stack([red, green, 255 - red // 2 - green // 2], axis=-1).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def plain() -> Image.Image:
    return Image.fromarray(scene())


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(plain(), "PNG", exif=exif)


def transparent() -> Image.Image:
    image = plain().convert("RGBA")
    alpha = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    alpha[:, : WIDTH // 2] = 0
    image.putalpha(Image.fromarray(alpha))
    return image


def grey16() -> bytes:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return encode(Image.fromarray((257 * (x + y)).astype(np.uint16)), "PNG")


def animated(kind: str) -> bytes:
    frames = [plain(), Image.new("RGB", (WIDTH, HEIGHT), "red")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def bomb() -> bytes:
    """A PNG of a few bytes whose header promises 40,000 x 40,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def profiled() -> bytes:
    """A picture that carries the sRGB profile."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return encode(plain(), "PNG", icc_profile=profile)


def handled() -> dict[str, bytes]:
    """Name to file: all of these become pictures."""
    rgb = plain()
    return {
        "jpeg": encode(rgb, "JPEG", quality=95),
        "png": encode(rgb, "PNG"),
        "webp": encode(rgb, "WEBP", lossless=True),
        "bmp": encode(rgb, "BMP"),
        "tiff": encode(rgb, "TIFF"),
        "grey": encode(rgb.convert("L"), "PNG"),
        "one_bit": encode(rgb.convert("1"), "PNG"),
        "palette": encode(rgb.quantize(64), "PNG"),
        "palette_transparent": encode(rgb.quantize(64), "PNG", transparency=0),
        "alpha": encode(transparent(), "PNG"),
        "grey_alpha": encode(transparent().convert("LA"), "PNG"),
        "cmyk": encode(rgb.convert("CMYK"), "JPEG", quality=95),
        "lab": encode(Image.new("LAB", (WIDTH, HEIGHT), (128, 128, 128)), "TIFF"),
        "grey16": grey16(),
        "gif": animated("GIF"),
        "apng": animated("PNG"),
        "animated_webp": animated("WEBP"),
        "exif": turned(6),
        "profile": profiled(),
        "broken_profile": encode(rgb, "PNG", icc_profile=b"no profile at all"),
        "broken_exif": encode(rgb, "JPEG", exif=b"Exif\x00\x00garbage that is no directory"),
    }


def refused() -> dict[str, bytes]:
    """Name to file: each of these is to be refused."""
    jpeg, png = encode(plain(), "JPEG"), encode(plain(), "PNG")
    return {
        "empty": b"",
        "text": b"this is no picture",
        "html": b"<html><body>404</body></html>",
        "bomb": bomb(),
        "cut_jpeg": jpeg[: len(jpeg) // 2],
        "cut_png": png[: len(png) // 2],
        "only_header": png[:24],
        "float": encode(Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)), "TIFF"),
    }
