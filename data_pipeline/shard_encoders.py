"""The encoders that made the shards: does a recipe agree, what is left to it, and the empty caption."""

from __future__ import annotations

import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.index import Index
from data_pipeline.schema import MANIFEST_NAME, NULL_NAME, check_states
from data_pipeline.storage import read_beside


def check_encoders(config: DataConfig, index: Index) -> None:
    """Compare the encoders of a recipe with what made the shards.

    Raises:
        DataError: naming the key of the recipe that disagrees with the shards or with their manifest.
    """
    where = config.shards
    text, autoencoder = config.text_encoder, config.autoencoder
    if index.has_text == (text is None):
        holds, asks = ("captions", "null") if index.has_text else ("class labels", "an encoder")
        raise DataError(f"data.text_encoder: the shards in {where} hold {holds}, the recipe says {asks}")
    path = f"{where}/{MANIFEST_NAME}"
    try:
        path, content = read_beside(config.places, MANIFEST_NAME)
        manifest = json.loads(content)
    except FileNotFoundError:
        manifest = {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable manifest ({error!r})") from error
    try:
        made_by = {"autoencoder": manifest.get("autoencoder"), "text_encoder": manifest.get("text_encoder")}
    except AttributeError as error:
        raise DataError(f"{path}: not a readable manifest ({error!r})") from error
    # The path of the weights is left out: the same model may lie in another place.
    compared: list[tuple[str, str, object]] = [("autoencoder", "kind", autoencoder.kind)]
    if autoencoder.kind == "pixels":
        compared += [
            ("autoencoder", "factor", autoencoder.factor),
            ("autoencoder", "channels", autoencoder.channels),
        ]
    if text is not None:
        compared.append(("text_encoder", "kind", text.kind))
        if text.kind == "words":
            compared.append(("text_encoder", "width", text.width))
    for section, name, asked in compared:
        recorded = made_by[section]
        if isinstance(recorded, dict) and recorded.get(name) != asked:
            raise DataError(
                f"data.{section}.{name}: the shards in {where} were made with {recorded.get(name)!r}, "
                f"the recipe says {asked!r}"
            )
    channels = autoencoder.channels * autoencoder.factor**2
    if autoencoder.kind == "pixels" and index.channels != channels:
        raise DataError(
            f"data.autoencoder: {autoencoder.channels} channels and factor {autoencoder.factor} give latents "
            f"of {channels} channels, the shards in {where} hold {index.channels}"
        )
    if text is not None and text.kind == "words" and text.width != index.text_width:
        raise DataError(
            f"data.text_encoder.width: the shards in {where} hold states of width {index.text_width}, "
            f"the recipe says {text.width}"
        )


def check_what_is_encoded(config: DataConfig, index: Index) -> None:
    """Raises DataError if the recipe does not say what these shards leave to do."""
    if index.online and not config.encode_online:
        raise DataError(
            f"data.encode_online: false, but the shards in {config.shards} leave "
            f"{' and '.join(index.online)} to be encoded while training; set it to true, or prepare latents "
            f"and states"
        )
    if config.encode_online and not index.online:
        raise DataError(
            f"data.encode_online: true, but the shards in {config.shards} hold latents"
            f"{' and states' if index.has_text else ''} already; set it to false"
        )
    if config.flip_online and "picture" not in index.online:
        raise DataError(
            f"data.flip_online: true, but the shards in {config.shards} hold latents; prepare them with "
            f"--flip, or with --pictures png or original"
        )


def load_null_states(config: DataConfig, width: int) -> Tensor:
    """States of the empty caption, float32 [n, E].

    Raises:
        DataError: if they are missing, damaged or of another width than the captions.
    """
    path, tensors = _null_tensors(config)
    if "states" not in tensors:
        raise DataError(
            f"{path}: expected a tensor 'states', received {sorted(tensors)}; prepare the data again"
        )
    return _checked_states(tensors["states"], width, path)


def stored_padding(config: DataConfig, index: Index) -> Tensor | None:
    """The padding state beside stored states, where the recipe fills captions up.

    Raises:
        DataError: if it is asked for and not there.
    """
    asked = config.text_encoder is not None and config.text_encoder.padding == "constant"
    if not asked or {"ids", "caption"} & {*index.online}:
        return None
    path, tensors = _null_tensors(config)
    if "padding" not in tensors:
        raise DataError(
            f"data.text_encoder.padding: 'constant', but {path} holds no tensor 'padding'; prepare the data "
            f"again, or use 'none'"
        )
    return _checked_states(tensors["padding"], index.text_width, path)


def _null_tensors(config: DataConfig) -> tuple[str, dict[str, Tensor]]:
    path = f"{config.places[0]}/{NULL_NAME}"
    try:
        path, content = read_beside(config.places, NULL_NAME)
        return path, load(content)
    except FileNotFoundError as error:
        raise DataError(
            f"{' or '.join(f'{place}/{NULL_NAME}' for place in config.places)}: missing; text data hold the "
            f"states of the empty caption there. Prepare them again"
        ) from error
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: expected a tensor 'states' ({error!r}); prepare the data again") from error


def _checked_states(states: Tensor, width: int, path: str) -> Tensor:
    states = states.to(torch.float32)
    check_states(states, path)
    if states.shape[1] != width:
        raise DataError(
            f"{path}: expected states of width {width}, as in the shards, received {states.shape[1]}"
        )
    return states
