"""Pictures as files: PNGs that carry their settings, what they are called, and where they may go."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from tim_ds import __version__
from tim_ds.errors import RequestError
from tim_ds.model.weights import write_aside
from tim_ds.pipeline.request import PromptLike

PNG_KEY = "tim_ds"
"""Keyword of the PNG text chunk that holds a picture's settings as JSON."""


def write_png(path: Path, image: NDArray[np.uint8], settings: dict[str, Any]) -> None:
    """Write a picture [H, W, 1 or 3] with `settings` as metadata: aside, then renamed to `path`.

    Raises:
        CheckpointError: if the disk refuses; nothing half-written is left.
    """
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", f"tim_ds {__version__}")
    if "prompt" in settings:
        info.add_itxt("Description", str(settings["prompt"]))
    info.add_itxt(PNG_KEY, json.dumps(settings, ensure_ascii=False))
    content = io.BytesIO()
    as_pil(image).save(content, format="PNG", pnginfo=info)
    data = content.getvalue()

    def write(aside: Path) -> None:
        aside.write_bytes(data)

    write_aside(path, len(data), write)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `write_png` stored.

    Raises:
        RequestError: if the file is no PNG of this package.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(PNG_KEY)
    except (OSError, SyntaxError) as error:
        raise RequestError(f"{path}: not a picture that can be read ({error})") from error
    if text is None:
        raise RequestError(f"{path}: carries no settings of tim_ds")
    return json.loads(str(text))


def as_pil(pixels: NDArray[np.uint8]) -> Image.Image:
    """A picture [H, W, 1 or 3] as PIL has it."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def file_stem(number: int, prompt: PromptLike, seed: int) -> str:
    """What a picture's file is called, without its ending: number, prompt and seed."""
    return f"{number:04d}_{_slug(prompt)}_seed{seed}"


def _slug(prompt: PromptLike) -> str:
    """A short file name part of a prompt: letters and digits of any script, dashes between."""
    text = f"class-{prompt}" if isinstance(prompt, int) else prompt
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:40].strip("-") or "no-prompt"


def refuse_existing(paths: Sequence[Path]) -> None:
    """Raises RequestError if one of the files exists."""
    existing = [path for path in paths if path.exists()]
    if existing:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise RequestError(f"{existing[0]}{more}: exists and is not overwritten; choose another folder")


def refuse_unwritable(folder: Path) -> None:
    """Raises RequestError if `folder` could not be made or written to: before work whose results go there."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RequestError(f"{folder}: {there} is not a folder; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(f"{folder}: {there} cannot be written to; choose another folder")
