"""The target of a pack: who takes part in the derivative, and calls that do not depend on the draw."""

from __future__ import annotations

import pytest
import torch

from tests.objective.networks import (
    TRANSPORTS,
    CarryingNetwork,
    SmoothNetwork,
    differenced,
    images_at,
    random_times,
)
from tim_ds.objective.config import GuidedTargetConfig, ObjectiveConfig
from tim_ds.objective.derivative import central_difference
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.target import output_and_parts, transition_target
from tim_ds.packed import ClassCondition

T = [0.9, 0.4, 0.6, 0.8]
GRIDS = [(2, 2), (1, 3), (2, 1), (3, 2)]
NULL = ClassCondition(torch.full((4,), 4))


def pack(r: list[float]) -> NoisedPack:
    return images_at(TRANSPORTS["trigflow"], T, r, GRIDS, seed=30)


def output_and_target(network, config, images: NoisedPack, **extra):
    output, parts = output_and_parts(network, config, images, **extra)
    coefficients = images.target_coefficients().by_token(images.segments)
    return output, coefficients.target(images.x_TC, images.z_TC, *parts)


def test_only_segments_with_r_below_t_enter_the_derivative() -> None:
    images = pack([0.9, 0.1, 0.6, 0.3])
    network, segments, times = SmoothNetwork(4), images.segments, images.times
    received = transition_target(network, differenced(), images)
    (call,) = network.calls
    assert call.segments.grids == ((1, 3), (1, 3), (3, 2), (3, 2))
    dF = central_difference(network, images, (1, 3), None)
    local = segments.split(images.diffusion_target())
    parts = segments.split(received)
    assert torch.equal(parts[0], local[0]) and torch.equal(parts[2], local[2])
    for i, dF_i in ((1, dF[:3]), (3, dF[3:])):
        tangent = torch.tan(times.t_S[i] - times.r_S[i])
        # Eq. 9 on TrigFlow, where the slope of the diffusion target is -x_t.
        expected = local[i] - tangent * (segments.split(images.x_t_TC)[i] + dF_i)
        torch.testing.assert_close(parts[i], expected, rtol=1e-12, atol=1e-12)
    assert not received.requires_grad


@pytest.mark.parametrize("guided", [None, GuidedTargetConfig(start=0.5, end=0.5)], ids=["plain", "guided"])
def test_the_sequence_of_calls_does_not_depend_on_the_draw(guided: GuidedTargetConfig | None) -> None:
    counts = []
    for r in ([0.9, 0.4, 0.6, 0.8], [0.9, 0.4, 0.6, 0.0], [0.1, 0.1, 0.1, 0.1]):
        network, teacher = SmoothNetwork(4), SmoothNetwork(4)
        config = differenced(guided_target=guided)
        transition_target(network, config, pack(r), teacher=teacher, null_condition=NULL)
        counts.append((len(network.calls), len(teacher.calls)))
    assert counts == [(1, 0 if guided is None else 1)] * 3


def test_without_transitions_the_derivative_is_made_on_segment_0_and_has_no_effect() -> None:
    images, network = pack(T), SmoothNetwork(4)
    received = transition_target(network, differenced(), images)
    assert network.calls[0].segments.grids == ((2, 2), (2, 2))
    assert torch.equal(received, images.diffusion_target())


def test_a_derivative_that_is_not_used_cannot_spoil_the_target() -> None:
    network = SmoothNetwork(4)
    torch.nn.init.constant_(network.outward, float("nan"))
    received = transition_target(network, differenced(), pack(T))
    assert len(network.calls) == 1 and received.isfinite().all()


def test_flow_matching_never_asks_for_a_derivative() -> None:
    network = SmoothNetwork(4)
    transition_target(network, ObjectiveConfig(diffusion_share=1.0), pack(T))
    assert network.calls == []


@pytest.mark.parametrize("name", list(TRANSPORTS))
@pytest.mark.parametrize("guided", [None, GuidedTargetConfig(start=0.0, end=100.0)], ids=["plain", "guided"])
def test_a_carried_derivative_gives_the_target_of_forward_mode(
    name: str, guided: GuidedTargetConfig | None
) -> None:
    """On every transport, so with every c_noise; F is that of a call without direction."""
    transport = TRANSPORTS[name]
    t, r = random_times(transport, 4, seed=8)
    r[1] = t[1]
    images = images_at(transport, t, r, GRIDS, seed=31)
    extra = {} if guided is None else {"teacher": SmoothNetwork(4), "null_condition": NULL}
    networks = CarryingNetwork(SmoothNetwork(4)), CarryingNetwork(SmoothNetwork(4))
    configs = (ObjectiveConfig(derivative=d, guided_target=guided) for d in ("jvp", "paired"))
    (F_jvp, target_jvp), (F_paired, target_paired) = (
        output_and_target(network, config, images, **extra)
        for network, config in zip(networks, configs, strict=True)
    )
    assert networks[0].directions == [None, None]
    (direction,) = networks[1].directions
    assert direction is not None and direction.indices == (0, 2, 3)
    assert torch.equal(F_jvp.F_TC, F_paired.F_TC) and F_paired.F_TC.requires_grad
    # Forward mode differentiates c_noise itself; VP's 999 t magnifies rounding.
    torch.testing.assert_close(target_paired, target_jvp, rtol=1e-10, atol=1e-10)
    assert not target_paired.requires_grad


@pytest.mark.parametrize("r", [T, [0.1, 0.1, 0.1, 0.1]], ids=["none moves", "all move"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_carried_derivative_makes_one_call_whatever_the_draw(r: list[float], share: float) -> None:
    images = pack(r)
    inner = SmoothNetwork(4)
    network = CarryingNetwork(inner)
    config = ObjectiveConfig(derivative="paired", diffusion_share=share)
    _, target = output_and_target(network, config, images)
    (direction,) = network.directions
    if r == T:
        assert direction is None and len(inner.calls) == 1
        assert torch.equal(target, images.diffusion_target())
    else:
        assert direction is not None and direction.indices == (0, 1, 2, 3)
