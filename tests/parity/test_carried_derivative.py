"""The derivative that the main forward carries, on the networks of the goldens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.golden import GoldenFile, Layout, build_network, transport_config
from tim_ds.model import embed
from tim_ds.model.tim import TiM
from tim_ds.objective.derivative import forward_mode, path_direction
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import Transport, build_transport
from tim_ds.packed import Condition, Segments, TextCondition

STORED = Path(__file__).parents[1] / "golden"
NETWORKS = sorted(
    p.stem for p in STORED.glob("*.json") if (STORED / f"{p.stem}_weights.safetensors").exists()
)


@pytest.fixture(scope="module", params=NETWORKS)
def golden(request: pytest.FixtureRequest) -> GoldenFile:
    return GoldenFile.read(STORED / f"{request.param}.json")


def carried(
    network: TiM, transport: Transport, x: Tensor, z: Tensor, times: Times, segments: Segments, y: Condition
) -> Tensor:
    direction = path_direction(transport, x, z, times, segments, times.transition_indices)
    x_t = transport.interpolate(x, z, segments.expand(times.t_S)[:, None])
    c_t, c_r = transport.c_noise(times.t_S), transport.c_noise(times.r_S)
    with torch.no_grad():
        derivative = network(x_t, c_t, c_r, segments, y, direction=direction).dF_TC
    assert derivative is not None
    return derivative


@pytest.mark.parity
def test_on_every_golden_network_and_transport(golden: GoldenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, tensors = build_network(golden), golden.tensors
    wide = build_network(golden).double()
    latents = tensors["in/x"]
    layout = Layout(narrow.config, *latents.shape[-2:])
    segments = layout.segments(len(latents))
    x, z, condition = layout.pack(latents), layout.pack(tensors["in/z"]), layout.condition(tensors["in/y"])
    wide_condition = condition
    if isinstance(condition, TextCondition):
        wide_condition = replace(condition, states_LE=condition.states_LE.double())
    compared = []
    for name, entry in golden.description["transports"].items():
        if f"tr/{name}/t" not in tensors:
            continue
        transport = build_transport(transport_config(entry))
        t, r = tensors[f"tr/{name}/t"], tensors[f"tr/{name}/r"]
        times = Times.from_tensors(transport, t, r)
        wide_times = replace(times, t_S=t.double(), r_S=r.double())
        wide_pack = (transport, x.double(), z.double(), wide_times, segments, wide_condition)
        truth = forward_mode(wide, *wide_pack, times.transition_indices, None)
        exact = carried(wide, *wide_pack)
        # float64 rounding; VP's conditioning time of 999 t magnifies it.
        assert (exact - truth).norm() < 1e-11 * truth.norm(), name
        # A phase of a time feature, 999 t for VP, is known to 6e-5 in float32, in the value as in the
        # derivative: the truth is taken at the same rounded phases.
        angle = embed._time_angle
        with monkeypatch.context() as patch:
            patch.setattr(embed, "_time_angle", lambda s, angle=angle: angle(s.float()).double())
            truth = forward_mode(wide, *wide_pack, times.transition_indices, None)
        received = carried(narrow, transport, x, z, times, segments, condition)
        # 5e-7 to 2e-6 seen
        assert (received - truth).norm() < 1e-5 * truth.norm(), name
        compared.append(name)
    assert len(compared) == 6
