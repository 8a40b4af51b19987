"""Steps of the benchmark on a CUDA device that computes nothing: devices, launches, and who waits for it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from torch import Tensor

from tests.fake_cuda import DEVICE
from tests.test_on_fake_cuda import device, network_on_device
from tests.trainer.bench.recipes import TEXT, recipe, work
from tim_ds.trainer.bench import contenders
from tim_ds.trainer.bench.contenders import IN_ORDER, OURS, Baseline, Ours, PlainEngine, shared_baseline
from tim_ds.trainer.bench.work import Work, as_inputs
from tim_ds.trainer.step import TransitionStep


def on_device(everything: Work) -> Work:
    def moved(batch: Any) -> Any:
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        return replace(batch, **{k: v.to(DEVICE) for k, v in values.items() if isinstance(v, Tensor)})

    return replace(everything, batches=tuple(moved(batch) for batch in everything.batches))


def test_a_step_stays_on_the_device_and_waits_for_nothing_but_our_norm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = recipe(TEXT, "model.depth=1", "model.encoder_depth=1")
    host = work(settings)
    inputs = as_inputs(host, settings)
    norms: list[bool] = []

    def clip_and_step(parameters: Any, optimizer: Any, grad_clip: float, *, refuse: bool) -> None:
        # A fake gradient has no norm to read: that it is read is the whole difference.
        norms.append(refuse)
        assert all(p.grad is not None and p.grad.device == DEVICE for p in parameters)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with device(monkeypatch, may_wait=True) as seen:
        network = network_on_device(settings.model)
        root = TransitionStep(
            network, settings.objective, latent_channels=settings.model.in_channels, world_size=1
        )
        engine = PlainEngine(root, settings, DEVICE)
        monkeypatch.setattr(contenders, "clip_and_step", clip_and_step)
        monkeypatch.setattr(contenders, "as_inputs", lambda *_: inputs.to(DEVICE))
        baseline = shared_baseline(settings, network)
        everyone: list[Any] = [Baseline("baseline", "dde", settings, baseline, engine.optimizer, DEVICE)]
        everyone += [
            Ours(implementation, objective, settings, root, engine)
            for implementation, objective in IN_ORDER
            if implementation in OURS and objective != "flow matching"
        ]
        for contender in everyone:
            step = contender.prepare(on_device(host))
            waits = len(seen.waits)
            step()
            # The baseline makes its rotary tables on the host, once.
            assert (len(seen.waits) > waits) == (contender.implementation == "baseline")
            waits, launches = len(seen.waits), len(seen.launches)
            denoising = step()
            assert seen.waits[waits:] == [] and denoising.device == DEVICE and denoising.shape == (8,)
            assert (len(seen.launches) > launches) == (contender.implementation == "ours")
    assert norms == [False, False] + [True] * 8
