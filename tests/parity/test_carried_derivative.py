"""The derivative that the main forward carries, on the networks of the goldens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.networks import derivative_along
from tests.parity.golden import GoldenFile, Layout, build_network, transport_config
from tim_ds.model import embed
from tim_ds.objective.derivative import path_direction
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import build_transport
from tim_ds.packed import Direction, TextCondition

STORED = Path(__file__).parents[1] / "golden"
NETWORKS = sorted(
    p.stem for p in STORED.glob("*.json") if (STORED / f"{p.stem}_weights.safetensors").exists()
)


@pytest.fixture(scope="module", params=NETWORKS)
def golden(request: pytest.FixtureRequest) -> GoldenFile:
    return GoldenFile.read(STORED / f"{request.param}.json")


@pytest.mark.parity
def test_on_every_golden_network_and_transport(golden: GoldenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, tensors = build_network(golden), golden.tensors
    wide = build_network(golden).double()
    latents = tensors["in/x"]
    layout = Layout(narrow.config, *latents.shape[-2:])
    segments = layout.segments(len(latents))
    x, z, condition = layout.pack(latents), layout.pack(tensors["in/z"]), layout.condition(tensors["in/y"])
    compared = []
    for name, entry in golden.description["transports"].items():
        if f"tr/{name}/t" not in tensors:
            continue
        transport = build_transport(transport_config(entry))
        times = Times.from_tensors(transport, tensors[f"tr/{name}/t"], tensors[f"tr/{name}/r"])
        images = NoisedPack(transport, x, z, times, segments, condition)
        direction = path_direction(images, times.transition_indices)
        pack = (images.x_t_TC, images.c_t_S, images.c_r_S, segments, condition)
        wide_pack, wide_direction = widened(pack, direction)
        with torch.no_grad():
            exact = wide(*wide_pack, direction=wide_direction).dF_TC
            received = narrow(*pack, direction=direction).dF_TC
        truth = derivative_along(wide, wide_pack, wide_direction)
        # float64 rounding; VP's conditioning time of 999 t magnifies it.
        assert (exact - truth).norm() < 1e-11 * truth.norm(), name
        # 4e-7 to 1.2e-6 seen. A phase of VP's time features, up to 999, is known to 3e-5 in float32, in the
        # value as in the derivative, and as well as the time itself: 1.0e-5 to 2.8e-5 seen.
        assert (received - truth).norm() < (5e-5 if name == "vp" else 1e-5) * truth.norm(), name
        if name == "vp":
            angle = embed._time_angle
            with monkeypatch.context() as patch:
                patch.setattr(embed, "_time_angle", lambda s, angle=angle: angle(s.float()).double())
                truth = derivative_along(wide, wide_pack, wide_direction)
            # At the phases that float32 has: 6e-7 to 9e-7 seen
            assert (received - truth).norm() < 1e-5 * truth.norm()
        compared.append(name)
    assert len(compared) == 6


def widened(pack: tuple[Any, ...], direction: Direction) -> tuple[tuple[Any, ...], Direction]:
    """The same numbers in float64."""
    x, t, r, segments, condition = pack
    if isinstance(condition, TextCondition):
        condition = replace(condition, states_LE=condition.states_LE.double())
    wide = replace(direction, dx_TC=direction.dx_TC.double(), dt_S=direction.dt_S.double())
    return (x.double(), t.double(), r.double(), segments, condition), wide
