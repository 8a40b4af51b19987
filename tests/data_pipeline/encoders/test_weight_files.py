"""Weights that a loader would refuse are refused from their headers, and no others are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.config import AutoencoderConfig, ImageEncoderConfig, TextEncoderConfig
from data_pipeline.encoders.autoencoder import build_autoencoder
from data_pipeline.encoders.image import build_image_encoder
from data_pipeline.encoders.text import build_text_encoder
from data_pipeline.encoders.weight_files import check_weights
from data_pipeline.errors import DataError
from tests.data_pipeline import tiny_models

BUILD: dict[type, Any] = {
    AutoencoderConfig: build_autoencoder,
    TextEncoderConfig: build_text_encoder,
    ImageEncoderConfig: build_image_encoder,
}
# A parameter that the model has under the same name, but for where it begins.
PARAMETERS = {
    "dc_ae": "encoder.conv_in.weight",
    "sd_vae": "decoder.conv_in.bias",
    "gemma": "model.embed_tokens.weight",
    "t5": "shared.weight",
    "dinov2": "embeddings.cls_token",
    "dinov3": "embeddings.cls_token",
    "radio": "radio_model.input_conditioner.norm_mean",
}


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, Any]:
    tiny_models.save_autoencoders(tmp_path)
    tiny_models.save_gemma(tmp_path / "gemma")
    tiny_models.save_t5(tmp_path / "t5")
    tiny_models.save_vision(tmp_path)
    kinds = {"dinov2": "dino", "dinov3": "dino"}
    found = {}
    for name in PARAMETERS:
        kind: Any = kinds.get(name, name)
        make: Any = ImageEncoderConfig
        if name in ("dc_ae", "sd_vae"):
            make = AutoencoderConfig
        elif name in ("gemma", "t5"):
            make = TextEncoderConfig
        found[name] = make(kind=kind, path=str(tmp_path / name))
    return found


def _weights(config: Any) -> Path:
    (file,) = Path(config.path).glob("*.safetensors")
    return file


def _both_refuse(config: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_weights(config)
    # The loader itself, with one line for its user and not its library's error.
    with pytest.raises(DataError, match="cannot load"):
        BUILD[type(config)](config)


def test_whole_weights_of_every_kind_are_accepted(configs: dict[str, Any]) -> None:
    for config in configs.values():
        check_weights(config)
    check_weights(AutoencoderConfig(kind="pixels"))
    check_weights(TextEncoderConfig(kind="words"))


def test_a_file_that_was_cut_off_and_other_shapes_are_refused_as_by_the_loader(
    configs: dict[str, Any],
) -> None:
    for name, config in configs.items():
        file = _weights(config)
        whole, state = file.read_bytes(), load_file(file)
        for size in (0, 1000, len(whole) - 1):
            file.write_bytes(whole[:size])
            _both_refuse(config, f"{file.name}, {size:,} bytes, cannot be read")
        key = PARAMETERS[name]
        save_file({**state, key: torch.zeros(7)}, file, metadata={"format": "pt"})
        _both_refuse(config, rf"other shapes than config.json says: {key}: \[7\], expected \[")


def test_weights_of_another_model_are_refused(configs: dict[str, Any]) -> None:
    _weights(configs["gemma"]).write_bytes(_weights(configs["sd_vae"]).read_bytes())
    with pytest.raises(DataError, match="those of another model"):
        check_weights(configs["gemma"])


def test_several_files_and_pickled_ones_are_looked_at_too(configs: dict[str, Any]) -> None:
    config = configs["t5"]
    folder, file = Path(config.path), _weights(config)
    state = load_file(file)
    file.unlink()
    with pytest.raises(DataError, match="no weights; expected one of model"):
        check_weights(config)
    parts = {f"model-0000{n}-of-00002.safetensors": dict(list(state.items())[n - 1 :: 2]) for n in (1, 2)}
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {key: name for name, part in parts.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    check_weights(config)
    (folder / "model-00002-of-00002.safetensors").unlink()
    _both_refuse(config, "names model-00002-of-00002.safetensors, which is not there")
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(DataError, match="not an index of weights"):
        check_weights(config)
    (folder / "model.safetensors.index.json").unlink()
    pickled = folder / "pytorch_model.bin"
    torch.save(state, pickled)
    check_weights(config)
    pickled.write_bytes(pickled.read_bytes()[:-100])
    _both_refuse(config, "pytorch_model.bin, .* bytes, cannot be read")
