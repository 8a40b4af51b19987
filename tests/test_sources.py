"""Weights are read from exports, runs, checkpoints and released files; what is not whole is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.config.recipes import recipe
from tests.networks import export_of, write_tiny_export
from tim_ds.compat.authors import RELEASED
from tim_ds.config.recipe import recipe_hash, to_dict
from tim_ds.errors import CheckpointError
from tim_ds.model.export_folder import meta_network
from tim_ds.model.tim import TiM
from tim_ds.model.weights import write_weights
from tim_ds.pipeline import TiMPipeline
from tim_ds.sources import read_source
from tim_ds.trainer.checkpoint import Piece
from tim_ds.trainer.checkpoint_folder import CheckpointFolder
from tim_ds.trainer.ema import piece_kind
from tim_ds.trainer.world import World


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_export_its_run_and_its_weight_file_are_the_same_source(tmp_path: Path) -> None:
    folder = write_tiny_export(tmp_path / "run" / "export")
    found = [read_source(p) for p in (folder, tmp_path / "run", folder / "tim.safetensors")]
    assert all(same(s.state, found[0].state) and s.sha256 == found[0].sha256 for s in found)
    assert found[1].export == export_of()


class TestCheckpoints:
    @pytest.fixture
    def run(self, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
        """A run without an export: a checkpoint whose averaged weights are cut at odd places."""
        torch.manual_seed(0)
        fresh = TiM(recipe().model).state_dict()
        state = {name: 0.1 * torch.randn_like(value) for name, value in fresh.items()}
        pieces = []
        for name, value in state.items():
            flat, cut = value.flatten(), value.numel() // 3
            for start, part in ((cut, flat[cut:]), (0, flat[:cut])):
                if len(part):
                    pieces.append(Piece(piece_kind("ema"), f"network.{name}", start, part))
            pieces.append(Piece("master", f"network.{name}", 0, torch.zeros_like(flat)))
        folder = CheckpointFolder(tmp_path / "run" / "checkpoints", World(), keep=1)
        manifest = {"progress": {"step": 12}, "recipe": to_dict(recipe())}
        folder.save(12, iter(pieces), {}, manifest)
        return tmp_path / "run", state

    def test_a_run_gives_the_averaged_weights_of_its_newest_checkpoint(
        self, run: tuple[Path, dict[str, Tensor]]
    ) -> None:
        folder, state = run
        found = read_source(folder)
        assert same(found.state, state)
        assert (found.export.step, found.export.source.name) == (12, "small")
        assert found.export.source.recipe_sha256 == recipe_hash(recipe())
        again = read_source(folder / "checkpoints" / "step_000000012")
        assert again.sha256 == found.sha256 and same(again.state, state)

    def test_a_checkpoint_draws(self, run: tuple[Path, dict[str, Tensor]]) -> None:
        [image] = TiMPipeline.from_pretrained(run[0])("a three", "8x8", num_steps=1).pixels
        assert image.shape == (8, 8, 1)

    def test_another_network_and_lost_pieces_are_refused(self, run: tuple[Path, dict[str, Tensor]]) -> None:
        folder = run[0] / "checkpoints" / "step_000000012"
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["recipe"]["model"]["depth"] = 1
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match="which the network of its recipe does not have"):
            read_source(folder)
        manifest["recipe"]["model"] |= {"depth": 2, "mlp_ratio": 1.0}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=r"holds blocks\.\d\.mlp\..*, which the network"):
            read_source(folder)
        manifest["recipe"]["model"] |= {"depth": 3, "mlp_ratio": recipe().model.mlp_ratio}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=r"not whole in its files: blocks\.2"):
            read_source(folder)
        manifest["recipe"]["model"]["deepth"] = 3
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match="its recipe is not one of this version"):
            read_source(folder)


@pytest.mark.parametrize("name", ["t2i_xl", "c2i_xl_256", "c2i_xl_512"])
def test_the_released_files_are_told_apart_and_checked_strictly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Real names and shapes without storage: only the reading of the file is replaced."""
    file = tmp_path / "model.bin"
    file.write_bytes(b"weights")
    state = dict(meta_network(RELEASED[name].model).state_dict())
    monkeypatch.setattr("tim_ds.compat.convert.read_weights", lambda _: state)
    found = read_source(file)
    assert found.export.source.name == name and found.export.model == RELEASED[name].model
    assert (found.export.sampler.cfg_upper, found.export.sampler.schedule_dtype) == ("exclusive", "bfloat16")
    assert found.export.autoencoder == RELEASED[name].autoencoder
    state.pop("final_layer.linear.bias")
    state["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"missing \(1\):\n    final_layer.linear.bias\n  extra \(1\)"):
        read_source(file)


def test_a_released_file_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.compat.test_convert import TINY

    monkeypatch.setattr("tim_ds.compat.authors.RELEASED", TINY)
    monkeypatch.setattr("tim_ds.compat.convert.RELEASED", TINY)
    torch.manual_seed(0)
    write_weights(tmp_path / "model.safetensors", TiM(TINY["tiny_class"].model).state_dict())
    found = read_source(tmp_path / "model.safetensors")
    assert found.export.source.name == "tiny_class"
    with pytest.raises(CheckpointError, match="not there; expected an export folder, a run, a checkpoint"):
        read_source(tmp_path / "model.bin")
