"""Copies of some images that pass the network behind the main stream, and the difference they give."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.model.networks import (
    CONFIGS,
    copies_of,
    normal,
    random_network,
    random_pack,
    relative,
    text_config,
)
from tim_ds.errors import ShapeError
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.derivative import central_difference
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.target import output_and_parts
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import OTFM
from tim_ds.packed import Copies


def alone(network, pack, copies: Copies) -> torch.Tensor:
    """F at the copies by a call of their own."""
    _, _, r, segments, condition = pack
    originals = [i for i in copies.indices for _ in range(copies.count)]
    with torch.no_grad():
        return network(
            copies.x_TC, copies.t_S, r[originals], segments.select(originals), condition.select(originals)
        ).F_TC


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_copies_are_what_a_call_of_their_own_gives(config) -> None:
    network = random_network(config)
    pack = random_pack(config)
    for indices, count in (((1, 2, 3), 2), ((3, 0, 2), 2), ((0,), 3), ((1,), 1), ((0, 1, 2, 3, 4), 2)):
        copies = copies_of(pack, indices, count)
        received = network(*pack, copies=copies).copies_F_TC
        # float64 rounding; products of other numbers of rows
        assert relative(received, alone(network, pack, copies)) < 1e-13


def test_neighbours_that_share_a_caption_are_copied_like_others() -> None:
    config = text_config()
    network = random_network(config)
    *pack, condition = random_pack(config, [(3, 5), (1, 1), (4, 2), (2, 2)], (4, 3))
    shared = (*pack, replace(condition, images_per_caption=2))
    copies = copies_of(shared, (3, 0, 1))
    assert relative(network(*shared, copies=copies).copies_F_TC, alone(network, shared, copies)) < 1e-13


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_captions_and_features_are_computed_once_and_a_recomputed_block_does_not_repeat_its_copies(
    recompute: bool,
) -> None:
    config = text_config()
    network = random_network(config)
    network.checkpoint_blocks = recompute
    pack = random_pack(config)
    calls: Counter[str] = Counter()
    block = network.blocks[0]
    modules = {"embedder": network.y_embedder, "features": network.projector}
    modules |= {"text": block.cross_attn.kv, "mlp": block.mlp}  # type: ignore[union-attr]
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))  # type: ignore[union-attr]
    network(*pack, with_features=True, copies=copies_of(pack, (0, 3))).F_TC.sum().backward()
    # The main stream passes a recomputed block twice, the copies once.
    twice = 1 + recompute
    assert calls == {"embedder": 1, "features": 1, "text": twice, "mlp": twice + 1}


@pytest.mark.parametrize("spoiled", [(0, 3), (1, 2, 4)], ids=["originals", "others"])
def test_no_value_of_the_pack_reaches_the_copies(spoiled) -> None:
    """They have states of their own; of the pack they read captions and r."""
    config = text_config()
    network = random_network(config)
    pack = random_pack(config)
    copies = copies_of(pack, (0, 3))
    before = network(*pack, copies=copies).copies_F_TC
    x = pack[0].clone()
    x[pack[3].token_index(spoiled)] = float("nan")
    after = network(x, *pack[1:], copies=copies).copies_F_TC
    assert before is not None and after is not None and torch.equal(before, after)


@pytest.mark.parametrize("name", ["text t-r", "class-p2"])
def test_the_carried_difference_is_the_published_one_in_two_passes(name: str) -> None:
    """F(t + e) and F(t - e) as two calls, each with its own captions; also where all or one segment move."""
    config = CONFIGS[name]
    network = random_network(config)
    x, t, r, segments, condition = random_pack(config)
    z = normal(*x.shape, seed=30)
    transport, e = OTFM(), 0.005
    objective = ObjectiveConfig(derivative="dde", derivative_step=e)
    for indices in ((0, 2, 3), (1,), (0, 1, 2, 3, 4), ()):
        moves = torch.isin(torch.arange(len(t)), torch.tensor(indices))
        times = Times.from_tensors(transport, t, torch.where(moves, r, t))
        images = NoisedPack(transport, x, z, times, segments, condition)
        _, parts = output_and_parts(network, objective, images)
        received = parts.dF_dt_TC
        if received is None:
            assert not indices
            continue
        sides = []
        for side in (t + e, t - e):
            x_t = transport.interpolate(x, z, segments.expand(side)[:, None])
            with torch.no_grad():
                sides.append(network(x_t, side, times.r_S, segments, condition).F_TC)
        expected = ((sides[0] - sides[1]) / (2 * e)) * segments.expand(moves.double())[:, None]
        # float64 rounding of F divided by 2e; products of other numbers of rows
        torch.testing.assert_close(received, expected, rtol=1e-10, atol=1e-11)
        own = central_difference(network, images, indices, e)
        torch.testing.assert_close(received[segments.token_index(indices)], own, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": ()}, "at least one"),
        ({"indices": (0, 0)}, "different segments"),
        ({"indices": (0, 5)}, "among the 5 of the pack"),
        ({"count": 1}, "expected x_TC \\[19, 4\\]"),
        ({"t_S": torch.ones(1)}, "t_S \\[4\\]"),
    ],
)
def test_copies_that_do_not_fit_are_refused(change, message) -> None:
    config = text_config()
    pack = random_pack(config)
    with pytest.raises(ShapeError, match=message):
        random_network(config)(*pack, copies=replace(copies_of(pack, (0, 3)), **change))
