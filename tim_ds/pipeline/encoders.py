"""The encoders of a pipeline: built as the weights name them, fitting the network, on its device to work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from data_pipeline.encoders.autoencoder import Autoencoder, build_autoencoder
from data_pipeline.encoders.text import TextEncoder, build_text_encoder
from tim_ds.errors import RequestError
from tim_ds.model.config import ModelConfig
from tim_ds.model.export_folder import Export

C = TypeVar("C")
E = TypeVar("E")


def autoencoder_of(export: Export) -> Autoencoder:
    """Raises RequestError if `export` names none, or it cannot be loaded."""
    return _built("autoencoder", export.autoencoder, build_autoencoder)


def text_encoder_of(export: Export) -> TextEncoder:
    """Raises RequestError if `export` names none, or it cannot be loaded."""
    return _built("text encoder", export.text_encoder, build_text_encoder)


def _built(what: str, config: C | None, build: Callable[[C], E]) -> E:
    if config is None:
        raise RequestError(
            f"export: names no {what}; pass one to TiMPipeline, or set `{what.replace(' ', '_')}` in "
            "export.json"
        )
    try:
        return build(config)
    except ValueError as error:
        raise RequestError(f"export: {error}") from error


def check_fit(model: ModelConfig, autoencoder: Autoencoder, text_encoder: TextEncoder | None) -> None:
    """Raises RequestError if an encoder does not fit the network."""
    if autoencoder.channels != model.in_channels:
        raise RequestError(
            f"autoencoder: makes latents of {autoencoder.channels} channels, the network expects "
            f"{model.in_channels} (model.in_channels)"
        )
    if text_encoder is not None and text_encoder.width != model.text_dim:
        raise RequestError(
            f"text encoder: makes states of width {text_encoder.width}, the network expects "
            f"{model.text_dim} (model.text_dim)"
        )


@contextmanager
def brought_to(device: torch.device, encoder: Any) -> Iterator[None]:
    """Within, an encoder with weights is on `device`; afterwards where it was."""
    place = getattr(encoder, "device", device)
    try:
        if place != device:
            encoder.to(device)
        yield
    finally:
        if place != device:
            encoder.to(place)


def check_device(device: str | torch.device, option: str = "device:") -> None:
    """Look whether a device is there.

    Args:
        option: how the message calls what named it.
    Raises:
        RequestError: if it is not.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # AssertionError is how a torch without CUDA refuses it.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RequestError(f"{option} {device}: not usable here: {reason}") from error
