"""Feature alignment from pictures to the exported projector: the recipe that is meant for it, made small."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from transformers import Dinov2Model

from data_pipeline import prepare
from data_pipeline.handwriting_words import NewName, write_pictures
from tests.data_pipeline import tiny_models
from tests.trainer.aligning import train_watched
from tests.trainer.ranks import engine_file, run_ranks
from tim_ds.config.load import load_recipe
from tim_ds.model.export_folder import read_export
from tim_ds.trainer.assembly import build_root
from tim_ds.trainer.checkpoint import find_checkpoints
from tim_ds.trainer.initial import read_initial
from tim_ds.trainer.metrics import read_metrics

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "t2i_xl_repa.yaml"
STEPS, HALF = 30, 15


class Aligned(NamedTuple):
    settings: list[str]
    """Of the small run, over the recipe."""
    whole: Path
    continued: Path
    watched: list[dict[str, Any]]
    """Of every rank of every leg."""
    models: Path


def save_autoencoder(folder: Path) -> None:
    """A DC-AE with the stride and the channels of the released one, and little between them."""
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    torch.manual_seed(0)
    # Typed as one-element tuples in diffusers; any number is meant.
    blocks: Any = ("ResBlock",) * 6
    widths: Any = (8, 8, 8, 8, 16, 32)
    layers: Any = (1,) * 6
    AutoencoderDC(
        latent_channels=32,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Aligned:
    """Thirty steps in one go, and in two commands, on two ranks at ZeRO-3."""
    folder = tmp_path_factory.mktemp("repa")
    models, shards = folder / "models", folder / "shards"
    save_autoencoder(models / "dc_ae")
    tiny_models.save_gemma(models / "gemma")
    tiny_models.save_vision(models)
    write_pictures(folder / "pictures", NewName.parse("five=quint"), 96)
    for path in (folder / "pictures").glob("*.png"):
        # Four tokens a side for a digit of eight pixels.
        with Image.open(path) as picture:
            enlarged = picture.resize((16 * picture.width, 16 * picture.height), Image.Resampling.BICUBIC)
        enlarged.save(path)
    stored = ["--pictures", "original", "--text", "ids", "--dtype", "bfloat16"]
    encoders = ["--autoencoder", "dc_ae", "--autoencoder-path", str(models / "dc_ae")]
    encoders += ["--text-encoder", "gemma", "--text-encoder-path", str(models / "gemma")]
    assert prepare.main([str(folder / "pictures"), "--out", str(shards), *stored, *encoders]) == 0
    settings = [
        *("model.hidden_size=48", "model.depth=3", "model.num_heads=4"),
        *("model.adaln_hidden=null", "model.text_dim=16", "model.z_dim=16", "model.projector_dim=32"),
        *("model.encoder_depth=2", f"data.shards={shards}", "data.tokens_per_pack=400"),
        *("data.packs_per_step=4", "data.workers=1", f"data.autoencoder.path={models / 'dc_ae'}"),
        f"data.text_encoder.path={models / 'gemma'}",
        f"data.image_encoder={{kind: dino, path: {models / 'dinov2'}, dtype: float32}}",
        *("train.precision=fp32", "train.log_every=1", "train.ema.averages=[{decay: 0.9}]"),
        *("train.optimizer.lr=2e-3", "train.optimizer.warmup_steps=0", "train.checkpoint.milestones=[]"),
        "train.preview={every_steps: 30, prompts: [a three], sizes: [256x128], num_steps: [1]}",
    ]
    engine = str(engine_file(folder, 3))

    def train(run: Path, steps: int) -> list[dict[str, Any]]:
        arguments = [str(RECIPE), "--ds", engine, "--run", str(run), *settings, f"train.steps={steps}"]
        out = folder / f"out_{run.name}_{steps}"
        return run_ranks(train_watched, *arguments, world_size=2, out=out, timeout_s=900)

    whole, continued = folder / "whole", folder / "continued"
    watched = [*train(whole, STEPS), *train(continued, HALF), *train(continued, STEPS)]
    return Aligned(settings, whole, continued, watched, models)


def alignment(run: Path) -> list[float]:
    return [line["alignment"] for line in read_metrics(run)]


def test_the_alignment_loss_falls(aligned: Aligned) -> None:
    assert [found["code"] for found in aligned.watched] == [0] * 6
    losses = alignment(aligned.whole)
    assert len(losses) == STEPS
    print(f"alignment over {STEPS} steps: {losses[0]:.3f} to {losses[-1]:.3f}")
    # 1 - cosine: features that know nothing of each other have 1.
    assert mean(losses[:3]) == pytest.approx(1.0, abs=0.3)
    assert mean(losses[-3:]) < 0.7 * mean(losses[:3])


def test_nothing_flows_into_the_extractor(aligned: Aligned) -> None:
    stored = Dinov2Model.from_pretrained(aligned.models / "dinov2").state_dict()
    for found in aligned.watched:
        assert found["tokens"] > 0 and found["dtype"]
        assert not found["with_gradient"] and found["gradients"] == []
        assert found["state"].keys() <= stored.keys() and len(found["state"]) > 10
        assert all(torch.equal(value, stored[name]) for name, value in found["state"].items())


def test_the_projector_is_trained_saved_and_exported(aligned: Aligned) -> None:
    recipe = load_recipe(str(RECIPE), aligned.settings)
    first = build_root(recipe, 1).network.state_dict()
    checkpoint = find_checkpoints(aligned.whole / "checkpoints")[0]
    assert checkpoint.step == STEPS
    names = {name for _, _, name in (key.partition("/") for key in checkpoint._pieces)}
    assert names == {f"network.{name}" for name in first}, "the network whole, and no extractor"
    assert checkpoint.manifest["encoders"]["image_encoder"]["path"] == str(aligned.models / "dinov2")
    exported = read_export(aligned.whole / "export")[1]
    averaged = read_initial(str(checkpoint.path)).state
    projector = [name for name in first if name.startswith("projector.")]
    assert len(projector) >= 4
    for name in projector:
        trained = torch.empty(first[name].numel())
        checkpoint.fill("master", f"network.{name}", 0, trained)
        moved = float((trained - first[name].flatten()).abs().max())
        # Thirty steps of AdamW at 2e-3 move what has a gradient by some hundredths.
        assert moved > 5e-3, name
        assert torch.equal(exported[name], averaged[name]), name
        assert not torch.equal(exported[name].flatten(), trained), name


def test_a_continued_run_aligns_like_one_that_was_not_stopped(aligned: Aligned) -> None:
    # What is encoded while training depends on its batch by rounding, in bfloat16 for the captions, and the
    # steps carry it on.
    assert alignment(aligned.continued) == pytest.approx(alignment(aligned.whole), rel=1e-2)
    assert alignment(aligned.continued)[:HALF] == alignment(aligned.whole)[:HALF]
    one, other = (read_export(run / "export")[1] for run in (aligned.whole, aligned.continued))
    first = build_root(load_recipe(str(RECIPE), aligned.settings), 1).network.state_dict()
    for name in (name for name in first if name.startswith("projector.")):
        moved = float((one[name] - first[name]).abs().max())
        assert float((one[name] - other[name]).abs().max()) < 0.1 * moved, name
