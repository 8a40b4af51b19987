"""Which (t, r) an image trains."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.objective.networks import TRANSPORTS
from tim_ds.errors import ConfigError, ShapeError, TimeDomainError
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.time_sampling import Times, draw_times

COUNT = 20_000


def draws(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normals = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return normals, torch.rand(count, 3, generator=generator, dtype=torch.float64)


def within(count: int, share: float) -> float:
    """Five standard deviations of a binomial count, as a share."""
    return 5 * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("name", list(TRANSPORTS))
def test_kinds_have_their_shares(name: str) -> None:
    transport = TRANSPORTS[name]
    times = draw_times(transport, ObjectiveConfig(diffusion_share=0.5, consistency_share=0.1), *draws(COUNT))
    at_end = (times.r_S == torch.tensor(transport.T_min)) & (times.r_S < times.t_S)
    assert abs(sum(times.is_diffusion) / COUNT - 0.5) < within(COUNT, 0.5)
    assert (
        abs(at_end.double().mean().item() - 0.1) < within(COUNT, 0.1) + 2e-3
    )  # clamped draws also end at T_min
    diffusion = torch.tensor(times.is_diffusion)
    assert torch.equal(times.t_S[diffusion], times.r_S[diffusion])
    assert set(times.transition_indices) == set((times.r_S < times.t_S).nonzero().flatten().tolist())
    assert times.t_values == tuple(times.t_S.tolist())
    assert times.t_S.dtype == times.r_S.dtype == torch.float32


def test_t_is_the_larger_and_r_the_smaller_draw() -> None:
    transport = TRANSPORTS["ot_fm"]
    normals, uniforms = draws(500)
    config = ObjectiveConfig(diffusion_share=0.5, diffusion_time="larger", consistency_share=0.0)
    times = draw_times(transport, config, normals, uniforms, dtype=torch.float64)
    both = torch.sigmoid(normals)
    assert torch.equal(times.t_S, both.amax(1))
    moving = ~torch.tensor(times.is_diffusion)
    assert 200 < moving.sum() < 300
    assert torch.equal(times.r_S[moving], both.amin(1)[moving])


@pytest.mark.parametrize("name", ["ot_fm", "vp"])
def test_a_diffusion_image_can_train_the_first_draw(name: str) -> None:
    """Nothing else changes: kinds, the times of the others, and r = t."""
    transport = TRANSPORTS[name]
    normals, uniforms = draws(500)
    config = ObjectiveConfig(diffusion_share=0.5, consistency_share=0.1)
    larger, first = (
        draw_times(transport, replace(config, diffusion_time=which), normals, uniforms, dtype=torch.float64)
        for which in ("larger", "first")
    )
    diffusion = torch.tensor(first.is_diffusion)
    both = transport.draw_t(normals, uniforms[:, :2])
    assert first.is_diffusion == larger.is_diffusion and first.transition_indices == larger.transition_indices
    assert torch.equal(first.t_S[diffusion], both[diffusion, 0])
    assert torch.equal(first.r_S[diffusion], both[diffusion, 0])
    assert torch.equal(first.t_S[~diffusion], larger.t_S[~diffusion])
    assert torch.equal(first.r_S[~diffusion], larger.r_S[~diffusion])
    # About half of the first draws are the smaller ones.
    assert 80 < (first.t_S < larger.t_S).sum() < 170
    with pytest.raises(ConfigError, match=r"^objective\.diffusion_time: larger has no effect"):
        ObjectiveConfig(diffusion_share=0.0, diffusion_time="larger")


def test_an_image_draws_the_same_times_wherever_it_stands() -> None:
    transport = TRANSPORTS["vp"]
    normals, uniforms = draws(64, seed=3)
    whole = draw_times(transport, ObjectiveConfig(), normals, uniforms)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    moved = draw_times(transport, ObjectiveConfig(), normals[order], uniforms[order])
    alone = draw_times(transport, ObjectiveConfig(), normals[17:18], uniforms[17:18])
    assert torch.equal(moved.t_S, whole.t_S[order]) and torch.equal(moved.r_S, whole.r_S[order])
    assert alone.t_S[0] == whole.t_S[17] and alone.r_S[0] == whole.r_S[17]
    assert alone.is_diffusion[0] == whole.is_diffusion[17]


def test_the_kind_is_drawn_apart_from_the_times() -> None:
    """VP draws its times from the uniforms too; the third belongs to the kind alone."""
    normals = torch.zeros(3, 2, dtype=torch.float64)
    uniforms = torch.tensor([[0.1, 0.9, 0.49], [0.1, 0.9, 0.59], [0.1, 0.9, 0.61]], dtype=torch.float64)
    config = ObjectiveConfig(diffusion_share=0.5, consistency_share=0.1)
    times = draw_times(TRANSPORTS["vp"], config, normals, uniforms)
    torch.testing.assert_close(times.t_S, torch.full((3,), 0.9), rtol=1e-5, atol=0)
    torch.testing.assert_close(times.r_S, torch.tensor([0.9, 1e-5, 0.1]), rtol=2e-4, atol=0)
    assert times.is_diffusion == (True, False, False)


def test_flow_matching_and_pure_consistency_are_the_ends_of_the_shares() -> None:
    transport = TRANSPORTS["tim"]
    flow = draw_times(transport, ObjectiveConfig(diffusion_share=1.0), *draws(300))
    assert all(flow.is_diffusion) and flow.transition_indices == () and torch.equal(flow.t_S, flow.r_S)
    config = ObjectiveConfig(diffusion_share=0.0, consistency_share=1.0)
    consistency = draw_times(transport, config, *draws(300))
    assert not any(consistency.is_diffusion) and (consistency.r_S == 0).all()
    assert consistency.transition_indices == tuple(range(300))


def test_a_consistency_draw_never_ends_after_it_starts() -> None:
    """The unclamped log-normal of EDM falls below T_min, where r = T_min would be larger than t."""
    normals = torch.full((1, 2), -8.0, dtype=torch.float64)
    config = ObjectiveConfig(diffusion_share=0.0, consistency_share=1.0)
    times = draw_times(TRANSPORTS["edm_sd1"], config, normals, torch.zeros(1, 3, dtype=torch.float64))
    assert times.t_S.item() == times.r_S.item() == pytest.approx(0.01)
    assert times.transition_indices == () and times.is_diffusion == (False,)


def test_given_times_are_checked() -> None:
    transport = TRANSPORTS["ot_fm"]
    t = torch.tensor([0.5, 0.6])
    with pytest.raises(TimeDomainError, match="entry 1 of 2"):
        Times.from_tensors(transport, t, torch.tensor([0.2, 0.7]))
    with pytest.raises(ShapeError, match="one shape"):
        Times.from_tensors(transport, t, torch.tensor([0.2]))
    with pytest.raises(ShapeError, match="is_diffusion"):
        Times.from_tensors(transport, t, t, (True,))
    with pytest.raises(ShapeError, match="normals"):
        draw_times(transport, ObjectiveConfig(), torch.zeros(3, 2), torch.zeros(3, 2))


def test_selected_images_keep_all_that_is_known_of_their_times() -> None:
    t, r = torch.tensor([0.9, 0.6, 0.5]), torch.tensor([0.1, 0.6, 0.0])
    times = Times.from_tensors(TRANSPORTS["ot_fm"], t, r)
    expected = Times.from_tensors(TRANSPORTS["ot_fm"], t[[2, 1]], r[[2, 1]])
    chosen = times.select((2, 1), torch.tensor([2, 1]))
    assert torch.equal(chosen.t_S, expected.t_S) and torch.equal(chosen.r_S, expected.r_S)
    assert (chosen.is_diffusion, chosen.transition_indices, chosen.t_values) == (
        expected.is_diffusion,
        expected.transition_indices,
        expected.t_values,
    )


def test_moving_keeps_the_host_side_decisions() -> None:
    times = Times.from_tensors(
        TRANSPORTS["ot_fm"], torch.tensor([0.5, 0.6, 0.7]), torch.tensor([0.5, 0.1, 0.7])
    )
    moved = times.to("meta")
    assert moved.t_S.device.type == moved.r_S.device.type == "meta"
    assert moved.transition_indices == times.transition_indices == (1,)
    assert moved.is_diffusion == (True, False, True) and moved.num_segments == 3
