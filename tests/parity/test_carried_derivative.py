"""The derivative that the main forward carries, on the networks of the goldens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.parity.golden import GoldenFile, Layout, build_network, transport_config
from tim_ds.model.tim import TiM
from tim_ds.objective.config import TransportConfig
from tim_ds.objective.derivative import forward_mode, path_direction
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import build_transport
from tim_ds.packed import TextCondition

STORED = Path(__file__).parents[1] / "golden"
NETWORKS = sorted(
    p.stem for p in STORED.glob("*.json") if (STORED / f"{p.stem}_weights.safetensors").exists()
)


@pytest.fixture(scope="module", params=NETWORKS)
def golden(request: pytest.FixtureRequest) -> GoldenFile:
    return GoldenFile.read(STORED / f"{request.param}.json")


@pytest.mark.parity
def test_on_every_golden_network_and_transport(golden: GoldenFile) -> None:
    narrow, tensors = build_network(golden), golden.tensors
    wide = build_network(golden).double()
    latents = tensors["in/x"]
    layout = Layout(narrow.config, *latents.shape[-2:])
    segments = layout.segments(len(latents))
    x, z, condition = layout.pack(latents), layout.pack(tensors["in/z"]), layout.condition(tensors["in/y"])
    compared = []
    entries = golden.description["transports"].items()
    rows = {name: transport_config(entry) for name, entry in entries if f"tr/{name}/t" in tensors}
    for name, row in {**rows, "tim": TransportConfig(kind="tim")}.items():
        transport = build_transport(row)
        # No golden has times of `tim`; they are of the range of flow matching's.
        t, r = (tensors[f"tr/{'ot_fm' if name == 'tim' else name}/{time}"] for time in ("t", "r"))
        times = Times.from_tensors(transport, t, r)
        # As in training; what the network is told of a float32 time, VP's 999 t, is known to 3e-5.
        times = replace(times, t_S=t.double(), r_S=r.double())
        images = NoisedPack(transport, x, z, times, segments, condition)
        truth = forward_mode(wide, widened(images), times.transition_indices, None)
        # Rounding of float64: 4e-15 seen.
        assert relative(carried(wide, widened(images)), truth) < 1e-13, name
        # Of float32, at 6e-8 an operation: 4e-7 to 1.3e-6 seen.
        assert relative(carried(narrow, images), truth) < 3e-6, name
        compared.append(transport.name)
    assert set(compared) == {"ot_fm", "trigflow", "edm", "vp", "ve", "tim"}


def carried(network: TiM, pack: NoisedPack) -> Tensor:
    main = (pack.x_t_TC, pack.c_t_S, pack.c_r_S, pack.segments, pack.condition)
    with torch.no_grad():
        output = network(*main, direction=path_direction(pack, pack.times.transition_indices))
    assert output.dF_TC is not None, "a direction was given"
    return output.dF_TC


def relative(received: Tensor, expected: Tensor) -> float:
    return float((received - expected).norm() / expected.norm())


def widened(pack: NoisedPack) -> NoisedPack:
    """The same images at the same times in float64."""
    condition = pack.condition
    if isinstance(condition, TextCondition):
        condition = replace(condition, states_LE=condition.states_LE.double())
    return replace(pack, x_TC=pack.x_TC.double(), z_TC=pack.z_TC.double(), condition=condition)
