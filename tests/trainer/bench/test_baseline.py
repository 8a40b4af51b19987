"""The baseline against ours: two implementations of one method that share no line, in float64."""

from __future__ import annotations

import ast
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.networks import random_network
from tests.trainer.bench.recipes import CLASSES, TEXT, recipe, work
from tim_ds.model.ops import transition_loss_terms
from tim_ds.objective.loss import transition_loss
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import build_transport
from tim_ds.packed import ClassCondition, Segments, TextCondition, patchify
from tim_ds.trainer.bench import baseline_network, baseline_step
from tim_ds.trainer.bench.baseline_step import Batch, batch_loss
from tim_ds.trainer.bench.contenders import baseline_network as build_baseline

# Rounding of float64, which the central difference divides by 0.01.
TOLERANCE = 1e-10

CASES = {
    "text": (TEXT, ()),
    "text, reference positions": (TEXT, ("model.rope_layout=reference",)),
    "classes, patches of 2, projector": (CLASSES, ()),
}


def _relative(received: torch.Tensor | None, expected: torch.Tensor) -> float:
    assert received is not None and received.shape == expected.shape
    return float((received - expected).detach().norm() / expected.detach().norm())


def _both(name: str) -> tuple[Any, Any, Any, Any, Batch]:
    """Recipe, our network, the baseline with its weights, and a batch of images that are not square."""
    kind, overrides = CASES[name]
    settings = recipe(kind, *overrides)
    ours = random_network(settings.model)
    theirs = build_baseline(settings.model).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    batch = work(settings, [((64, 96), 6)]).batches[0]
    y = batch.y.double() if batch.y.is_floating_point() else batch.y
    features = None if batch.features is None else batch.features.double()
    batch = Batch(
        batch.x.double(),
        batch.z.double(),
        batch.t.double(),
        batch.r.double(),
        batch.num_diffusion,
        y,
        features,
    )
    return settings, ours, theirs, build_transport(settings.objective.transport), batch


def _pack(settings: Any, batch: Batch) -> tuple[Any, ...]:
    """The batch as our objective takes it."""
    p = settings.model.patch_size
    grid = batch.x.shape[2] // p, batch.x.shape[3] // p
    segments = Segments.from_grids([grid] * len(batch.t))
    x_TC, z_TC = (torch.cat([patchify(image, p) for image in images]) for images in (batch.x, batch.z))
    condition: Any = ClassCondition(batch.y)
    if batch.y.ndim == 3:
        lengths = Segments.from_lengths([batch.y.shape[1]] * len(batch.t))
        condition = TextCondition(batch.y.flatten(0, 1), lengths)
    return x_TC, z_TC, segments, condition


@pytest.mark.parametrize("name", CASES)
def test_output_and_features_are_ours(name: str) -> None:
    settings, ours, theirs, _, batch = _both(name)
    x_TC, _, segments, condition = _pack(settings, batch)
    with_features = batch.features is not None
    expected = ours(x_TC, batch.t, batch.r, segments, condition, with_features=with_features)
    received, features = theirs(batch.x, batch.t, batch.r, batch.y, with_features=with_features)
    tokens = torch.cat([patchify(image, settings.model.patch_size) for image in received])
    assert _relative(tokens, expected.F_TC) < TOLERANCE
    if with_features:
        assert _relative(features.flatten(0, 1), expected.features_TZ) < TOLERANCE
    else:
        assert features is None


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient_are_ours(name: str) -> None:
    settings, ours, theirs, transport, batch = _both(name)
    x_TC, z_TC, segments, condition = _pack(settings, batch)
    first = batch.num_diffusion
    assert 0 < first < len(batch.t) - 1 and batch.r[-1] == 0 < batch.r[first]
    times = Times.from_tensors(transport, batch.t, batch.r, tuple(i < first for i in range(len(batch.t))))
    features = None if batch.features is None else batch.features.flatten(0, 1)
    terms = transition_loss(
        ours,
        transport,
        settings.objective,
        x_TC,
        z_TC,
        times,
        segments,
        condition,
        latent_channels=settings.model.in_channels,
        features_TZ=features,
        terms_of_images=transition_loss_terms,
    )
    assert settings.objective.derivative == "dde"
    terms.total_S.sum().backward()
    weight = settings.objective.repa_weight
    loss = batch_loss(theirs, batch, autocast=nullcontext, alignment_weight=weight)
    loss.total.backward()
    assert _relative(loss.denoising, terms.denoising_S) < TOLERANCE
    assert _relative(loss.total.detach(), terms.total_S.detach().sum()) < TOLERANCE
    expected = {name: p.grad for name, p in ours.named_parameters()}
    received = {name: p.grad for name, p in theirs.named_parameters()}
    assert len(expected) > 50 and set(received) == set(expected)
    whole = max(float(g.norm()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        assert gradient is not None, name
        # Some are zero but for rounding: the bias of a key's norm cancels in the softmax.
        error = float((received[name] - gradient).norm())
        assert error < TOLERANCE * max(float(gradient.norm()), 1e-3 * whole), name


def test_a_batch_that_trains_r_equal_t_alone_makes_no_other_forward() -> None:
    _, _, theirs, _, batch = _both("text")
    calls: list[int] = []
    theirs.register_forward_hook(lambda module, args, output: calls.append(len(args[1])))
    still = replace(batch, r=batch.t, num_diffusion=len(batch.t))
    batch_loss(theirs, still, autocast=nullcontext)
    assert calls == [6]
    batch_loss(theirs, batch, autocast=nullcontext)
    assert calls == [6, 6, 3, 3]


def test_recomputed_blocks_have_the_same_gradients() -> None:
    _, _, theirs, _, batch = _both("text")

    def gradients() -> list[torch.Tensor]:
        theirs.zero_grad()
        batch_loss(theirs, batch, autocast=nullcontext).total.backward()
        return [p.grad.clone() for p in theirs.parameters()]

    kept = gradients()
    theirs.checkpoint_blocks = True
    assert all(torch.equal(a, b) for a, b in zip(gradients(), kept, strict=True))


def test_under_autocast_the_residual_is_bfloat16_and_the_loss_is_not() -> None:
    """As the authors train: this is what makes their derivative noisy, and what a step of theirs costs."""
    settings = recipe(TEXT)
    theirs = build_baseline(settings.model)
    dtypes: list[torch.dtype] = []
    for block in theirs.blocks:
        block.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    batch = work(settings, [((64, 64), 4)]).batches[0]
    loss = batch_loss(theirs, batch, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    assert set(dtypes) == {torch.bfloat16} and len(dtypes) == 9
    assert loss.total.dtype == loss.denoising.dtype == torch.float32


def test_it_imports_nothing_of_ours() -> None:
    allowed = {"torch", "__future__", "math", "typing", "collections", "contextlib", "dataclasses"}
    for module in (baseline_network, baseline_step):
        found = set()
        for node in ast.walk(ast.parse(Path(module.__file__ or "").read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
        others = {name for name in found if name.partition(".")[0] not in allowed}
        assert others <= {"tim_ds.trainer.bench.baseline_network"}
        assert "torch" in found


def test_all_blocks_share_a_compilation() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    settings = recipe(TEXT)
    theirs = build_baseline(settings.model)
    batch = work(settings, [((64, 64), 4)]).batches[0]
    inputs = batch.x, batch.t, batch.r, batch.y
    with torch.no_grad():
        plain, _ = theirs(*inputs)
        theirs.compile_parts(backend)
        compiled, _ = theirs(*inputs)
    # Captions, blocks, final layer.
    assert len(graphs) == 3 < 2 + settings.model.depth
    assert torch.equal(plain, compiled)
