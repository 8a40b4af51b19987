"""The estimate of memory against what is there: storages, what autograd keeps, a GPU's allocator."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tim_kernels
from data_pipeline.encoders.autoencoder import build_autoencoder, decode_bytes
from data_pipeline.encoders.footprint import autoencoder_footprint, text_footprint
from data_pipeline.online import encoder_footprints
from tests.data_pipeline.tiny_models import save_autoencoders, save_released_configs, save_t5, save_vision
from tests.kernels.launches import without_running
from tests.memory import LiveBytes
from tests.model.networks import class_config, random_pack, text_config
from tests.trainer.conftest import Groups
from tim_ds.config.load import load_recipe
from tim_ds.model.blocks import TransitionBlock
from tim_ds.model.config import ModelConfig
from tim_ds.model.memory import sampling_bytes
from tim_ds.model.tim import TiM
from tim_ds.packed import Copies
from tim_ds.trainer.encoder_memory import encoder_memory
from tim_ds.trainer.engine import read_engine_file
from tim_ds.trainer.memory import (
    GIB,
    IMAGE_SIDE_PIXELS,
    Part,
    Ranks,
    _activations,
    _encoders,
    _Pack,
    estimate,
    kept_around_blocks,
    kept_by_block,
    main,
    taken_by_copies,
)
from tim_kernels.saved import saved_bytes

ROOT = Path(__file__).parents[2]
RELEASED_ENCODERS = {"autoencoder": "dc_ae", "text_encoder": "gemma"}
XL = ROOT / "launch" / "recipes" / "t2i_xl.yaml"
KINDS = ("weights", "float32 masters", "AdamW averages", "averaged weights", "teacher")


def engine(name: str) -> dict[str, object]:
    return read_engine_file(ROOT / "ds_configs" / f"{name}.json")


def test_weights_optimiser_and_averages_are_what_the_tensors_hold(groups: Groups) -> None:
    found = groups.results(2, "weigh")[0]
    assert len(found) == 11
    for name, case in found.items():
        expected = {kind: case["estimate"].get(kind, 0) for kind in KINDS}
        assert case["measured"] == expected, name
        offloaded = "offload" in name
        assert ("AdamW averages" in case["on_host"]) == ("float32 masters" in case["on_host"]) == offloaded
        assert ("weights" in case["on_host"]) == name.startswith("zero3_offload")


@pytest.mark.parametrize("make_config", [text_config, class_config])
def test_activations_are_what_autograd_keeps(
    monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., ModelConfig]
) -> None:
    """With the kernels up to their launches: what is kept does not depend on what they would write."""
    config = make_config(hidden_size=64, num_heads=2, z_dim=None, depth=2)
    grids, lengths = ((6, 8), (6, 8)), (8, 8)
    x, t, r, segments, condition = random_pack(config, grids, lengths, dtype=torch.float32)
    sizes = {
        "tokens": segments.num_tokens,
        "text": sum(lengths) if config.condition == "text" else 0,
        "images": len(grids),
        "width": 4,
    }

    def measured(depth: int) -> int:
        network = TiM(replace(config, depth=depth))
        with without_running(monkeypatch) as launched, tim_kernels.use_path("triton"):
            kept = saved_bytes(lambda: network(x, t, r, segments, condition), apart_from=network.parameters())
        assert len(launched) >= 4
        return kept

    two, three = measured(2), measured(3)
    # Row statistics, sums a head and the indices of small packs are not all counted: 10 %.
    assert kept_by_block(config, **sizes) == pytest.approx(three - two, rel=0.10)
    around = kept_around_blocks(config, **sizes)
    assert 2 * kept_by_block(config, **sizes) + around == pytest.approx(two, rel=0.10)


def test_both_sides_of_a_difference_take_what_is_counted_while_they_pass_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the kernels as above. From the moment that the main stream has left the last block."""
    config = text_config(hidden_size=64, num_heads=2, z_dim=None, depth=2)
    grids, moving = ((2, 2), (2, 4)), 1
    x, t, r, segments, condition = random_pack(config, grids, (5, 4), dtype=torch.float32)
    tokens = 2 * segments.lengths[moving]
    copies = Copies((moving,), 2, torch.randn(tokens, x.shape[1]), torch.rand(2))
    network = TiM(config)
    evaluate = TransitionBlock._evaluate
    after: list[int] = []
    peaks: list[int] = []

    def watched(self: TransitionBlock, x_TD: torch.Tensor, *rest: Any) -> torch.Tensor:
        live.peak = live.now
        x_TD = evaluate(self, x_TD, *rest)
        after.append(live.now)
        peaks.append(live.peak)
        return x_TD

    monkeypatch.setattr(TransitionBlock, "_evaluate", watched)
    with without_running(monkeypatch) as launched, tim_kernels.use_path("triton"):
        with LiveBytes(network.parameters(), collects=False) as live:
            network(x, t, r, segments, condition)
        left = after[-1]
        with LiveBytes(network.parameters(), collects=False) as live:
            network(x, t, r, segments, condition, copies=copies)
    assert len(launched) >= 4
    counted = taken_by_copies(config, tokens=tokens, text=4, images=2, width=4)
    # Indices of small packs, and what the embedders of times leave, are not counted: 5 %.
    assert len(after) == 6 and counted == pytest.approx(peaks[-1] - left, rel=0.05)


def test_the_derivative_takes_memory_where_it_exceeds_what_the_backward_takes_later() -> None:
    zero2, ranks = engine("zero2"), Ranks(8, 8)
    parts = {}
    for checkpointing in ("true", "false"):
        changes = ["objective.derivative=dde", f"train.activation_checkpointing={checkpointing}"]
        found = estimate(load_recipe(XL, changes), zero2, ranks)
        parts[checkpointing] = {part.name: part.device for part in found.parts}
    # A block that is computed again and its backward take more than both sides in the forward.
    assert "derivative" not in parts["true"]
    recipe = load_recipe(XL)
    pack = recipe.data.tokens_per_pack
    images = pack // (IMAGE_SIDE_PIXELS // 32) ** 2
    assert recipe.data.text_encoder is not None and recipe.objective.diffusion_share == 0.5
    sides = taken_by_copies(
        recipe.model,
        tokens=pack,
        text=images * recipe.data.text_encoder.max_tokens // 2,
        images=images,
        width=2,
    )
    kept = parts["false"]
    assert kept["derivative"] == sides - kept["backward of one block"] > 0


def test_stages_and_ranks_split_what_they_say() -> None:
    recipe = load_recipe(XL)
    on = {name: estimate(recipe, engine(name), Ranks(8, 8)) for name in ("zero0", "zero1", "zero2", "zero3")}
    parameters = on["zero0"].parameters
    assert parameters == 864_978_080
    assert on["zero0"].part("AdamW averages").device == 8 * parameters
    for name in ("zero1", "zero2", "zero3"):
        # Padding: at most one element a parameter and rank.
        assert on[name].part("AdamW averages").device == pytest.approx(parameters, rel=1e-5)
    assert on["zero1"].part("gradients").device > 7.9 * on["zero2"].part("gradients").device
    totals = [on[name].device_bytes for name in ("zero0", "zero1", "zero2")]
    assert totals == sorted(totals, reverse=True)
    assert on["zero0"].checkpoint_bytes == 16 * parameters and on["zero0"].export_bytes == 4 * parameters


def test_snapshots_hold_the_averages_of_power_functions_alone(tmp_path: Path) -> None:
    averages = (
        "train.ema.averages=[{name: m, decay: 0.99}, {name: a, sigma_rel: 0.05}, {name: b, sigma_rel: 0.1}]"
    )
    settings = [averages, "train.ema.use=m", "train.ema.snapshots={every_steps: 1000}"]
    zero2 = engine("zero2")
    found = estimate(load_recipe(XL, settings), zero2, Ranks(8, 8))
    assert found.snapshot_bytes == 2 * 4 * found.parameters
    assert "one EMA snapshot     6.4 GiB on the disk" in found.table()
    without = estimate(load_recipe(XL, settings[:-1]), zero2, Ranks(8, 8))
    assert without.snapshot_bytes == 0 and "snapshot" not in without.table()


def test_recomputed_activations_guidance_and_encoders_are_counted() -> None:
    recipe, zero2 = load_recipe(XL), engine("zero2")
    ranks = Ranks(8, 8)
    plain = estimate(recipe, zero2, ranks).device_bytes
    kept = estimate(load_recipe(XL, ["train.activation_checkpointing=false"]), zero2, ranks)
    # 28 blocks instead of one and 28 inputs.
    assert kept.part("activations").device > 40 * GIB and kept.device_bytes - plain > 35 * GIB
    guided = load_recipe(XL, ["objective.guided_target={w_gt: 0.5, w_cond: 0.5, start: 0.0, end: 1.0}"])
    assert estimate(guided, zero2, ranks).part("teacher").device == pytest.approx(4 * 864_978_080, rel=1e-5)
    assert estimate(recipe, zero2, ranks, encoder_bytes=3 * GIB).device_bytes - plain == 3 * GIB
    half = load_recipe(XL, ["data.tokens_per_pack=16384"])
    smaller = estimate(half, zero2, ranks).part("block inputs").device
    assert 2 * smaller == estimate(recipe, zero2, ranks).part("block inputs").device


def test_frozen_encoders_are_counted_from_their_configs(tmp_path: Path) -> None:
    """Weights beside everything, a batch and a drawing where they take more than the step that follows."""
    save_autoencoders(tmp_path)
    save_t5(tmp_path / "t5")
    save_vision(tmp_path)
    changes = [
        f"data.autoencoder.path={tmp_path / 'dc_ae'}",
        f"data.text_encoder={{kind: t5, path: {tmp_path / 't5'}, max_tokens: 12}}",
        "data.encode_online=true",
        "data.tokens_per_pack=16",
        f"data.image_encoder={{kind: dino, path: {tmp_path / 'dinov2'}}}",
        "objective.repa_weight=0.5",
        "model.z_dim=16",
        "train.preview={every_steps: 10, prompts: [a], sizes: [64x256], num_steps: [1]}",
    ]
    recipe, zero2 = load_recipe(XL, changes), engine("zero2")
    found = estimate(recipe, zero2, Ranks(8, 8), image_tokens=4)
    # Four pictures of 2 x 2 tokens, of the tiny autoencoder's two pixels each, and of four patches.
    running = encoder_footprints(recipe.data, 4, (2, 2), patch_size=1, online=None)
    assert len(running) == 3 and found.unknown == ()
    assert found.part("frozen encoders").device == sum(one.weights for one in running.values()) > 50_000
    names = [part.name for part in found.parts]
    # What runs while training is not loaded again to draw.
    assert "decoder of pictures" not in names and "encoding of captions" not in names
    # So small a batch takes less than a step of this network, so large a picture more than of its packs.
    assert "encoding" not in names
    step = sum(part.device for part in _activations(recipe, _Pack.of(recipe, 4)))
    drawn = load_recipe(XL, [*changes[:-1], changes[-1].replace("64x256", "4096x4096")])
    larger = estimate(drawn, zero2, Ranks(8, 8), image_tokens=4).part("drawing").device
    # Guidance doubles the tokens of 32 x 32 pixels.
    work = sampling_bytes(recipe.model, 2 * (4096 // 32) ** 2)
    assert work > decode_bytes(build_autoencoder(recipe.data.autoencoder), 4096, 4096)
    assert larger == work - step
    stored = estimate(recipe, zero2, Ranks(8, 8), image_tokens=4, online=())
    image_encoder = running["image_encoder"].weights
    assert stored.part("frozen encoders").device == image_encoder < found.part("frozen encoders").device
    # Many large pictures: the batch exceeds what a step of so many tokens keeps.
    wide = encoder_memory(recipe, 4, 2**16, ("picture",))
    assert wide.encoding == max(
        one.peak
        for one in encoder_footprints(recipe.data, 4, (256, 256), patch_size=1, online=("picture",)).values()
    )


def test_one_rank_holds_what_pictures_are_drawn_with(tmp_path: Path) -> None:
    """All ranks an autoencoder where they share the pictures of a benchmark, none a text encoder for long."""
    save_autoencoders(tmp_path)
    save_t5(tmp_path / "t5")
    changes = [
        f"data.autoencoder.path={tmp_path / 'dc_ae'}",
        f"data.text_encoder={{kind: t5, path: {tmp_path / 't5'}, max_tokens: 12}}",
        "train.preview={every_steps: 10, prompts: [a], sizes: [64x256], num_steps: [1]}",
        "data.workers=0",
    ]
    recipe = load_recipe(XL, changes)
    decoder = encoder_memory(recipe, 1, 4, ()).waiting
    assert decoder == autoencoder_footprint(recipe.data.autoencoder, 1, 64, 64).weights > 10_000
    found = estimate(recipe, engine("zero2"), Ranks(16, 8))
    assert found.part("decoder of pictures").host == decoder
    assert found.host_bytes - found.host_bytes_of_others == decoder
    assert found.host_bytes_per_node == 8 * found.host_bytes_of_others + decoder
    benchmark = "train.evaluation={every_steps: 9, kinds: [], benchmarks: [{kind: dpg, size: 64x64}]}"
    shared = load_recipe(XL, [*changes, benchmark])
    for stage, everywhere in (("zero2", True), ("zero3", False)):
        node = estimate(shared, engine(stage), Ranks(16, 8))
        assert (node.host_bytes == node.host_bytes_of_others) == everywhere, stage
    # Beside nothing that comes later, a text encoder on its way counts.
    memory, text_encoder = encoder_memory(recipe, 1, 4, ()), recipe.data.text_encoder
    assert text_encoder is not None
    assert memory.preparing == text_footprint(text_encoder, 1).weights > 1_000
    later = [Part("loader", 0, 100, ""), Part("process", 0, 10**9, "")]
    parts = {part.name: part for part in _encoders(memory, 0, later)}
    assert parts["encoding of captions"].host == memory.preparing - 100
    assert parts["encoding of captions"].main_only


def test_encoders_whose_configs_are_not_here_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(XL), "data.encode_online=true", "data.autoencoder.path=nowhere"]
    arguments += ["--ds", str(ROOT / "ds_configs" / "zero2.json"), "--gpus", "8", "--card-gib", "80"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "not counted          data.autoencoder.path: 'nowhere' is neither a folder" in printed
    assert "a card of 80 GiB    fits, what is not counted aside" in printed
    assert main([*arguments, "--encoders-gib", "12"]) == 0
    printed = capsys.readouterr().out
    assert "not counted" not in printed and re.search(r"frozen encoders +12\.00 +-  as given", printed)


def test_adapters_are_what_trains_and_the_network_beneath_stands_still() -> None:
    targets = "targets: [attn.qkv, mlp.fc2]"
    recipe = load_recipe(
        XL, ["train.init_from=weights", f"train.adapter={{rank: 8, alpha: 8.0, {targets}}}", "train.ema={}"]
    )
    found = estimate(recipe, engine("zero1"), Ranks(1, 1))
    # qkv maps 1152 to 3456, fc2 3072 to 1152.
    assert found.parameters == 28 * 8 * (1152 + 3456 + 3072 + 1152)
    assert found.part("frozen weights").device == 4 * 864_978_080 == found.export_bytes
    assert found.part("AdamW averages").device == 8 * found.parameters
    assert found.checkpoint_bytes == 16 * found.parameters


def test_the_command_says_whether_a_card_holds_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(XL), "--ds", str(ROOT / "ds_configs" / "zero2_offload.json"), "--gpus", "1"]
    small = ["data.tokens_per_pack=8192", "--card-gib", "24"]
    assert main([*arguments, *small]) == 0
    printed = capsys.readouterr().out
    assert (
        "a card of 24 GiB    fits" in printed and "864,978,080 trained parameters, 1 GPU on 1 node" in printed
    )
    assert main([*arguments, "--card-gib", "8"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert main([*arguments, "data.packs_per_step=3", "--nodes", "2"]) == 2
    assert "expected a multiple of the number of ranks 2" in capsys.readouterr().err


def test_all_weights_are_fine_tuned_on_a_card_of_24_gib_encoders_included(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the released sizes; how much it is, `test_memory_tables.py` compares with ds_configs/README.md."""
    save_released_configs(tmp_path)
    paths = [f"data.{part}.path={tmp_path / kind}" for part, kind in RELEASED_ENCODERS.items()]
    recipe = ROOT / "launch" / "recipes" / "t2i_xl_finetune.yaml"
    engine_file = ROOT / "ds_configs" / "zero2_offload.json"
    assert main([str(recipe), "--ds", str(engine_file), "--gpus", "1", "--card-gib", "24", *paths]) == 0
    printed = capsys.readouterr().out
    assert "a card of 24 GiB    fits" in printed and "not counted" not in printed


@pytest.mark.gpu
def test_a_step_on_a_gpu_peaks_where_the_estimate_says(tmp_path: Path) -> None:
    """One GPU, one process: the peak of the allocator within the stated uncertainty."""
    from tests.trainer.ranks import run_ranks

    (found,) = run_ranks(_peak_of_a_step, tmp_path, world_size=1, out=tmp_path / "out", timeout_s=600)
    for name, (peak, low, high) in found.items():
        assert low <= peak <= high, (
            f"{name}: {peak / GIB:.2f} GiB, expected {low / GIB:.2f} to {high / GIB:.2f}"
        )


def _peak_of_a_step(folder: Path) -> dict[str, tuple[int, int, int]]:
    from tests.trainer.cases import micro_batches, take_step
    from tests.trainer.ranks import recipe, write_data
    from tim_ds.trainer.assembly import UNITS, build_root
    from tim_ds.trainer.ema import Ema
    from tim_ds.trainer.engine import Engine, start_world, stop_world
    from tim_ds.trainer.memory import RUNTIME_BYTES

    world = start_world()
    shards = write_data(folder / "shards")
    found = {}
    for name in ("zero1", "zero3"):
        settings = recipe(
            shards, "model.hidden_size=1024", "model.depth=8", "model.num_heads=16", "train.precision=bf16"
        )
        config = {
            **engine(name),
            "zero_optimization": {**json.loads(json.dumps(engine(name)))["zero_optimization"]},
        }
        config["zero_optimization"]["reduce_bucket_size"] = 10_000_000
        torch.cuda.reset_peak_memory_stats()
        built = Engine(
            build_root(settings, 1), config, settings.train, packs_per_step=4, world=world, units=UNITS
        )
        Ema(built, settings.train.ema)
        for batches in micro_batches(settings, world, 2):
            take_step(built, [batch.to(world.device) for batch in batches])
        predicted = estimate(settings, config, Ranks(1, 1))
        # The context and the libraries are outside of the allocator.
        middle = predicted.device_bytes - RUNTIME_BYTES
        found[name] = (
            torch.cuda.max_memory_allocated(),
            middle - predicted.device_spread,
            middle + predicted.device_spread,
        )
        del built
        torch.cuda.empty_cache()
    stop_world(world)
    return found
