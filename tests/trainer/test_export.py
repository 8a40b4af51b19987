"""Weights out of checkpoints: the right ones, under the right names, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.memory import peak_growth
from tests.trainer.ranks import recipe
from tests.trainer.test_checkpoint import flip_a_byte
from tim_ds.config.recipe import to_dict
from tim_ds.model.config import ModelConfig
from tim_ds.model.export_folder import load_network, meta_network
from tim_ds.model.tim import TiM
from tim_ds.sampler.config import SamplerConfig
from tim_ds.trainer.checkpoint import CheckpointFolder, Piece
from tim_ds.trainer.export import main
from tim_ds.trainer.world import World

AVERAGES = "train.ema={use: slow, averages: [{name: fast, decay: 0.5}, {name: slow, decay: 0.9}]}"
KINDS = ("master", "ema.fast", "ema.slow")


def write_run(run: Path, *overrides: str) -> dict[str, dict[str, torch.Tensor]]:
    """A run with checkpoints of steps 2 and 4, cut into two pieces a tensor; what it holds, by kind."""
    settings = recipe(run, AVERAGES, *overrides)
    folder = CheckpointFolder(run / "checkpoints", World(), keep=5)
    shapes = {name: value.shape for name, value in meta_network(settings.model).state_dict().items()}
    for step in (2, 4):
        generator = torch.Generator().manual_seed(step)
        held = {
            kind: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            for kind in KINDS
        }
        pieces = [
            Piece(kind, f"network.{name}", start, part)
            for kind, state in held.items()
            for name, value in state.items()
            for start, part in ((0, value.flatten()[: value.numel() // 2]),)
        ] + [
            Piece(kind, f"network.{name}", value.numel() // 2, value.flatten()[value.numel() // 2 :])
            for kind, state in held.items()
            for name, value in state.items()
        ]
        manifest = {"progress": {"step": step}, "recipe": to_dict(settings), "world_size": 1}
        folder.save(step, iter(pieces), {}, manifest)
    return held


def test_each_kind_of_weights_comes_out_of_any_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = write_run(tmp_path / "run")
    for weights, kind in ((None, "ema.slow"), ("fast", "ema.fast"), ("raw", "master")):
        out = tmp_path / f"out-{weights}"
        chosen = [] if weights is None else ["--weights", weights]
        assert main([str(tmp_path / "run"), "--out", str(out), *chosen]) == 0
        network, export = load_network(out)
        state = network.state_dict()
        assert all(torch.equal(state[name], value) for name, value in held[kind].items())
        assert (export.step, export.source.average) == (4, weights or "slow")
    one = tmp_path / "run" / "checkpoints" / "step_000000002"
    assert main([str(one), "--out", str(tmp_path / "of_one")]) == 0
    assert main([str(tmp_path / "run"), "--step", "2", "--out", str(tmp_path / "of_step")]) == 0
    files = [(tmp_path / name / "tim.safetensors").read_bytes() for name in ("of_one", "of_step", "out-None")]
    assert files[0] == files[1] != files[2]
    assert "slow weights of step 2 from" in capsys.readouterr().out


def test_the_diffusers_layout_holds_the_network_and_its_configuration(tmp_path: Path) -> None:
    held = write_run(tmp_path / "run")
    out = tmp_path / "out"
    assert main([str(tmp_path / "run"), "--out", str(out), "--layout", "diffusers"]) == 0
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert config.pop("_class_name") == "TiM" and config.pop("_tim_ds_version")
    network = TiM(ModelConfig(**config))
    network.load_state_dict(
        load_file(out / "transformer" / "diffusion_pytorch_model.safetensors"), strict=True
    )
    assert all(torch.equal(network.state_dict()[name], value) for name, value in held["ema.slow"].items())
    index = json.loads((out / "model_index.json").read_text())
    assert index["transformer"] == ["tim_ds.model.tim", "TiM"] and index["vae"]["kind"] == "pixels"
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == SamplerConfig.__name__
    assert scheduler["transport"]["kind"] == "ot_fm" and scheduler["sampler"]["num_steps"] > 0


def test_what_cannot_be_exported_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run)
    for layout in ("tim", "diffusers"):
        command = [str(run), "--out", str(out), "--layout", layout]
        assert main(command) == 0
        assert main(command) == 2
        assert "already; choose another folder" in capsys.readouterr().err
        assert main([*command, "--overwrite"]) == 0
    assert main([str(run), "--out", str(tmp_path / "a"), "--weights", "ema"]) == 2
    assert "no weights 'ema'; there are fast, slow, raw" in capsys.readouterr().err
    assert main([str(run), "--out", str(tmp_path / "a"), "--step", "3"]) == 2
    assert "no checkpoint of step 3; there are 4, 2" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "a")]) == 2
    assert "no such folder" in capsys.readouterr().err
    flip_a_byte(run / "checkpoints" / "step_000000004" / "rank_00000.safetensors")
    assert main([str(run), "--out", str(tmp_path / "a")]) == 2
    assert "damaged" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_an_export_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    held = write_run(tmp_path / "run", "model.hidden_size=256", "model.depth=12")
    sizes = [value.nbytes for value in held["ema.slow"].values()]
    assert sum(sizes) > 40e6
    del held
    command = [str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--layout", "diffusers"]
    growth = peak_growth(lambda: main(command))
    # The network is 40 MB; a tensor, its parts and the blocks in which files are read are 20 MB.
    assert growth < 0.6 * sum(sizes)
