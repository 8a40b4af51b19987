"""Closed-form counts against PyTorch's counter on the real network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.model.networks import class_config, random_network, random_pack, text_config
from tim_ds.model.config import ModelConfig
from tim_ds.objective.config import GuidedTargetConfig, ObjectiveConfig, TransportConfig
from tim_ds.objective.loss import transition_loss
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import build_transport
from tim_ds.packed import ClassCondition, Segments, TextCondition
from tim_ds.trainer.flops import PackShape, backward_flops, forward_flops, peak_flops, step_flops
from tim_kernels.varlen_attention import plan

GRIDS = ((3, 5), (4, 2), (2, 2), (2, 2))
# Images of one size have captions of one length: otherwise dense attention on a CPU pads keys, which are no
# work.
TEXT_LENGTHS = (4, 7, 3, 3)
NULL_LENGTH = 3

CONFIGS = {
    "text": text_config(),
    "text, all times": text_config(time_condition="t,r,t-r", z_dim=None, adaln_hidden=20),
    "text, shared": text_config(
        time_condition="t,t-r", separate_interval_embedder=False, distance_aware=False, mlp_ratio=3.0
    ),
    "text, r": text_config(time_condition="r"),
    "class": class_config(time_condition="r,t-r"),
    "class, t,r": class_config(time_condition="t,r", distance_aware=False),
}


def counted(action: Callable[[], Any]) -> int:
    """What PyTorch counts. Attention is decomposed: the fused one of a CPU is not in its tables."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


def shape_of(config: ModelConfig) -> PackShape:
    lengths = tuple(h * w for h, w in GRIDS)
    return PackShape(lengths, TEXT_LENGTHS if config.condition == "text" else None)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("with_features", [False, True])
def test_forward_and_backward_are_what_pytorch_counts(config: ModelConfig, with_features: bool) -> None:
    if with_features and config.z_dim is None:
        config = replace(config, z_dim=6)
    network = random_network(config)
    x, t, r, segments, condition = random_pack(config, GRIDS, TEXT_LENGTHS)
    outputs: list[torch.Tensor] = []

    def forward() -> None:
        output = network(x, t, r, segments, condition, with_features=with_features)
        features = 0.0 if output.features_TZ is None else output.features_TZ.sum()
        outputs.append(output.F_TC.sum() + features)

    pack = shape_of(config)
    assert counted(forward) == forward_flops(config, pack, with_features=with_features)
    assert counted(lambda: outputs[0].backward()) == backward_flops(config, pack, with_features=with_features)


@pytest.mark.parametrize("name", ["text", "text, all times", "text, r", "class"])
@pytest.mark.parametrize("derivative", ["dde", "paired"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("transition", [(0, 2), ()])
def test_a_whole_step_is_what_pytorch_counts(
    name: str,
    derivative: Any,
    checkpointing: bool,
    transition: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One dense batch of short segments saves calls on a CPU, and pads: work that is no part of a step's.
    monkeypatch.setattr(plan, "MERGED_LOGITS", 0)
    config = CONFIGS[name]
    objective = ObjectiveConfig(
        transport=TransportConfig(kind="ot_fm"),
        derivative=derivative,
        guided_target=GuidedTargetConfig(start=0.35, end=0.7),
    )
    network, teacher = random_network(config), random_network(config, seed=5)
    network.checkpoint_blocks = checkpointing
    x, *_, segments, condition = random_pack(config, GRIDS, TEXT_LENGTHS)
    t = torch.tensor([0.9, 0.3, 0.5, 0.6], dtype=torch.float64)
    r = torch.where(torch.isin(torch.arange(4), torch.tensor(transition)), 0.2 * t, t)
    transport = build_transport(objective.transport)
    times = Times.from_tensors(transport, t, r)
    if config.condition == "text":
        null_states = torch.randn(4 * NULL_LENGTH, config.text_dim or 0, dtype=torch.float64)
        null: Any = TextCondition(null_states, Segments.from_lengths([NULL_LENGTH] * 4))
    else:
        null = ClassCondition(torch.full((4,), config.num_classes or 0))

    def step() -> None:
        terms = transition_loss(
            network,
            transport,
            objective,
            x,
            torch.randn_like(x),
            times,
            segments,
            condition,
            latent_channels=config.in_channels,
            teacher=teacher,
            null_condition=null,
        )
        terms.total_S.sum().backward()

    flops = step_flops(
        config,
        objective,
        shape_of(config),
        transition=transition,
        guided=(2, 3),
        null_text_length=NULL_LENGTH,
        checkpointing=checkpointing,
    )
    assert counted(step) == flops.executed
    assert flops.model < flops.executed or not (checkpointing or (derivative == "paired" and transition))
    assert (flops.derivative > 0) == bool(transition)


def test_peaks_are_known_by_name_and_never_guessed() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16_autocast") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA L40S", "bf16") == 362e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") is None
    assert peak_flops("cpu", "bf16") is None
    # Cards whose name begins like that of another.
    assert [peak_flops(f"NVIDIA RTX {name}", "bf16") for name in ("A1000", "A3000", "A4000")] == [None] * 3
