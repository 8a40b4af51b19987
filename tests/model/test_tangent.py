"""The derivative that a forward carries, against forward mode in float64.

And what it, or copies that are carried, must leave alone: the value, its gradients, what autograd keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.networks import (
    CONFIGS,
    copies_of,
    derivative_along,
    in_dtype,
    normal,
    random_network,
    random_pack,
    relative,
    text_config,
)
from tim_ds.errors import ShapeError
from tim_ds.model import ops
from tim_ds.packed import Direction


def direction_of(pack: tuple[Any, ...], indices: tuple[int, ...]) -> Direction:
    x, t, _, segments, _ = pack
    tokens = sum(segments.lengths[i] for i in indices)
    return Direction(
        indices,
        normal(tokens, x.shape[1], seed=21).to(x.dtype),
        0.5 + normal(len(indices), seed=22).abs().to(t.dtype),
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_carried_derivative_is_that_of_derivative_along(config) -> None:
    network = random_network(config)
    pack = random_pack(config)
    # Neighbours (a slice), others in no order (an index), one image, one token, all.
    for indices in ((1, 2, 3), (3, 0, 2), (0,), (1,), (0, 1, 2, 3, 4)):
        direction = direction_of(pack, indices)
        expected = derivative_along(network, pack, direction)
        # float64 rounding of some hundred operations: 1e-15 seen
        assert relative(network(*pack, direction=direction).dF_TC, expected) < 1e-13


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_in_float32_and_with_bfloat16_products(config) -> None:
    pack = in_dtype(random_pack(config, dtype=torch.float32), torch.float32)
    wide_pack = in_dtype(pack, torch.float64)
    direction = direction_of(pack, (3, 0, 2))
    wide = replace(direction, dx_TC=direction.dx_TC.double(), dt_S=direction.dt_S.double())
    network = random_network(config, dtype=torch.float32)
    expected = derivative_along(random_network(config, dtype=torch.float32).double(), wide_pack, wide)
    # 1e-6 seen: 6e-8 a rounding
    assert relative(network(*pack, direction=direction).dF_TC, expected) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        carried = network(*pack, direction=direction).dF_TC
    # bfloat16 keeps 8 bits, 2^-9 a rounding: 0.5 to 1.4 % seen
    assert 1e-4 < relative(carried, expected) < 0.03


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 products"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", ["text t-r", "text-plain", "class-p2"])
def test_value_and_gradients_are_the_same_bits_with_and_without(name, recompute, autocast) -> None:
    config = CONFIGS[name]
    network = random_network(config, dtype=torch.float32)
    network.checkpoint_blocks = recompute
    x, t, r, segments, condition = in_dtype(random_pack(config, dtype=torch.float32), torch.float32)
    # As in training.
    pack = (x, t.double(), r.double(), segments, condition)

    def run(**beside: Any) -> tuple[list[Tensor], int, Tensor | None]:
        kept = 0

        def count(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        network.zero_grad()
        x = pack[0].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                out = network(x, *pack[1:], with_features=True, **beside)
            after_forward = kept
        assert out.features_TZ is not None
        (out.F_TC.square().mean() + out.features_TZ.square().mean()).backward()
        gradients = [p.grad for p in [x, *network.parameters()] if p.grad is not None]
        carried = out.copies_F_TC if out.dF_TC is None else out.dF_TC
        return [out.F_TC, out.features_TZ, *gradients], after_forward, carried

    plain, kept_plain, nothing = run()
    assert len(plain) > 50 and nothing is None
    for beside in ({"direction": direction_of(pack, (0, 3))}, {"copies": copies_of(pack, (0, 3))}):
        carrying, kept_carrying, carried = run(**beside)
        assert all(torch.equal(a, b) for a, b in zip(plain, carrying, strict=True))
        assert kept_plain == kept_carrying, "what is carried keeps something for the backward"
        assert carried is not None and not carried.requires_grad and carried.norm() > 0.1


def test_recomputation_leaves_the_tangent_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = text_config()
    network = random_network(config)
    pack = random_pack(config)
    direction = direction_of(pack, (0, 3))
    calls = {"value": 0, "tangent": 0}

    def counted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(ops, "attention", counted("value", ops.attention))
    monkeypatch.setattr(ops, "attention_tangent", counted("tangent", ops.attention_tangent))
    plain = network(*pack, direction=direction).dF_TC
    per_forward = 2 * config.depth
    assert calls == {"value": per_forward, "tangent": per_forward}
    network.checkpoint_blocks = True
    out = network(*pack, direction=direction)
    out.F_TC.sum().backward()
    assert calls == {"value": 3 * per_forward, "tangent": 2 * per_forward}
    assert plain is not None and out.dF_TC is not None and torch.equal(out.dF_TC, plain)


def test_an_image_that_stands_still_cannot_reach_the_derivative_of_others() -> None:
    config = text_config()
    network = random_network(config)
    pack = random_pack(config)
    direction = direction_of(pack, (0, 3))
    before = network(*pack, direction=direction).dF_TC
    x = pack[0].clone()
    x[pack[3].token_index([1, 2, 4])] = float("nan")
    after = network(x, *pack[1:], direction=direction).dF_TC
    assert before is not None and after is not None and torch.equal(before, after)


def test_neighbours_that_share_a_caption_are_carried_like_others() -> None:
    config = text_config()
    network = random_network(config)
    grids = [(3, 5), (1, 1), (4, 2), (2, 2)]
    *pack, condition = random_pack(config, grids, (4, 3))
    shared = (*pack, replace(condition, images_per_caption=2))
    direction = direction_of(shared, (3, 0, 1))
    expected = derivative_along(network, shared, direction)
    assert relative(network(*shared, direction=direction).dF_TC, expected) < 1e-13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": ()}, "at least one"),
        ({"indices": (0, 0)}, "different segments"),
        ({"indices": (0, 5)}, "among the 5 of the pack"),
        ({"indices": (0, 1)}, "expected dx_TC \\[16, 4\\]"),
        ({"dt_S": torch.ones(1)}, "dt_S \\[2\\]"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(change, message) -> None:
    config = text_config()
    pack = random_pack(config)
    direction = replace(direction_of(pack, (0, 3)), **change)
    with pytest.raises(ShapeError, match=message):
        random_network(config)(*pack, direction=direction)
