"""An export folder is whole or refused, and gives back the network that went in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from tests.model.networks import class_config, random_network, random_pack, text_config
from tim_ds.errors import CheckpointError
from tim_ds.model.export_folder import (
    EXPORT_FILE,
    WEIGHTS_FILE,
    Export,
    SourceConfig,
    load_network,
    read_export,
    write_export,
)
from tim_ds.objective.config import TransportConfig
from tim_ds.sampler.config import SamplerConfig


def _export(**changes: Any) -> Export:
    values: dict[str, Any] = {
        "model": text_config(rope_layout="reference"),
        "transport": TransportConfig(kind="trigflow", sigma_data=0.7),
        "sampler": SamplerConfig(num_steps=4, cfg_scale=2.5, cfg_interval=(0.1, 0.6)),
        "autoencoder": AutoencoderConfig(kind="pixels", channels=1),
        "text_encoder": TextEncoderConfig(kind="words", width=12),
        "step": 1200,
        "source": SourceConfig(kind="run", name="digits"),
        **changes,
    }
    return Export(**values)


def test_written_export_reads_back_equal(tmp_path: Path) -> None:
    export, network = _export(), random_network(text_config(), dtype=torch.float32)
    write_export(tmp_path / "export", export, network.state_dict())
    got, state = read_export(tmp_path / "export")
    assert got == export
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert sorted(p.name for p in (tmp_path / "export").iterdir()) == [EXPORT_FILE, WEIGHTS_FILE]


def test_description_carries_every_setting_by_name(tmp_path: Path) -> None:
    write_export(tmp_path, _export(autoencoder=None), random_network(text_config()).state_dict())
    content = json.loads((tmp_path / EXPORT_FILE).read_text())
    assert list(content) == [
        "format",
        "model",
        "transport",
        "sampler",
        "autoencoder",
        "text_encoder",
        "step",
        "source",
    ]
    assert content["format"] == 1 and content["autoencoder"] is None
    assert content["sampler"]["cfg_interval"] == [0.1, 0.6]


def test_loaded_network_computes_what_the_exported_one_did(tmp_path: Path) -> None:
    model = class_config(z_dim=None)
    network = random_network(model)
    write_export(tmp_path, _export(model=model, text_encoder=None), network.state_dict())
    loaded, export = load_network(tmp_path, dtype=torch.float64)
    assert export.model == model and not loaded.training
    pack = random_pack(model)
    with torch.no_grad():
        assert torch.equal(loaded(*pack).F_TC, network(*pack).F_TC)
    assert load_network(tmp_path, dtype=torch.bfloat16)[0].x_embedder.proj.weight.dtype == torch.bfloat16


def test_an_export_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    first, second = random_network(text_config(), seed=1), random_network(text_config(), seed=2)
    write_export(tmp_path, _export(step=1), first.state_dict())
    with pytest.raises(CheckpointError, match=r"tim\.safetensors and export\.json already"):
        write_export(tmp_path, _export(step=2), second.state_dict())
    assert read_export(tmp_path)[0].step == 1
    write_export(tmp_path, _export(step=2), second.state_dict(), overwrite=True)
    export, state = read_export(tmp_path)
    assert export.step == 2
    assert torch.equal(state["final_layer.linear.bias"], second.final_layer.linear.bias)


def test_weights_of_another_network_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    state = random_network(text_config(depth=2)).state_dict()
    with pytest.raises(CheckpointError, match=r"missing \(\d+\):\n    blocks\.2\."):
        write_export(tmp_path / "export", _export(), state)
    assert not (tmp_path / "export").exists()


def test_an_interrupted_rewrite_leaves_a_folder_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = random_network(text_config()).state_dict()
    write_export(tmp_path, _export(), state)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tim_ds.model.export_folder.write_aside", killed)
    with pytest.raises(KeyboardInterrupt):
        write_export(tmp_path, _export(step=9), state, overwrite=True)
    with pytest.raises(CheckpointError, match="one cut short"):
        read_export(tmp_path)


def test_damaged_folders_are_one_clear_error(tmp_path: Path) -> None:
    write_export(tmp_path, _export(), random_network(text_config()).state_dict())
    description = tmp_path / EXPORT_FILE
    good = json.loads(description.read_text())

    def check(content: str, message: str) -> None:
        description.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_export(tmp_path)

    check("{", "cannot be read")
    check(json.dumps({**good, "format": 2}), "format: expected one of 1, received the number 2")
    check(
        json.dumps({k: v for k, v in good.items() if k != "transport"}), "transport: required and not given"
    )
    check(json.dumps({**good, "extra": 1}), "extra: unknown key")
    check(json.dumps({**good, "model": {**good["model"], "depth": 4}}), r"missing \(\d+\):\n    blocks\.3\.")
    description.write_text(json.dumps(good))
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"tim\.safetensors: cannot be read"):
        read_export(tmp_path)
    with pytest.raises(CheckpointError, match="no such export folder"):
        read_export(tmp_path / "absent")
