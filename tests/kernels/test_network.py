"""The network gives the same values and gradients on the kernels as on their definitions, and tells which."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tim_kernels
from tests.model.networks import (
    class_config,
    copies_of,
    in_dtype,
    normal,
    random_network,
    random_pack,
    text_config,
)
from tim_ds.model.ops import transition_loss_terms
from tim_ds.objective.config import ObjectiveConfig, WeightConfig
from tim_ds.objective.loss import LossTerms, transition_loss
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import OTFM
from tim_ds.packed import Direction

SEAM_OPS = ("modulated_layer_norm", "gated_residual", "qk_norm_rope", "swiglu")
TANGENT_OPS = (*(f"{op}_jvp" for op in SEAM_OPS), "varlen_attention_jvp")


def _taken() -> dict[str, str | None]:
    return {op: tim_kernels.path_taken(op) for op in (*SEAM_OPS, "varlen_attention")}


def _tangents_taken() -> dict[str, str | None]:
    return {op: tim_kernels.path_taken(op) for op in TANGENT_OPS}


def _expected(path: str) -> dict[str, str]:
    # Of attention the backend is told; on a CPU there is one.
    return {**dict.fromkeys(SEAM_OPS, path), "varlen_attention": "dense"}


def _run(config, path: str, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    network = random_network(config, dtype=torch.float32).to(device)
    x, t, r, segments, condition = random_pack(config, dtype=torch.float32)
    pack = [part.to(device) for part in (x, t, r, segments, condition)]
    with tim_kernels.use_path(path):  # type: ignore[arg-type]  # one of the paths
        F_TC = network(*pack).F_TC
        F_TC.square().mean().backward()
    assert _taken() == _expected(path)
    return F_TC.detach(), {n: p.grad for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "config",
    [text_config(depth=1, encoder_depth=1), class_config(depth=1, encoder_depth=1, hidden_size=40)],
    ids=["text", "class"],
)
def test_network_on_kernels_equals_the_network_on_their_definitions(config, device):
    value, gradients = _run(config, "triton", device)
    value_twin, gradients_twin = _run(config, "torch", device)
    # float32; the kernels sum rows and segments in another order.
    assert (value - value_twin).abs().max() < 1e-5 * value_twin.abs().max()
    assert gradients.keys() == gradients_twin.keys() and len(gradients) > 25
    for name, gradient in gradients.items():
        scale = gradients_twin[name].abs().max()
        # k_norm's bias shifts all logits of a query alike: its gradient is zero but for rounding.
        if name.endswith("cross_attn.k_norm.bias"):
            continue
        assert (gradient - gradients_twin[name]).abs().max() <= 2e-5 * scale, name


def test_on_the_cpu_the_definitions_run_unless_the_kernels_are_asked_for():
    config = text_config(depth=1, encoder_depth=1)
    with torch.no_grad():
        random_network(config, dtype=torch.float32)(*random_pack(config, dtype=torch.float32))
    assert _taken() == _expected("torch")


@pytest.mark.parametrize(
    ("config", "indices"),
    [
        (text_config(depth=1, encoder_depth=1), (2, 0)),
        (class_config(depth=1, encoder_depth=1, qk_norm=False), (1, 2)),
    ],
    ids=["text", "class"],
)
def test_the_derivative_that_a_forward_carries_takes_the_path_of_the_forward(config, indices, device):
    """And is the same on the kernels and on their definitions."""
    network = random_network(config, dtype=torch.float32).to(device)
    grids, text_lengths = ((2, 2), (1, 1), (1, 3)), (3, 0, 2)
    x, t, r, segments, condition = random_pack(config, grids, text_lengths, dtype=torch.float32)
    tokens = sum(segments.lengths[i] for i in indices)
    dx = torch.randn(tokens, x.shape[1], generator=torch.Generator().manual_seed(2))
    direction = Direction(indices, dx.to(device), torch.full((len(indices),), 0.7, device=device))
    pack = [part.to(device) for part in (x, t, r, segments, condition)]

    def run(path: str) -> torch.Tensor:
        with tim_kernels.use_path(path), torch.no_grad():  # type: ignore[arg-type]  # one of the paths
            dF_TC = network(*pack, direction=direction).dF_TC
        assert _tangents_taken() == dict.fromkeys(TANGENT_OPS, path)
        return dF_TC

    received, expected = run("triton"), run("torch")
    # float32, sums in another order
    assert (received - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_is_carried_leaves_value_gradients_and_kept_bytes_alone_on_the_kernels(device):
    """With bfloat16 products, as in training; on the definitions tests/model/test_tangent.py has more."""
    config = text_config(depth=1, encoder_depth=1)
    network = random_network(config, dtype=torch.float32).to(device)
    pack = in_dtype(random_pack(config, ((1, 2), (1, 1), (1, 3)), (2, 1, 2)), torch.float32)
    dx = normal(5, pack[0].shape[1], seed=2).float().to(device)
    direction = Direction((2, 0), dx, torch.full((2,), 0.7, device=device))
    copies = copies_of(pack, (2, 0))
    copies = replace(copies, x_TC=copies.x_TC.to(device), t_S=copies.t_S.to(device))
    pack = [part.to(device) for part in pack]

    def run(**beside: Any) -> tuple[list[torch.Tensor], int]:
        kept = 0

        def count(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        network.zero_grad()
        x = pack[0].clone().requires_grad_()
        with tim_kernels.use_path("triton"):
            with (
                torch.autograd.graph.saved_tensors_hooks(count, lambda x: x),
                torch.autocast(device.type, dtype=torch.bfloat16),
            ):
                out = network(x, *pack[1:], with_features=True, **beside)
                after_forward = kept
            (out.F_TC.square().mean() + out.features_TZ.square().mean()).backward()
        assert _taken() == _expected("triton")
        gradients = [p.grad for p in [x, *network.parameters()] if p.grad is not None]
        return [out.F_TC, out.features_TZ, *gradients], after_forward

    plain, kept_plain = run()
    assert len(plain) > 40
    for beside in ({"direction": direction}, {"copies": copies}):
        carrying, kept_carrying = run(**beside)
        assert all(torch.equal(a, b) for a, b in zip(plain, carrying, strict=True))
        assert kept_plain == kept_carrying
    assert _tangents_taken() == dict.fromkeys(TANGENT_OPS, "triton")


def test_on_the_cpu_a_derivative_is_carried_by_the_definitions():
    config = class_config(depth=1, encoder_depth=1)
    x, *rest = random_pack(config, dtype=torch.float32)
    with torch.no_grad():
        random_network(config, dtype=torch.float32)(x, *rest, direction=Direction((1,), x[:1], torch.ones(1)))
    assert _tangents_taken() == dict.fromkeys(TANGENT_OPS, "torch")


@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize("derivative", ["paired", "dde"])
@pytest.mark.parametrize("directional", [True, False], ids=["dir", "nodir"])
@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "plain"])
def test_the_loss_op_gives_the_objectives_own_terms_and_gradient(
    path, derivative, directional, adaptive, device
):
    """Every weight acts on the terms of an image, so none is beyond the op."""
    config = class_config(depth=1, encoder_depth=1)
    network = random_network(config, dtype=torch.float32).to(device)
    x, t, r, segments, condition = random_pack(config, dtype=torch.float32)
    x, segments, condition = x.to(device), segments.to(device), condition.to(device)
    times = Times.from_tensors(OTFM(), t, torch.where(torch.arange(5) % 2 == 0, r, t)).to(device)
    objective = ObjectiveConfig(
        derivative=derivative, directional=directional, weight=WeightConfig(adaptive=adaptive)
    )

    def run(**given: Any) -> tuple[LossTerms, torch.Tensor]:
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(device)
        network.zero_grad()
        terms = transition_loss(
            network, OTFM(), objective, x, z, times, segments, condition,
            latent_channels=config.in_channels, **given,
        )  # fmt: skip
        terms.total_S.sum().backward()
        gradient = network.final_layer.linear.weight.grad
        assert gradient is not None
        return LossTerms(*(term.detach() for term in terms)), gradient

    with tim_kernels.use_path("torch"):
        expected, expected_gradient = run()
        with tim_kernels.use_path(path, "transition_loss"):
            received, gradient = run(terms_of_images=transition_loss_terms)
    assert tim_kernels.path_taken("transition_loss") == path
    # float32 means of some hundred numbers, summed in another order.
    for name, value in received._asdict().items():
        torch.testing.assert_close(value, getattr(expected, name), rtol=2e-6, atol=1e-7, msg=name)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert bool(received.directional_S.any()) == directional
