"""The network on packs: segments do not see each other, packing changes nothing, wrong packs are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.model.networks import class_config, random_network, random_pack, text_config
from tim_ds.errors import ConfigError, ShapeError
from tim_ds.model.blocks import TransitionBlock
from tim_ds.model.config import ModelConfig
from tim_ds.model.export_folder import meta_network
from tim_ds.model.init import initial_values, initialise
from tim_ds.model.tim import TiM
from tim_ds.packed import ClassCondition, Segments, TextCondition

CONFIGS = {
    "text": text_config(),
    "text-reference-rope": text_config(rope_layout="reference"),
    "text-plain": text_config(qk_norm=False, distance_aware=False, separate_interval_embedder=False),
    "class-p2": class_config(),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_packed_equals_one_by_one(config):
    network = random_network(config)
    x, t, r, segments, condition = random_pack(config)
    together = network(x, t, r, segments, condition, with_features=True)
    for i in range(segments.num_segments):
        token = segments.token_index([i])
        alone = network(
            x[token], t[[i]], r[[i]], segments.select([i]), condition.select([i]), with_features=True
        )
        # float64; sums run in another order because matrix products are blocked by the number of rows
        torch.testing.assert_close(together.F_TC[token], alone.F_TC, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(together.features_TZ[token], alone.features_TZ, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_changing_one_image_leaves_the_others_bit_equal(config, dtype):
    network = random_network(config, dtype=dtype)
    x, t, r, segments, condition = random_pack(config, dtype=dtype)
    before = network(x, t, r, segments, condition).F_TC
    for i in range(segments.num_segments):
        changed = x.clone()
        changed[segments.token_index([i])] = float("nan")
        times = t.clone()
        times[i] = 0.123
        after = network(changed, times, r, segments, condition).F_TC
        others = [j for j in range(segments.num_segments) if j != i]
        token = segments.token_index(others)
        assert torch.equal(before[token], after[token]), f"image {i} leaks into another"
        assert after[segments.token_index([i])].isnan().all()


def test_changing_one_caption_leaves_the_other_images_bit_equal():
    config = CONFIGS["text"]
    network = random_network(config)
    x, t, r, segments, condition = random_pack(config)
    before = network(x, t, r, segments, condition).F_TC
    states = condition.states_LE.clone()
    states[condition.segments.token_index([2]), ::2] += 1.0  # not all channels: the norm removes a constant
    after = network(x, t, r, segments, TextCondition(states, condition.segments)).F_TC
    moved = segments.token_index([2])
    others = segments.token_index([0, 1, 3, 4])
    assert torch.equal(before[others], after[others])
    assert (before[moved] - after[moved]).abs().max() > 1e-3


def test_neighbours_may_share_a_caption_which_is_then_embedded_once():
    config = CONFIGS["text"]
    network = random_network(config)
    grids = [(3, 5), (1, 1), (4, 2), (2, 2), (2, 2), (1, 3)]
    x, t, r, segments, condition = random_pack(config, grids, (4, 0, 3))
    shared = replace(condition, images_per_caption=2)
    rows = []
    network.y_embedder.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    first = network.blocks[0]
    assert isinstance(first, TransitionBlock) and first.cross_attn is not None
    first.cross_attn.kv.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    together = network(x, t, r, segments, shared).F_TC
    assert rows == [7, 7]
    apart = network(x, t, r, segments, condition.select([0, 0, 1, 1, 2, 2])).F_TC
    # float64; products of other numbers of rows
    torch.testing.assert_close(together, apart, rtol=1e-11, atol=1e-12)


def test_order_of_images_in_the_pack_does_not_matter():
    config = CONFIGS["text"]
    network = random_network(config)
    x, t, r, segments, condition = random_pack(config)
    order = [3, 0, 4, 2, 1]
    token = segments.token_index(order)
    shuffled = network(x[token], t[order], r[order], segments.select(order), condition.select(order)).F_TC
    torch.testing.assert_close(
        network(x, t, r, segments, condition).F_TC[token], shuffled, rtol=1e-11, atol=1e-12
    )


def test_fresh_network_is_zero_and_its_blocks_are_the_identity():
    config = text_config()
    torch.manual_seed(0)
    network = TiM(config)
    x, t, r, segments, condition = random_pack(config, dtype=torch.float32)
    seen = {}
    network.blocks[1].register_forward_hook(lambda _, args, out: seen.update(inside=args[0], out=out))
    output = network(x, t, r, segments, condition).F_TC
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(seen["inside"], seen["out"])


def test_initialisation_follows_the_table():
    torch.manual_seed(0)
    network = TiM(text_config(hidden_size=256, num_heads=4))
    std = {name: p.std().item() for name, p in network.named_parameters() if p.ndim > 1}
    assert std["t_embedder.mlp.2.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["y_embedder.mlp.fc2.weight"] == pytest.approx(0.02, rel=0.05)
    # Xavier-uniform: variance 2 / (fan_in + fan_out); the interval embedder is not re-initialised
    assert std["delta_embedder.mlp.2.weight"] == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert std["blocks.0.attn.qkv.weight"] == pytest.approx((2 / (256 + 768)) ** 0.5, rel=0.05)
    assert std["blocks.0.adaLN_modulation.fc2.weight"] == 0.0
    assert std["final_layer.linear.weight"] == 0.0


@pytest.mark.parametrize("make_config", [text_config, class_config])
def test_a_first_value_depends_on_seed_and_name_alone(make_config: Callable[..., ModelConfig]):
    small, deep = (meta_network(make_config(depth=depth, z_dim=16, encoder_depth=1)) for depth in (2, 3))
    make, of_deep, other = initial_values(small, 3), initial_values(deep, 3), initial_values(small, 4)
    drawn = 0
    for name, parameter in reversed(list(small.named_parameters())):
        value = make(name, parameter)
        assert value.shape == parameter.shape and bool(value.isfinite().all()), name
        assert torch.equal(value, of_deep(name, parameter)), name
        if value.unique().numel() > 1:
            assert not torch.equal(value, other(name, parameter)), name
            drawn += 1
    assert drawn > 15
    network = TiM(make_config(z_dim=16, encoder_depth=1, depth=2))
    initialise(network, 3)
    assert all(torch.equal(make(name, value), value) for name, value in network.named_parameters())


def test_activation_checkpointing_changes_no_gradient():
    config = text_config()
    network = random_network(config)
    pack = random_pack(config)

    def gradients(checkpoint: bool) -> list[torch.Tensor]:
        network.checkpoint_blocks = checkpoint
        network.zero_grad()
        network(*pack).F_TC.square().mean().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) > 50
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_output_is_float32_under_autocast_and_with_bfloat16_weights():
    config = text_config()
    x, t, r, segments, condition = random_pack(config, dtype=torch.float32)
    t, r = t.double(), r.double()  # as in training
    exact = random_network(config, dtype=torch.float32)(x, t, r, segments, condition).F_TC
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = random_network(config, dtype=torch.float32)(x, t, r, segments, condition).F_TC
    stored = random_network(config, dtype=torch.float32).to(torch.bfloat16)(x, t, r, segments, condition).F_TC
    assert exact.dtype == torch.float32
    for F in (cast, stored):
        assert F.dtype == torch.float32
        # bf16 keeps 8 bits: relative error 2^-9 a rounding, about 2 % after three blocks of random weights
        assert (F - exact).norm() / exact.norm() < 0.05
        assert not torch.equal(F, exact)


@pytest.mark.parametrize("kind", ["t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r"])
def test_every_time_condition_reacts_to_its_times(kind):
    config = text_config(time_condition=kind)
    network = random_network(config)
    x, t, r, segments, condition = random_pack(config)
    base = network(x, t, r, segments, condition).F_TC
    assert (network(x, t + 0.1, r, segments, condition).F_TC - base).abs().max() > 1e-4
    assert (network(x, t, r - 0.1, segments, condition).F_TC - base).abs().max() > 1e-4


def _break(pack, **changes):
    names = ("x_TC", "t_S", "r_S", "segments", "condition")
    return {**dict(zip(names, pack, strict=True)), **changes}


def test_a_pack_that_does_not_fit_is_refused_by_name():
    config = text_config()
    network = random_network(config)
    pack = random_pack(config)
    x, t, _, _, condition = pack
    cases = [
        ("x_TC: expected", {"x_TC": x[:-1]}),
        ("r_S: expected", {"r_S": t[:-1]}),
        ("takes a TextCondition", {"condition": ClassCondition(torch.zeros(5, dtype=torch.int64))}),
        ("one for each of 5 images", {"condition": condition.select([0, 1])}),
        ("expected width 12", {"condition": TextCondition(condition.states_LE[:, :-1], condition.segments)}),
    ]
    for message, change in cases:
        with pytest.raises(ShapeError, match=message):
            network(**_break(pack, **change))
    without = random_network(text_config(z_dim=None))
    with pytest.raises(ShapeError, match="without projector"):
        without(*pack, with_features=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "model.num_heads"),
        ({"text_dim": None}, "model.text_dim"),
        ({"encoder_depth": 9}, "model.encoder_depth"),
        ({"depth": 0}, "model.depth"),
        ({"condition": "class"}, "model.num_classes"),
    ],
)
def test_an_impossible_architecture_is_refused_by_key(change, message):
    with pytest.raises(ConfigError, match=message):
        text_config(**change)


def test_network_of_a_single_pixel_image():
    config = class_config(patch_size=1)
    network = random_network(config)
    out = network(*random_pack(config, grids=[(1, 1)])).F_TC
    assert out.shape == (1, 4)
    assert out.isfinite().all()


def test_text_of_length_zero_contributes_nothing():
    config = text_config()
    network = random_network(config)
    x, t, r, _, _ = random_pack(config, grids=[(2, 2)], text_lengths=[3])
    segments = Segments.from_grids([(2, 2)])
    empty = TextCondition(torch.zeros(0, 12, dtype=torch.float64), Segments.from_lengths([0]))
    out = network(x, t, r, segments, empty).F_TC
    assert out.isfinite().all()
