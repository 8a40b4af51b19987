"""Weights out of checkpoints: the right ones, under the right names, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.memory import peak_growth
from tests.trainer.ranks import recipe
from tests.trainer.test_checkpoint import Held, flip_a_byte, start
from tim_ds.config.recipe import to_dict
from tim_ds.model.config import ModelConfig
from tim_ds.model.export_folder import load_network, meta_network
from tim_ds.model.tim import TiM
from tim_ds.sampler.config import SamplerConfig
from tim_ds.trainer.checkpoint import Checkpoint, Piece, find_checkpoints, remove_checkpoint
from tim_ds.trainer.checkpoint_folder import CheckpointFolder
from tim_ds.trainer.export import main
from tim_ds.trainer.world import World

AVERAGES = "train.ema={use: slow, averages: [{name: fast, decay: 0.5}, {name: slow, decay: 0.9}]}"
KINDS = ("master", "ema.fast", "ema.slow")


def write_run(
    run: Path, *overrides: str, steps: tuple[int, ...] = (2, 4)
) -> dict[str, dict[str, torch.Tensor]]:
    """A run with checkpoints of some steps, cut into two pieces a tensor; what the last holds, by kind."""
    settings = recipe(run, AVERAGES, *overrides)
    folder = CheckpointFolder(run / "checkpoints", World(), keep=5)
    shapes = {name: value.shape for name, value in meta_network(settings.model).state_dict().items()}
    held: dict[str, dict[str, torch.Tensor]] = {}
    for step in steps:
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


@pytest.mark.parametrize("moment", ["found", "half read"])
def test_an_export_from_a_run_that_deletes_what_is_read_is_right_or_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    """While step 4 is read, the run saves step 6 and keeps that one alone."""
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run)
    newer = write_run(tmp_path / "later", steps=(6,))
    plain = Checkpoint.check if moment == "found" else Checkpoint.fill
    reads: list[Path] = []

    def read(self: Checkpoint, *arguments: Any) -> None:
        reads.append(self.path)
        if len(reads) == (1 if moment == "found" else 20):
            # Aside, as a save that is going on: it is none of the checkpoints until it is renamed.
            (tmp_path / "later/checkpoints/step_000000006").rename(run / "checkpoints/step_000000006")
            for old in find_checkpoints(run / "checkpoints")[1:]:
                remove_checkpoint(old)
        plain(self, *arguments)

    monkeypatch.setattr(Checkpoint, plain.__name__, read)
    assert main([str(run), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "step_000000004: deleted while it was read" in said.err and "weights of step 6 from" in said.out
    state = load_network(out)[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in newer["ema.slow"].items())
    # One that was asked for by its step is not replaced by another.
    gone = find_checkpoints(run / "checkpoints")[0]
    monkeypatch.setattr(Checkpoint, plain.__name__, lambda *_: (remove_checkpoint(gone), plain(*_)))
    assert main([str(run), "--out", str(tmp_path / "other"), "--step", "6"]) == 2
    assert "step_000000006: deleted while it was read" in capsys.readouterr().err
    assert not list((tmp_path / "other").glob("*")), "nothing half-written is left"


def test_an_export_takes_no_notice_of_a_checkpoint_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    held = write_run(run)
    folder, writing = CheckpointFolder(run / "checkpoints", World(), keep=1), Held(monkeypatch)
    start(folder, 6, torch.zeros(6))
    assert (run / "checkpoints" / ".tmp-step_000000006").is_dir()
    try:
        assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    finally:
        writing.go.set()
        folder.settle(wait=True)
    state = load_network(tmp_path / "out")[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in held["ema.slow"].items())


def test_an_export_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    held = write_run(tmp_path / "run", "model.hidden_size=256", "model.depth=12")
    sizes = [value.nbytes for value in held["ema.slow"].values()]
    assert sum(sizes) > 40e6
    del held
    for layout in ("tim", "diffusers"):
        command = [str(tmp_path / "run"), "--out", str(tmp_path / layout), "--layout", layout]
        growth = peak_growth(lambda command=command: main(command))
        # The network is 40 MB; a tensor, its parts and the blocks in which files are read are 20 MB.
        assert growth < 0.6 * sum(sizes), layout
