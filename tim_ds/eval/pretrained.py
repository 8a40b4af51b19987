"""Loading the networks that score pictures, from a folder or a hub id; what is missing is named."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tim_ds.errors import RequestError
from tim_ds.model.weights import sha256

T = TypeVar("T")

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def load_pretrained(option: str, name: str, load: Callable[[str], T]) -> T:
    """`load(name)` of a transformers class, its failures told as a missing or unfitting model.

    Args:
        option: of the command line, for the message.
    Raises:
        RequestError: if there is no such model here and it cannot be fetched, or it is of another kind.
    """
    if looks_like_path(name) and not Path(name).is_dir():
        raise RequestError(f"{option} {name}: no such folder of a model")
    try:
        return load(name)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(
            f"{option} {name}: cannot be loaded ({first}); give the folder of a downloaded model, or a "
            f"hub id where the hub can be reached"
        ) from error


def of_transformers(*names: str) -> Any:
    """Classes of transformers: the one named, or a list of them.

    Raises:
        RequestError: if they cannot be imported: mostly a torchvision of another build than torch.
    """
    try:
        library = importlib.import_module("transformers")
        found = [getattr(library, name) for name in names]
    except (ImportError, RuntimeError, AttributeError) as error:
        raise RequestError(
            f"transformers: {' and '.join(names)} cannot be imported ({error}); check that torch, "
            f"torchvision and transformers belong together, or remove torchvision"
        ) from error
    return found[0] if len(found) == 1 else found


def looks_like_path(name: str) -> bool:
    """Whether a model's name is meant as a folder: hub ids are NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_dir()


def fingerprint(name: str) -> dict[str, Any]:
    """What identifies a model in a result: its name, and the hashes of the weight files of a local folder."""
    folder = Path(name)
    if not folder.is_dir():
        return {"name": name}
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    return {"name": folder.name, "weights_sha256": [sha256(path) for path in files]}
