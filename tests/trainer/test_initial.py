"""Weights to start from: where they may lie, and what is refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.cases import ADAPTED, ALIGNED, write_base
from tests.trainer.conftest import Groups
from tests.trainer.plain import train_plainly
from tests.trainer.ranks import recipe
from tim_ds.compat.authors import ReleasedModel
from tim_ds.config.recipe import to_dict
from tim_ds.errors import CheckpointError, ConfigError
from tim_ds.model.export_folder import meta_network, read_export
from tim_ds.model.tim import TiM
from tim_ds.trainer.agreement import check_same_encoders
from tim_ds.trainer.assembly import build_root
from tim_ds.trainer.checkpoint import Piece, find_checkpoints
from tim_ds.trainer.checkpoint_folder import CheckpointFolder
from tim_ds.trainer.ema import piece_kind
from tim_ds.trainer.initial import StoredState, check_initial, read_initial
from tim_ds.trainer.world import World

POWER = "train.ema={averages: [{sigma_rel: 0.1}], snapshots: {every_steps: 2}}"
CLASSES = ("model.condition=class", "model.text_dim=null", "model.num_classes=10", "data.text_encoder=null")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "run" / "export", shards)


def test_an_export_a_run_and_its_checkpoint_hold_the_same_weights(groups: Groups) -> None:
    groups.results(2, "start_from_weights")
    run = groups.folder_of(2, "start_from_weights") / "whole_2"
    (checkpoint, *_) = find_checkpoints(run / "checkpoints")
    found = [read_initial(str(path)) for path in (run, run / "export", checkpoint.path)]
    assert len({initial.digest for initial in found}) == 1
    assert all(initial.model == found[0].model for initial in found)
    expected = read_export(run / "export")[1]
    assert all(torch.equal(found[2].state[name], value) for name, value in expected.items())


def test_a_run_starts_from_a_file_that_the_authors_released(
    base: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickled state dict with a projector, as theirs: the steps are those from an export of them."""
    settings = recipe(shards)
    described, weights = read_export(base)
    like = replace(settings.model, z_dim=12, encoder_depth=1)
    released = {
        "tiny": ReleasedModel(
            model=like,
            autoencoder=settings.data.autoencoder,
            text_encoder=described.text_encoder,
            transport=described.transport,
        )
    }
    for module in ("authors", "convert"):
        monkeypatch.setattr(f"tim_ds.compat.{module}.RELEASED", released)
    torch.manual_seed(0)
    projector = {k: v for k, v in TiM(like).state_dict().items() if k.startswith("projector.")}
    assert projector
    torch.save({**weights, **projector}, tmp_path / "t2i_model.bin")

    from_file = train_plainly(recipe(shards, f"train.init_from={tmp_path / 't2i_model.bin'}"))
    from_export = train_plainly(recipe(shards, f"train.init_from={base}"))
    assert from_file.denoising == from_export.denoising
    assert len(from_file.denoising) == 4
    fresh = train_plainly(settings)
    assert from_file.denoising[0] != pytest.approx(fresh.denoising[0], rel=1e-2)
    with pytest.raises(ConfigError, match=r"model\.depth: 3, but the weights in .*t2i_model\.bin have 2"):
        check_initial(read_initial(str(tmp_path / "t2i_model.bin")), recipe(shards, "model.depth=3"))


def test_an_earlier_checkpoint_of_a_run_is_the_one_that_is_read(tmp_path: Path, shards: Path) -> None:
    described = recipe(shards)
    state = meta_network(described.model).state_dict()
    folder = CheckpointFolder(tmp_path / "checkpoints", World(), keep=2)
    for step in (4, 8):
        pieces = [
            Piece(piece_kind("ema"), f"network.{name}", 0, torch.full((value.numel(),), float(step)))
            for name, value in state.items()
        ]
        folder.save(step, iter(pieces), {}, {"progress": {"step": step}, "recipe": to_dict(described)})
    for path, value in (("checkpoints/step_000000004", 4.0), ("checkpoints/step_000000008", 8.0), ("", 8.0)):
        initial = read_initial(str(tmp_path / path))
        assert all((initial.state[name] == value).all() for name in state)


def test_an_adapter_is_no_weights_to_start_from(groups: Groups) -> None:
    groups.results(2, "start_from_weights")
    checkpoints = groups.folder_of(2, "start_from_weights") / "adapted_1" / "checkpoints"
    (newest, *_) = find_checkpoints(checkpoints)
    with pytest.raises(CheckpointError, match="holds an adapter alone; merge it into its weights"):
        read_initial(str(newest.path))


def test_a_digest_follows_the_values(base: Path) -> None:
    initial = read_initial(str(base))
    before = initial.digest
    read = initial.state

    def altered(name: str, like: torch.Tensor) -> torch.Tensor:
        return read[name] + 1e-3 * (name == "x_embedder.proj.bias")

    assert replace(initial, state=StoredState(read.shapes, altered)).digest != before
    assert read_initial(str(base)).digest == before


def test_a_projector_is_dropped_or_drawn_afresh(base: Path, shards: Path, tmp_path: Path) -> None:
    aligned = build_root(recipe(shards, *ALIGNED), 1, read_initial(str(base))).network
    fresh = build_root(recipe(shards, *ALIGNED), 1).network
    state, expected = aligned.state_dict(), read_export(base)[1]
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert torch.equal(state["projector.0.weight"], fresh.state_dict()["projector.0.weight"])
    with_projector = read_initial(str(write_base(tmp_path / "export", shards, *ALIGNED)))
    plain = build_root(recipe(shards), 1, with_projector).network
    for name, value in plain.state_dict().items():
        assert torch.equal(value, with_projector.state[name]), name


def test_another_architecture_is_refused_with_every_difference(base: Path, shards: Path) -> None:
    other = recipe(shards, "model.hidden_size=32", "model.depth=3", "model.rope_layout=reference")
    with pytest.raises(ConfigError) as refused:
        check_initial(read_initial(str(base)), other)
    message = str(refused.value)
    for line in (
        r"model.hidden_size: 32, but the weights in",
        "model.depth: 3, but",
        "model.rope_layout: 'reference', but",
    ):
        assert line in message
    assert len(message.splitlines()) == 3
    check_initial(read_initial(str(base)), recipe(shards, *ALIGNED))


def test_another_path_between_noise_and_data_is_warned_of(
    base: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_initial(read_initial(str(base)), recipe(shards, "objective.transport.kind=tim"))
    assert "objective.transport.kind: 'tim', the weights in" in caplog.text


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_initial(str(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (ADAPTED, r"train\.init_from: required with train\.adapter"),
        (("train.init_from=x", "train.adapter={rank: 0}"), r"train\.adapter\.rank: expected at least 1"),
        (
            ("train.init_from=x", "train.adapter={targets: []}"),
            r"train\.adapter\.targets: expected different",
        ),
        (
            ("train.init_from=x", "train.adapter={targets: [attn.qkv_d]}"),
            r"train\.adapter\.targets\[0\]: expected one of",
        ),
        (("train.init_from=x", *ADAPTED, *ALIGNED), r"objective\.repa_weight: aligns the network through"),
        (
            ("train.init_from=x", *ADAPTED, "model.z_dim=8", "model.encoder_depth=1"),
            r"model\.z_dim: nothing trains",
        ),
        (
            ("train.init_from=x", *ADAPTED, POWER),
            r"train\.ema\.snapshots: a fit of adapters is not made",
        ),
        (
            ("train.init_from=x", "train.adapter={targets: [attn.qkv, cross_attn.q]}", *CLASSES),
            r"a network of condition 'class' has no cross_attn\.q",
        ),
    ],
)
def test_contradictions_of_a_recipe_are_refused(
    overrides: tuple[str, ...], message: str, shards: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(shards, *overrides)


def test_a_run_is_not_continued_with_other_encoders() -> None:
    recorded = {
        "autoencoder": {"kind": "dc_ae", "path": "a", "revision": "blake2b:1"},
        "text_encoder": {"kind": "gemma", "path": "b", "revision": None},
    }
    moved = {name: {**part, "path": "elsewhere"} for name, part in recorded.items()}
    check_same_encoders(recorded, moved, "step_1")
    check_same_encoders(recorded, {}, "step_1")
    moved["autoencoder"]["revision"] = "blake2b:2"
    with pytest.raises(
        CheckpointError, match=r"data\.autoencoder: blake2b:1 in the checkpoint, blake2b:2 now"
    ):
        check_same_encoders(recorded, moved, "step_1")
