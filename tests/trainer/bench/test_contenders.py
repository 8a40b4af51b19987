"""Who is timed: one set of weights that stays what it is, and steps that are whole training steps."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from tests.trainer.bench.recipes import CLASSES, TEXT, recipe, work
from tim_ds.errors import ConfigError
from tim_ds.trainer.bench.contenders import (
    IN_ORDER,
    Baseline,
    build_field,
    check_recipe,
    clear,
    objective_of,
)
from tim_ds.trainer.bench.measure import FLOAT32_TOLERANCE, work_of
from tim_ds.trainer.bench.work import Work, as_inputs

CPU = torch.device("cpu")


def field_of(settings: Any, wanted: Any = IN_ORDER) -> Any:
    return build_field(settings, CPU, engine="plain", wanted=wanted, backend="eager")


# Tracing takes seconds: once is enough.
UNCOMPILED = [pair for pair in IN_ORDER if pair[0] != "baseline, compiled"]
ONCE_COMPILED = [pair for pair in IN_ORDER if pair != ("baseline, compiled", "flow matching")]


@pytest.mark.parametrize(
    ("kind", "wanted"), [(TEXT, ONCE_COMPILED), (CLASSES, UNCOMPILED)], ids=["text", "classes"]
)
def test_all_contenders_agree_in_float32(kind: Any, wanted: Any) -> None:
    settings = recipe(kind, "train.activation_checkpointing=true", "model.depth=2")
    everything, field = work(settings), field_of(settings, wanted)
    assert [(c.implementation, c.objective) for c in field.contenders] == list(wanted)
    for contender in field.contenders:
        own = work_of(contender, everything)
        expected, received = field.reference.check(own), contender.check(own)
        # Rounding of float32; the difference divides it by 0.01, and is off from the tangent in second order.
        allowed = 1e-5 if contender.objective == "flow matching" else 5e-4
        assert allowed < FLOAT32_TOLERANCE[contender.objective]
        assert torch.allclose(received.denoising, expected.denoising, rtol=allowed, atol=0.0)
        assert set(received.gradient) == set(expected.gradient) and len(received.gradient) > 40
        distance = sum((received.gradient[k] - g).square().sum() for k, g in expected.gradient.items())
        whole = sum(g.square().sum() for g in expected.gradient.values())
        assert 0 <= distance < allowed**2 * whole


def test_a_step_is_a_whole_one_and_leaves_the_weights_where_they_are() -> None:
    settings = recipe(TEXT)
    everything = work(settings)
    wanted = [("ours", "dde"), ("ours", "paired"), ("baseline", "dde")]
    field = field_of(settings, wanted)
    before = [p.detach().clone() for p in field.parameters]
    state = field.engine.optimizer.state
    for number, contender in enumerate(field.contenders, start=1):
        step = contender.prepare(everything)
        first, second = step(), step()
        assert torch.equal(first, second) and first.shape == (8,)
        assert torch.allclose(first, contender.check(everything).denoising, rtol=1e-6)
        assert all(torch.equal(p, q) for p, q in zip(field.parameters, before, strict=True))
        # One optimiser, which did its work: its averages moved.
        assert {float(state[p]["step"]) for p in field.parameters} == {2.0 * number}
        assert all(bool((state[p]["exp_avg_sq"] > 0).any()) for p in field.parameters)
        assert all(p.grad is None for p in field.parameters)


def test_baseline_and_ours_hold_the_same_tensors() -> None:
    field = field_of(recipe(TEXT), [("ours", "dde"), ("baseline", "dde")])
    theirs = {id(p) for c in field.contenders if isinstance(c, Baseline) for p in c.parameters}
    assert theirs == {id(p) for p in field.parameters}


def test_a_pack_mixes_what_the_baseline_keeps_apart() -> None:
    settings = recipe(TEXT)
    everything = work(settings)
    inputs, order = as_inputs(everything, settings), everything.order().tolist()
    assert sorted(order) == list(range(8)) != order
    assert inputs.segments.grids == tuple(everything.grids[i] for i in order)
    assert {everything.grids[i] for i in order[:4]} == {(2, 3), (2, 2)}
    is_diffusion = everything.is_diffusion
    assert inputs.times.is_diffusion == tuple(is_diffusion[i] for i in order)
    assert sum(is_diffusion) == 4 and set(everything.transition) <= {2, 3, 6, 7}
    assert work_of(field_of(settings, [("ours", "flow matching")]).contenders[0], everything).transition == ()


def test_the_sample_has_both_kinds_of_every_size_and_knows_its_places() -> None:
    settings = recipe(TEXT)
    everything = work(settings, [((64, 64), 40), ((1024, 1024), 8), ((2048, 2048), 4)])
    sample = everything.sample()
    assert [len(b.t) for b in sample.batches] == [40, 2, 2]
    for batch in sample.batches:
        assert 0 < batch.num_diffusion < len(batch.t)
    z = [image for batch in everything.batches for image in batch.z]
    chosen = [image for batch in sample.batches for image in batch.z]
    assert all(torch.equal(z[i], c) for i, c in zip(everything.places_of_sample(), chosen, strict=True))
    assert isinstance(sample, Work) and sum(sample.is_diffusion) == 22


def test_what_the_baseline_does_not_have_is_named() -> None:
    settings = recipe(
        TEXT,
        "objective.transport={kind: tim}",
        "objective.weight.adaptive_over=kind",
        "model.time_condition=r",
        "train.precision=bf16",
    )
    with pytest.raises(ConfigError) as error:
        check_recipe(settings)
    named = ("model.time_condition", "objective.transport.kind", "objective.weight", "train.precision")
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == list(named)


def test_without_deepspeed_its_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--engine deepspeed: deepspeed is not installed"):
        build_field(recipe(TEXT), CPU, engine="deepspeed")


def test_flow_matching_is_the_recipe_without_a_derivative() -> None:
    objective = recipe(TEXT).objective
    assert objective_of("flow matching", objective).diffusion_share == 1.0
    assert objective_of("paired", objective).derivative == "paired"
    assert objective_of("dde", objective) == objective


def test_what_a_failure_left_behind_is_forgotten() -> None:
    field = field_of(recipe(TEXT), [("ours", "dde")])
    for parameter in field.parameters:
        parameter.grad = torch.zeros_like(parameter)
    clear(field.parameters, CPU)
    assert all(p.grad is None for p in field.parameters)
