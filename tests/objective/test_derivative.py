"""dF/dt: the central difference against forward mode, and both against a plain reading of Eq. 10."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.objective.networks import (
    TRANSPORTS,
    AttentionNetwork,
    SmoothNetwork,
    images_at,
    invert_c_noise,
    random_times,
)
from tim_ds.errors import ConfigError, ShapeError
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.derivative import build_derivative, central_difference, forward_mode
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.transport import Transport
from tim_ds.packed import ClassCondition, Condition, Network, NetworkOutput, Segments

GRIDS = [(2, 3), (1, 1), (3, 3), (4, 1)]
CHANNELS = 4


def pack(
    transport: Transport,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    t: Tensor | None = None,
    r: Tensor | None = None,
) -> NoisedPack:
    if t is None or r is None:
        t, r = random_times(transport, len(GRIDS), seed + 1)
    return images_at(transport, t, r, GRIDS, channels=CHANNELS, seed=seed, dtype=dtype)


def tensors_of(images: NoisedPack) -> tuple[Tensor, ...]:
    assert isinstance(images.condition, ClassCondition)
    return images.x_TC, images.z_TC, images.times.t_S, images.times.r_S, images.condition.labels_S


class InTransportTime:
    """The network as a smooth function of t itself: c_noise (VP: 999 t) adds no stiffness of its own."""

    def __init__(self, network: SmoothNetwork, transport: Transport) -> None:
        self.network, self.transport = network, transport

    def __call__(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        t, r = invert_c_noise(self.transport, t_S), invert_c_noise(self.transport, r_S)
        return self.network(x_TC, t, r, segments, condition, with_features=with_features)


@pytest.mark.parametrize("name", list(TRANSPORTS))
def test_central_difference_converges_to_forward_mode_at_order_two(name: str) -> None:
    transport = TRANSPORTS[name]
    network = InTransportTime(SmoothNetwork(CHANNELS), transport)
    t = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    images, indices = pack(transport, t=t, r=0.4 * t), (0, 1, 2, 3)
    exact = forward_mode(network, images, indices, None)
    errors = []
    for step in (4e-3, 2e-3, 1e-3):
        estimate = central_difference(network, images, indices, step)
        errors.append((estimate - exact).norm().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[0] < 1e-2 * exact.norm().item()
    # Next term of the expansion is (e / t)^2 ~ 2e-4 of the leading one.
    assert slopes == pytest.approx([2.0, 2.0], abs=0.01)


@pytest.mark.parametrize("name", ["ot_fm", "trigflow", "tim", "edm_sd1", "vp", "ve"])
def test_central_difference_is_equation_10(name: str) -> None:
    """Segment by segment, unpacked, with the transport's own step, c_noise inside."""
    transport = TRANSPORTS[name]
    network = SmoothNetwork(CHANNELS)
    # Far enough from singular times for the full step.
    t = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    images, indices = pack(transport, seed=5, t=t, r=0.1 * t), (2, 0)
    segments = images.segments
    received = central_difference(network, images, indices, None)
    e = transport.dde_step
    expected = []
    for i in indices:
        x_i, z_i = segments.split(images.x_TC)[i], segments.split(images.z_TC)[i]
        alone, label = segments.select([i]), images.condition.select([i])
        sides = [
            network(
                transport.interpolate(x_i, z_i, moved),
                transport.c_noise(moved)[None],
                transport.c_noise(images.times.r_S[i])[None],
                alone,
                label,
            ).F_TC
            for moved in (t[i] + e, t[i] - e)
        ]
        expected.append((sides[0] - sides[1]) / (2 * e))
    # Rounding of F and of the times, 1e-16, divided by the step.
    torch.testing.assert_close(received, torch.cat(expected), rtol=1e-15 / e, atol=2e-15 / e)


def test_both_sides_ride_in_one_call_of_the_chosen_segments() -> None:
    transport = TRANSPORTS["ot_fm"]
    network = SmoothNetwork(CHANNELS)
    images = pack(transport)
    given = tensors_of(images)
    before = [v.clone() for v in given]
    central_difference(network, images, (1, 3), None)
    (call,) = network.calls
    assert call.segments.grids == (GRIDS[1], GRIDS[1], GRIDS[3], GRIDS[3])
    assert isinstance(call.condition, ClassCondition) and call.condition.labels_S.tolist() == [1, 1, 3, 3]
    late, early = call.c_t_S[0::2], call.c_t_S[1::2]
    torch.testing.assert_close(late - early, torch.full_like(late, 0.01), rtol=1e-12, atol=0)
    assert torch.equal(call.c_r_S, images.times.r_S[[1, 1, 3, 3]])
    assert not call.with_features
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


@pytest.mark.parametrize("estimator", [central_difference, forward_mode])
def test_no_gradient_flows_through_the_derivative(estimator) -> None:
    network = SmoothNetwork(CHANNELS)
    received = estimator(network, pack(TRANSPORTS["ot_fm"]), (0, 2), None)
    assert received.shape == (15, CHANNELS)
    assert not received.requires_grad and received.grad_fn is None


@pytest.mark.parametrize("name", ["edm_sd1", "edm_sd0p5", "vp", "ve"])
def test_close_to_a_singular_time_the_difference_stays_valid(name: str) -> None:
    """With the plain step, t - e is negative at the smallest times of VP (NaN), half of t at those of EDM."""
    transport = TRANSPORTS[name]
    network = SmoothNetwork(CHANNELS)
    t = transport.T_min * torch.tensor([1.01, 1.5, 3.0, 20.0], dtype=torch.float64)
    images = pack(transport, seed=9, t=t, r=torch.full_like(t, transport.T_min))
    width = transport.difference_step(t, transport.dde_step)
    assert (width <= t / 8).all() and (width <= transport.dde_step).all() and (width > 0).all()
    arguments = (network, images, (0, 1, 2, 3), None)
    exact, estimate = forward_mode(*arguments), central_difference(*arguments)
    # Truncation with e = t / 8: e^2 / 6 f''' of ln t or sqrt t, at most 0.5 % and 0.1 % of the slope, on a
    # network whose own curvature in c_noise adds the rest.
    assert (estimate - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["ot_fm", "trigflow", "tim"])
def test_smooth_paths_keep_the_plain_step_past_their_ends(name: str) -> None:
    transport = TRANSPORTS[name]
    ends = torch.tensor([transport.T_min, transport.T_max], dtype=torch.float64)
    assert torch.equal(transport.difference_step(ends, 0.005), torch.full_like(ends, 0.005))
    network = SmoothNetwork(CHANNELS)
    t = torch.full((4,), transport.T_max, dtype=torch.float64)
    images = pack(transport, seed=10, t=t, r=torch.zeros_like(t))
    arguments = (network, images, (0, 1, 2, 3), None)
    exact, estimate = forward_mode(*arguments), central_difference(*arguments)
    # Truncation e^2 F''' / 6 = 4e-6 F'''.
    assert (estimate - exact).norm() < 1e-4 * exact.norm()


def test_float32_times_are_divided_by_the_distance_that_they_have() -> None:
    """F(x, t) = t measures the stencil: near t = 80 float32 neighbours are up to 0.05 % off 2e."""
    transport = TRANSPORTS["edm_sd1"]

    def network(
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        return NetworkOutput(segments.expand(times_seen(t_S))[:, None].expand_as(x_TC), None)

    def times_seen(c_S: Tensor) -> Tensor:
        assert c_S.shape[0] == 2 * times.num_segments
        e = torch.full_like(times.t_S, transport.dde_step)
        return torch.stack([times.t_S + e, times.t_S - e], 1).flatten()

    t = torch.tensor([3.0, 17.3, 41.7, 79.9])
    images = pack(transport, dtype=torch.float32, t=t, r=torch.full_like(t, 0.5))
    times = images.times
    received = central_difference(network, images, (0, 1, 2, 3), None)
    assert torch.equal(received, torch.ones_like(received))


def test_forward_mode_goes_through_attention_and_c_noise() -> None:
    transport = TRANSPORTS["ve"]
    network = AttentionNetwork(CHANNELS)
    t = torch.tensor([0.6, 2.0, 9.0, 30.0], dtype=torch.float64)
    arguments = (network, pack(transport, seed=11, t=t, r=0.5 * t), (3, 1, 0))
    exact = forward_mode(*arguments, None)
    estimate = central_difference(*arguments, 1e-4)
    # Truncation (1e-4)^2 F''' and rounding 1e-16 / 1e-4.
    torch.testing.assert_close(estimate, exact, rtol=1e-6, atol=1e-8)


def test_the_step_of_the_recipe_overrides_the_transports() -> None:
    transport = TRANSPORTS["tim"]
    network = SmoothNetwork(CHANNELS)
    central_difference(network, pack(transport), (0,), 0.02)
    c = network.calls[0].c_t_S
    assert (c[0] - c[1]).item() == pytest.approx(0.04, rel=1e-12)


def test_the_recipe_names_the_estimator() -> None:
    assert build_derivative(ObjectiveConfig(derivative="dde")) is central_difference
    assert build_derivative(ObjectiveConfig(derivative="jvp")) is forward_mode
    with pytest.raises(ConfigError, match="'paired' comes with the main call"):
        build_derivative(ObjectiveConfig(derivative="paired"))


@pytest.mark.parametrize("estimator", [central_difference, forward_mode])
def test_no_segments_is_an_error(estimator) -> None:
    transport = TRANSPORTS["ot_fm"]
    network: Network = SmoothNetwork(CHANNELS)
    with pytest.raises(ShapeError, match="at least one segment"):
        estimator(network, pack(transport), (), None)
