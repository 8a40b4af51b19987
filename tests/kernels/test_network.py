"""The network gives the same values and gradients on the kernels as on their definitions, and tells which."""

from __future__ import annotations

import pytest
import torch

import tim_kernels
from tests.model.networks import class_config, random_network, random_pack, text_config

SEAM_OPS = ("modulated_layer_norm", "gated_residual", "qk_norm_rope", "swiglu")


def _taken() -> dict[str, str | None]:
    return {op: tim_kernels.path_taken(op) for op in (*SEAM_OPS, "varlen_attention")}


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
    "config", [text_config(depth=2), class_config(depth=2, hidden_size=40)], ids=["text", "class"]
)
def test_network_on_kernels_equals_the_network_on_their_definitions(config, device):
    value, gradients = _run(config, "triton", device)
    value_twin, gradients_twin = _run(config, "torch", device)
    # float32; the kernels sum rows and segments in another order.
    assert (value - value_twin).abs().max() < 1e-5 * value_twin.abs().max()
    assert gradients.keys() == gradients_twin.keys() and len(gradients) > 30
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
