"""Whether an encoder can be loaded, from the headers of its files: no tensor is read."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_pipeline.config import AutoencoderConfig, ImageEncoderConfig, TextEncoderConfig
from data_pipeline.encoders.autoencoder import build_autoencoder
from data_pipeline.encoders.identity import check_here, load_tokenizer
from data_pipeline.encoders.image import build_image_encoder
from data_pipeline.errors import DataError

# What transformers and diffusers look for, in their order. Where a model is in several files, the index names
# them.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)

_SECTIONS = {
    AutoencoderConfig: "autoencoder",
    TextEncoderConfig: "text_encoder",
    ImageEncoderConfig: "image_encoder",
}

Shapes = Mapping[str, tuple[int, ...]]


def check_weights(config: AutoencoderConfig | TextEncoderConfig | ImageEncoderConfig) -> None:
    """Look whether an encoder could be loaded: its tokenizer, whole files, the shapes that its config says.

    Raises:
        DataError: if it could not. Those without weights always can.
    """
    if config.path is None:
        return
    where = f"data.{_SECTIONS[type(config)]}.path"
    check_here(config.path, where)
    model = _empty(config)
    try:
        stored: dict[str, tuple[int, ...]] = {}
        for file in weight_files(folder_of(config.path)):
            stored |= stored_shapes(file)
        check_shapes({name: tuple(value.shape) for name, value in model.state_dict().items()}, stored)
    except DataError as error:
        raise DataError(f"{where}: {config.path}: {error}") from error


def _empty(config: AutoencoderConfig | TextEncoderConfig | ImageEncoderConfig) -> Any:
    """The model of an encoder with weights, without values."""
    if isinstance(config, TextEncoderConfig):
        from data_pipeline.encoders.language_model import empty_model

        load_tokenizer(config)
        return empty_model(config)
    build: Any = build_autoencoder if isinstance(config, AutoencoderConfig) else build_image_encoder
    return build(config, weights=False).model


def folder_of(path: str) -> Path:
    """A folder, or that of a name in the hub's cache."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    return Path(str(try_to_load_from_cache(path, "config.json"))).parent


def weight_files(folder: Path) -> list[Path]:
    """The files that a model would be loaded from.

    Raises:
        DataError: if there are none, or an index names one that is not there.
    """
    first = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if first is None:
        raise DataError(f"no weights; expected one of {', '.join(_NAMES)}")
    if not first.name.endswith(".index.json"):
        return [first]
    try:
        files = [folder / name for name in sorted(set(json.loads(first.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{first.name}: not an index of weights ({error})") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"{first.name} names {', '.join(missing)}, which {_are(missing)} not there")
    return files


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a file of weights holds. Safetensors say how long the file is.

    Raises:
        DataError: if it was cut off, or is something else.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                return {name: tuple(opened.get_slice(name).get_shape()) for name in names}
        # Mapped, and onto the meta device: values stay in the file.
        mapped = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="meta", mmap=mapped, weights_only=True)
        return {name: tuple(value.shape) for name, value in state.items()}
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        EOFError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        size = file.stat().st_size
        raise DataError(
            f"{file.name}, {size:,} bytes, cannot be read ({error}); it may be cut off, get it again"
        ) from error


def check_shapes(expected: Shapes, stored: Shapes) -> None:
    """Compare what a file holds with what the model takes, by the names that both have.

    A file may hold more, and begin its names otherwise: a causal model keeps its decoder under `model.`.
    Names that the library translates while it loads are not compared.

    Raises:
        DataError: if shapes differ, or no name is known.
    """
    starts = Counter(
        found[: -len(name)]
        for name in expected
        for found in stored
        if found.endswith(name) and (found == name or found[: -len(name)].endswith("."))
    )
    if not starts:
        raise DataError("the weights are those of another model than config.json says: no name is the same")
    ((start, _),) = starts.most_common(1)
    wrong = [
        f"{start}{name}: {list(stored[start + name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if start + name in stored and stored[start + name] != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DataError(f"the weights have other shapes than config.json says: {wrong[0]}{more}")


def _are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
