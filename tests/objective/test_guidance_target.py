"""Guidance folded into the diffusion part of the target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.objective.networks import TRANSPORTS, GaussianNetwork, SmoothNetwork, images_at, random_times
from tim_ds.errors import ConfigError, ShapeError
from tim_ds.objective.config import GuidedTargetConfig, ObjectiveConfig
from tim_ds.objective.guidance_target import guided_diffusion_target, guided_segments
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.target import transition_target
from tim_ds.objective.time_sampling import Times
from tim_ds.packed import ClassCondition, Condition, NetworkOutput, Segments

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "golden_dev_formulas.safetensors")
NULL = 4
NULL_LABELS = ClassCondition(torch.full((3,), NULL))


class Recorded:
    """Returns stored outputs, the null half after the conditional half; counts calls."""

    def __init__(self, F_cond: Tensor, F_null: Tensor) -> None:
        self.F_cond, self.F_null, self.calls = F_cond, F_null, 0

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
        self.calls += 1
        assert isinstance(condition, ClassCondition) and torch.equal(t_S, r_S)
        half = condition.num_segments // 2
        chosen = condition.labels_S[:half]
        assert condition.labels_S[half:].tolist() == [-1] * half
        return NetworkOutput(torch.cat([self.F_cond[chosen], self.F_null[chosen]])[:, None], None)


# The stored EDM points all lie outside the guided interval.
@pytest.mark.parametrize("name", ["ot_fm", "trigflow", "vp", "ve"])
def test_stored_guided_targets(name: str) -> None:
    """One value a segment: the stored formula cases, guided where 0.25 <= t <= 0.75."""
    transport = TRANSPORTS[name]
    t, r = GOLDEN[f"{name}/t"], GOLDEN[f"{name}/r"]
    x, z, dF = (GOLDEN[f"in/{k}"][:, None] for k in ("x", "z", "dF"))
    # The stored values were made with the weights rounded to float32.
    w_gt, w_cond = torch.tensor([0.9, 0.7]).tolist()
    config = GuidedTargetConfig(w_gt=w_gt, w_cond=w_cond, start=0.25, end=0.75)
    # Not through Times.from_tensors: one of VE's stored r lies below its T_min.
    times = Times(t, r, tuple((t == r).tolist()), (), tuple(t.tolist()))
    count = len(guided_segments(config, times))
    assert 0 < count < 12
    segments = Segments.from_grids([(1, 1)] * 12)
    condition, null = ClassCondition(torch.arange(12)), ClassCondition(torch.full((12,), -1))
    teacher = Recorded(GOLDEN["in/F_cond"], GOLDEN["in/F_uncond"])
    images = NoisedPack(transport, x, z, times, segments, condition)
    h = guided_diffusion_target(teacher, config, images, null)
    received = transport.target(x, z, t[:, None], r[:, None], dF, diffusion_target=h)
    expected = GOLDEN[f"{name}/ref/target_mg"][:, None]
    # The tolerance that the stored values were published with.
    assert (received - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert teacher.calls == 1


@pytest.mark.parametrize("name", list(TRANSPORTS))
def test_guidance_by_the_exact_local_field_keeps_the_mean_target(name: str) -> None:
    """An exact teacher that ignores its condition must leave E[target | x_t] unchanged, on every transport.

    It receives c_noise once: the network inverts it to the time it must have been given.
    """
    transport = TRANSPORTS[name]
    exact = GaussianNetwork(transport, mean=0.2, deviation=0.5)
    t, _ = random_times(transport, 5, seed=20)
    times = Times.from_tensors(transport, t, t)
    segments = Segments.from_grids([(2, 2)] * 5)
    t_T1 = segments.expand(t)[:, None]
    x_t = torch.randn(20, 3, generator=torch.Generator().manual_seed(21), dtype=torch.float64)
    x, z = exact.posterior(x_t, t_T1)
    config = GuidedTargetConfig(w_gt=0.9, w_cond=0.7, start=transport.T_min, end=transport.T_max)
    assert guided_segments(config, times) == (0, 1, 2, 3, 4)
    condition = ClassCondition(torch.zeros(5, dtype=torch.int64))
    images = NoisedPack(transport, x, z, times, segments, condition)
    received = guided_diffusion_target(exact, config, images, condition)
    # c_noise and its inverse cost a few digits (EDM: exp(4 ln(t) / 4)).
    torch.testing.assert_close(received, transport.diffusion_target(x, z, t_T1), rtol=1e-11, atol=1e-11)


def pack(t: list[float], dtype: torch.dtype = torch.float64) -> NoisedPack:
    grids = [(1, 2), (2, 2), (3, 1)]
    return images_at(TRANSPORTS["ot_fm"], t, t, grids, channels=3, seed=22, dtype=dtype)


def test_both_ends_of_the_interval_are_guided_in_float32() -> None:
    times = pack([0.3, 0.8, 0.81], torch.float32).times
    assert guided_segments(GuidedTargetConfig(start=0.3, end=0.8), times) == (0, 1)


def test_only_segments_inside_the_interval_are_evaluated_and_changed() -> None:
    images, teacher = pack([0.1, 0.5, 0.9]), SmoothNetwork(3)
    received = guided_diffusion_target(teacher, GuidedTargetConfig(), images, NULL_LABELS)
    (call,) = teacher.calls
    assert call.segments.grids == ((2, 2), (2, 2))
    assert isinstance(call.condition, ClassCondition) and call.condition.labels_S.tolist() == [1, NULL]
    v = images.z_TC - images.x_TC
    changed = (received != v).all(1)
    assert changed.tolist() == [False] * 2 + [True] * 4 + [False] * 3
    middle, x_t = images.segments.select([1]), images.x_t_TC
    half = torch.tensor([0.5], dtype=torch.float64)
    F_cond = teacher(x_t[2:6], half, half, middle, ClassCondition(torch.tensor([1]))).F_TC
    F_null = teacher(x_t[2:6], half, half, middle, ClassCondition(torch.tensor([NULL]))).F_TC
    # w_gt = 1, w_cond = 0.75: guidance of scale 1.75 around v.
    torch.testing.assert_close(received[2:6], v[2:6] + 0.75 * (F_cond - F_null), rtol=1e-13, atol=1e-13)
    assert not received.requires_grad


def test_the_teacher_is_called_once_even_if_nothing_is_guided() -> None:
    images, teacher = pack([0.1, 0.2, 0.9]), SmoothNetwork(3)
    received = guided_diffusion_target(teacher, GuidedTargetConfig(), images, NULL_LABELS)
    assert torch.equal(received, images.z_TC - images.x_TC)
    (call,) = teacher.calls
    assert call.segments.grids == ((1, 2), (1, 2))


def test_missing_inputs_are_named() -> None:
    images, network = pack([0.1, 0.5, 0.9]), SmoothNetwork(3)
    config = ObjectiveConfig(guided_target=GuidedTargetConfig())
    with pytest.raises(ConfigError, match=r"objective\.guided_target: .*teacher=none, null_condition=given"):
        transition_target(network, config, images, null_condition=NULL_LABELS)
    with pytest.raises(ShapeError, match=r"received 3 and 1 \(null\)"):
        guided_diffusion_target(network, GuidedTargetConfig(), images, ClassCondition(torch.tensor([NULL])))
