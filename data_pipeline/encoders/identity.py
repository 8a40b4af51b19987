"""What an encoder is, without loading its weights: sizes from its config, revision from its files."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from data_pipeline.errors import DataError

LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
"""Raised by transformers and diffusers where a model cannot be loaded; RuntimeError for other shapes."""

WEIGHT_ENDINGS = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class LatentShape:
    """Pixels a side of a latent cell, channels of a cell, channels of a picture."""

    stride: int
    channels: int
    pixel_channels: int


def latent_shape(config: AutoencoderConfig) -> LatentShape:
    """The sizes of an autoencoder, from its config alone.

    Raises:
        DataError: if there is no config of that kind at the path.
    """
    if config.kind == "pixels":
        return LatentShape(config.factor, config.channels * config.factor**2, config.channels)
    path = config.path or ""
    try:
        if config.kind == "dc_ae":
            from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

            found: Any = AutoencoderDC.load_config(path)
            blocks = found["encoder_block_out_channels"]
        else:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

            found = AutoencoderKL.load_config(path)
            blocks = found["block_out_channels"]
        return LatentShape(2 ** (len(blocks) - 1), int(found["latent_channels"]), 3)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"data.autoencoder.path: no config of kind {config.kind} at {config.path!r} ({error}); "
            f"expected a folder with config.json, or a hub name"
        ) from error


def load_tokenizer(config: TextEncoderConfig) -> Any:
    """The tokenizer of a pretrained text encoder.

    Raises:
        DataError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"data.text_encoder.path: cannot load a tokenizer from {config.path!r} ({error})"
        ) from error


def text_width(config: TextEncoderConfig) -> int:
    """Width of a text state, from the config alone.

    Raises:
        DataError: if there is no config at the path.
    """
    if config.kind == "words":
        return config.width
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(config.path or "")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"data.text_encoder.path: no config at {config.path!r} ({error})") from error
    # A Gemma that also sees pictures keeps its language part in a section of its own.
    found = getattr(found, "text_config", None) or found
    return int(found.d_model if config.kind == "t5" else found.hidden_size)


def check_here(path: str | None, where: str) -> None:
    """Look for a config without asking the hub, which an estimate must not wait for.

    Args:
        where: the setting that named it.
    Raises:
        DataError: if `path` is neither a folder nor a name in the hub's cache.
    """
    if path is None or Path(path).is_dir():
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise DataError(f"{where}: {path!r} is neither a folder nor in the hub's cache")


def revision(path: str | None) -> str | None:
    """What the weights at `path` are: the commit of a hub snapshot, or a hash of the files of a folder."""
    if path is None:
        return None
    folder = Path(path)
    if folder.is_dir():
        digest = blake2b(digest_size=16)
        for file in sorted(folder.iterdir()):
            if file.suffix in WEIGHT_ENDINGS:
                digest.update(file.name.encode() + b"\x00")
                with open(file, "rb") as stream:
                    while block := stream.read(1 << 24):
                        digest.update(block)
        return f"blake2b:{digest.hexdigest()}"
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json")
    # .../snapshots/<commit>/config.json
    return f"commit:{Path(cached).parent.name}" if isinstance(cached, str) else None
