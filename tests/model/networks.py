"""Small networks and packs for tests. Every parameter is random: no zero initialisation hides an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tim_ds.model.config import ModelConfig
from tim_ds.model.tim import TiM
from tim_ds.packed import ClassCondition, Condition, Copies, Direction, Segments, TextCondition

GRIDS = ((3, 5), (1, 1), (4, 2), (2, 2), (2, 2))
TEXT_LENGTHS = (4, 1, 7, 0, 3)


def text_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = dict(
        condition="text", in_channels=4, hidden_size=32, depth=3, num_heads=2, encoder_depth=2, text_dim=12,
        z_dim=6, projector_dim=10,
    )  # fmt: skip
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def class_config(**changes: object) -> ModelConfig:
    return text_config(
        **{"condition": "class", "text_dim": None, "num_classes": 5, "patch_size": 2, **changes}
    )


CONFIGS = {
    "text-plain": text_config(qk_norm=False, distance_aware=False, separate_interval_embedder=False),
    "text-reference-rope": text_config(rope_layout="reference"),
    "class-p2": class_config(),
    **{
        f"text {kind}": text_config(time_condition=kind)
        for kind in ("t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r")
    },
}


def random_network(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> TiM:
    network = TiM(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) / fan_in**0.5)
        for name, parameter in network.named_parameters():
            if "norm.weight" in name:
                parameter.add_(1.0)
    return network


def random_pack(
    config: ModelConfig,
    grids: Sequence[tuple[int, int]] = GRIDS,
    text_lengths: Sequence[int] = TEXT_LENGTHS,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Segments, Any]:
    """(x_TC, t_S, r_S, segments, condition) with r <= t."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    segments = Segments.from_grids(grids)
    times = torch.rand(2, len(grids), generator=generator, dtype=dtype)
    condition: Condition
    if config.condition == "text":
        states = normal(sum(text_lengths), config.text_dim or 0)
        condition = TextCondition(states, Segments.from_lengths(text_lengths))
    else:
        labels = torch.randint(0, (config.num_classes or 0) + 1, (len(grids),), generator=generator)
        condition = ClassCondition(labels)
    x = normal(segments.num_tokens, config.token_channels)
    return x, times.amax(0), times.amin(0), segments, condition


def derivative_along(network: TiM, pack: tuple[Any, ...], direction: Direction) -> torch.Tensor:
    """What `network(*pack, direction=direction).dF_TC` has to be, by forward mode through the network."""
    x, t, r, segments, condition = pack
    tokens = segments.token_index(direction.indices)
    dx = torch.zeros_like(x).index_copy(0, tokens, direction.dx_TC)
    dt = torch.zeros_like(t).index_copy(0, torch.tensor(direction.indices), direction.dt_S)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = torch.func.jvp(lambda x, t: network(x, t, r, segments, condition).F_TC, (x, t), (dx, dt))
    return found[1][tokens]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(received: torch.Tensor | None, expected: torch.Tensor) -> float:
    assert received is not None and received.shape == expected.shape
    return float((received.double() - expected).norm() / expected.norm())


def in_dtype(pack: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    x, t, r, segments, condition = pack
    if isinstance(condition, TextCondition):
        condition = replace(condition, states_LE=condition.states_LE.to(dtype))
    return x.to(dtype), t.to(dtype), r.to(dtype), segments, condition


def copies_of(pack: tuple[Any, ...], indices: tuple[int, ...], count: int = 2) -> Copies:
    x, t, _, segments, _ = pack
    tokens = count * sum(segments.lengths[i] for i in indices)
    times = 0.5 + 0.1 * normal(count * len(indices), seed=24).abs()
    return Copies(indices, count, normal(tokens, x.shape[1], seed=23).to(x.dtype), times.to(t.dtype))
