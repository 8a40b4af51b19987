"""One item of a source, and how its parts are read: rows, captions, labels, files beside a picture."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.pictures import Refused

PICTURE_ENDINGS = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jp2", "jfif", "mpo",
    "ppm",
)  # fmt: skip
"""Endings that count as pictures; what the bytes are is found by looking at them."""

PATH_KEYS = ("path", "image", "image_file", "image_path", "file_name", "file")
CAPTION_KEYS = ("captions", "caption", "text", "prompt")
LABEL_KEYS = ("label", "class", "cls")

MISSING = "file missing"
UNREADABLE = "file cannot be read"
ESCAPES = "path leaves the source"
NO_PICTURE = "no picture"
BAD_ROW = "unreadable row"
BAD_CAPTION = "caption is not UTF-8"
BAD_SIDECAR = "unreadable json"
BAD_LATENT = "unreadable latent"
BAD_LABEL = "no class label"
BAD_BUCKET = "unreadable bucket"


@dataclass(frozen=True, eq=False)
class Item:
    """One source item as it was found, nothing decoded but its latent.

    Shapes:
        latent, flipped: [C, h, w] (tim_latents), the picture and its mirror image.
    """

    source: str
    """Stable name within the source: a relative path, shard:key, or list:line."""
    picture: bytes | None = None
    captions: tuple[str, ...] = ()
    label: int | None = None
    class_name: str | None = None
    """Label by name, to be looked up in the source's `classes`."""
    bucket: tuple[int, int] | None = None
    """(height, width) that the source prescribes."""
    latent: Tensor | None = None
    flipped: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Further columns, as `--keep` names them."""


def row_item(where: str, row: dict[str, Any], root: Path, keep: tuple[str, ...]) -> Item:
    found = next((row[key] for key in PATH_KEYS if isinstance(row.get(key), (str, bytes, dict))), None)
    # A picture of Hugging Face's `datasets` is {bytes, path}, either of which may be missing.
    name, picture = (found.get("path"), found.get("bytes")) if isinstance(found, dict) else (found, None)
    if isinstance(name, bytes):
        name, picture = "", name
    if not isinstance(picture, bytes):
        if not isinstance(name, str):
            raise Refused(
                BAD_ROW, f"{where}: expected a path or a picture under one of {', '.join(PATH_KEYS)}"
            )
        picture = _read_inside(root, name)
    number, class_name = label_of(row, where)
    return Item(
        f"{where} {name or ''}"[:500].rstrip().encode(errors="backslashreplace").decode(),
        picture,
        captions=captions_of(row, where),
        label=number,
        class_name=class_name,
        extra=_extra(row, keep),
    )


def with_sidecars(
    source: str,
    picture: bytes | None,
    text: bytes | None,
    sidecar: bytes | None,
    keep: tuple[str, ...],
    class_name: str | None = None,
    label: bytes | None = None,
) -> Item:
    """An item of a picture and the files that share its stem; a json's captions go before the text file's."""
    row = json_object(sidecar, source, BAD_SIDECAR) if sidecar is not None else {}
    captions = captions_of(row, source)
    if not captions and text is not None:
        captions = (decode_caption(text, source),)
    number, name = label_of(row, source)
    if label is not None:
        number, name = label_of({"label": label.decode("ascii", errors="replace").strip()}, source)
    if number is None and name is None:
        name = class_name
    return Item(source, picture, captions=captions, label=number, class_name=name, extra=_extra(row, keep))


def json_object(data: bytes, where: str, reason: str) -> dict[str, Any]:
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(reason, f"{where}: {error}") from error
    if not isinstance(row, dict):
        raise Refused(reason, f"{where}: expected an object, received {type(row).__name__}")
    return row


def decode_caption(data: bytes, where: str) -> str:
    """Text of a caption file.

    Raises:
        Refused: if it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(BAD_CAPTION, f"{where}: {error}") from error


def captions_of(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The captions of a row: a string or a list of strings under one of `CAPTION_KEYS`.

    Raises:
        Refused: if the value is neither.
    """
    for key in CAPTION_KEYS:
        value = row.get(key)
        if value is None:
            continue
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
            raise Refused(BAD_ROW, f"{where}: {key} is neither a string nor a list of strings")
        return tuple(values)
    return ()


def label_of(row: dict[str, Any], where: str) -> tuple[int | None, str | None]:
    """(number, name) of a row's label: at most one is set.

    Raises:
        Refused: if the value is no label.
    """
    for key in LABEL_KEYS:
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, str) and not (value.isascii() and value.isdigit()):
            return None, value
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise Refused(BAD_LABEL, f"{where}: {key} is {str(value)[:80]!r}") from error
        if isinstance(value, bool) or number != float(value) or not 0 <= number < 10**9:
            raise Refused(BAD_LABEL, f"{where}: {key} is {str(value)[:80]!r}")
        return number, None
    return None, None


def _extra(row: dict[str, Any], keep: tuple[str, ...]) -> dict[str, Any]:
    kept = {}
    for name in keep:
        value = row.get(name)
        if isinstance(value, (str, int, float, bool, list, dict)):
            kept[name] = value
    return kept


def _read_inside(root: Path, name: str) -> bytes:
    """Bytes of the file `name` beneath `root`; a name that leads out of it is refused."""
    if "\x00" in name:
        raise Refused(ESCAPES, repr(name[:200]))
    # Absolute, as a list in the working folder begins at ".", with which no path begins.
    base = os.path.abspath(root)
    inside = os.path.normpath(os.path.join(base, name))
    if inside != base and not inside.startswith(base.rstrip(os.sep) + os.sep):
        raise Refused(ESCAPES, f"{name[:200]} is not in {base} (--root)")
    return read_file(Path(inside), name[:200])


def read_file(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refused(MISSING, name) from error
    except (OSError, ValueError) as error:
        raise Refused(UNREADABLE, f"{name}: {error}") from error


def display(name: str) -> str:
    """A file name that can be written as UTF-8, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")
