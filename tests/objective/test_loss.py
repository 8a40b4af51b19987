"""The loss of a pack: stored values, its composition, its gradient, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import load_file
from torch import Tensor

from tests.objective.networks import TRANSPORTS, SmoothNetwork, differenced, images_at
from tim_ds.errors import ConfigError, ShapeError, TimeDomainError
from tim_ds.objective.config import GuidedTargetConfig, ObjectiveConfig, TransportConfig, WeightConfig
from tim_ds.objective.loss import LossTerms, non_finite_samples, transition_loss
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.target import transition_target
from tim_ds.objective.time_sampling import Times, draw_times
from tim_ds.packed import ClassCondition, Condition, NetworkOutput, Segments, patchify, unpatchify

STORED = Path(__file__).parents[1] / "golden"
GOLDEN = load_file(STORED / "golden_dev_c2i_rect_p2.safetensors")
DESCRIPTION = json.loads((STORED / "golden_dev_c2i_rect_p2.json").read_text())
PLAIN = WeightConfig(time_type="constant", adaptive=False)
OWN = WeightConfig(adaptive_over="image")
WEIGHTS = {
    "ot_fm": OWN,
    "trigflow": OWN,
    "edm_sd1": replace(OWN, time_type="soft_min_snr", warp="identity"),
    "vp": replace(OWN, time_type="reciprocal", warp="identity"),
    "ve": replace(OWN, time_type="square", warp="identity"),
}


def packed(latents: Tensor) -> Tensor:
    return torch.cat([patchify(latent, DESCRIPTION["network"]["patch_size"]) for latent in latents])


class Recorded:
    """Answers the main call with a stored F, the central difference's pair with values that give dF/dt."""

    def __init__(self, F: Tensor, dF_dt: Tensor, step: float, features: Tensor | None) -> None:
        self.F, self.dF_dt, self.step, self.features = F, dF_dt, step, features

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
        if not torch.is_grad_enabled():
            late = (self.step * self.dF_dt).split(list(segments.lengths[::2]))
            return NetworkOutput(torch.cat([side for part in late for side in (part, -part)]), None)
        return NetworkOutput(self.F, self.features if with_features else None)


def stored_pack(name: str):
    t, r = GOLDEN[f"tr/{name}/t"], GOLDEN[f"tr/{name}/r"]
    times = Times.from_tensors(TRANSPORTS[name], t, r)
    count, _, height, width = GOLDEN["in/x"].shape
    patch = DESCRIPTION["network"]["patch_size"]
    segments = Segments.from_grids([(height // patch, width // patch)] * count)
    return packed(GOLDEN["in/x"]), packed(GOLDEN["in/z"]), times, segments, ClassCondition(GOLDEN["in/y"])


@pytest.mark.parametrize("directional", [True, False], ids=["dir", "nodir"])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_stored_losses(name: str, directional: bool) -> None:
    transport = TRANSPORTS[name]
    x, z, times, segments, condition = stored_pack(name)
    assert times.transition_indices == (2, 3)
    moving = segments.token_index(times.transition_indices)
    projected = torch.ones(segments.num_tokens, 16)
    network = Recorded(
        packed(GOLDEN[f"tr/{name}/F"]),
        packed(GOLDEN[f"tr/{name}/dde"])[moving],
        transport.dde_step,
        projected,
    )
    config = differenced(
        transport=TransportConfig(kind=name.split("_sd")[0]),  # type: ignore[arg-type]
        weight=WEIGHTS[name],
        directional=directional,
    )
    terms = transition_loss(network, transport, config, x, z, times, segments, condition, latent_channels=4)
    key = f"loss/{name}/{'dir' if directional else 'nodir'}"
    # F, dF/dt and the times are the stored ones, so float32 rounding of the target and of the means remains.
    # The realised float32 distance 2e differs from 2 * step by up to 3e-4 (VP, step 1e-4), 1e-4 elsewhere.
    tolerance = 1e-3 if name == "vp" else 3e-4
    per_image = terms.denoising_S + terms.directional_S
    torch.testing.assert_close(per_image, GOLDEN[f"{key}/per_sample_denoising"], rtol=tolerance, atol=0)
    torch.testing.assert_close(per_image[:2], GOLDEN[f"{key}/per_sample_denoising"][:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.weight_S, GOLDEN[f"{key}/time_weight"], rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.total_S.mean(), GOLDEN[f"{key}/weighted"], rtol=1e-5, atol=0)


def test_stored_guided_loss() -> None:
    x, z, times, segments, condition = stored_pack("ot_fm")
    moving = segments.token_index(times.transition_indices)
    transport = TRANSPORTS["ot_fm"]
    network = Recorded(packed(GOLDEN["tr/ot_fm/F"]), packed(GOLDEN["tr/ot_fm/dde"])[moving], 0.005, None)
    guided = [i for i, t in enumerate(times.t_values) if 0.3 <= t <= 0.8]
    assert 0 < len(guided) < 4
    F_cond, F_null = (
        torch.cat([segments.split(packed(GOLDEN[f"mg/F_{branch}"]))[i] for i in guided])
        for branch in ("cond", "uncond")
    )

    def teacher(
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        return NetworkOutput(torch.cat([F_cond, F_null]), None)

    mg = DESCRIPTION["mg"]
    config = differenced(
        guided_target=GuidedTargetConfig(
            w_gt=mg["w_gt"], w_cond=mg["w_cond"], start=mg["w_start"], end=mg["w_end"]
        )
    )
    terms = transition_loss(
        network,
        transport,
        config,
        x,
        z,
        times,
        segments,
        condition,
        latent_channels=4,
        teacher=teacher,
        null_condition=condition,
    )
    received = (terms.denoising_S + terms.directional_S).mean()
    torch.testing.assert_close(received, GOLDEN["mg/denoising"], rtol=1e-5, atol=0)


GRIDS = [(2, 2), (1, 3), (4, 3)]


def pack(seed: int = 40, channels: int = 8):
    images = images_at(
        TRANSPORTS["tim"], [0.7, 0.9, 0.5], [0.7, 0.2, 0.0], GRIDS, channels=channels, seed=seed
    )
    return images.x_TC, images.z_TC, images.times, images.segments, images.condition


def loss(
    network, config: ObjectiveConfig, *, channels: int = 8, latent_channels: int = 2, **given
) -> LossTerms:
    return transition_loss(
        network, TRANSPORTS["tim"], config, *pack(channels=channels), latent_channels=latent_channels, **given
    )


def test_an_image_counts_the_same_alone_or_in_a_pack() -> None:
    network = SmoothNetwork(8)
    config = differenced(weight=OWN)
    together = loss(network, config)
    x, z, times, segments, condition = pack()
    for i in range(3):
        alone = transition_loss(
            network,
            TRANSPORTS["tim"],
            config,
            segments.split(x)[i],
            segments.split(z)[i],
            Times.from_tensors(TRANSPORTS["tim"], times.t_S[i : i + 1], times.r_S[i : i + 1]),
            segments.select([i]),
            condition.select([i]),
            latent_channels=2,
        )
        for whole, single in zip(together, alone, strict=True):
            # The order of sums over tokens differs between the packs; the difference divides it by 0.01.
            torch.testing.assert_close(single[0], whole[i], rtol=1e-11, atol=1e-12)


def test_terms_compose_as_stated() -> None:
    network = SmoothNetwork(8)
    features = torch.randn(19, 3, generator=torch.Generator().manual_seed(41), dtype=torch.float64)
    config = differenced(repa_weight=0.5, weight=OWN)
    terms = loss(network, config, features_TZ=features)
    per_image = terms.denoising_S + terms.directional_S
    expected = terms.weight_S * terms.adaptive_S * per_image + 0.5 * terms.alignment_S
    torch.testing.assert_close(terms.total_S, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(terms.adaptive_S, 1 / (per_image + 1e-5), rtol=1e-14, atol=0)
    assert terms.weight_S[0] == 1 and (terms.weight_S[1:] < 1).all() and (terms.alignment_S > 0).all()
    assert terms.total_S.requires_grad and not any(term.requires_grad for term in terms[1:])
    bare = loss(network, differenced(directional=False, weight=PLAIN))
    assert (
        torch.equal(bare.total_S, bare.denoising_S)
        and not bare.directional_S.any()
        and not bare.alignment_S.any()
    )


def test_divided_by_its_kind_an_image_keeps_its_share_of_the_gradient() -> None:
    """Segment 0 trains r = t, segments 1 and 2 r < t: the two share one detached divisor, their mean."""
    network = SmoothNetwork(8)
    weight = WeightConfig(time_type="constant", adaptive_over="kind")
    terms = loss(network, differenced(weight=weight))
    per_image = terms.denoising_S + terms.directional_S
    means = torch.stack([per_image[0], per_image[1:].mean(), per_image[1:].mean()])
    torch.testing.assert_close(terms.adaptive_S, 1 / (means + 1e-5), rtol=1e-14, atol=0)
    terms.total_S.sum().backward()
    received = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    (loss(network, differenced(weight=PLAIN)).total_S / (means + 1e-5)).sum().backward()
    expected = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(received) == len(expected) > 4
    for a, b in zip(received, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_gradient_is_that_of_the_main_call_against_a_fixed_target() -> None:
    network = SmoothNetwork(8)
    loss(network, differenced(weight=PLAIN, directional=False)).total_S.sum().backward()
    received = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    x, z, times, segments, condition = pack()
    transport = TRANSPORTS["tim"]
    images = NoisedPack(transport, x, z, times, segments, condition)
    fixed = transition_target(network, differenced(), images)
    network.zero_grad()
    F = network(images.x_t_TC, times.t_S, times.r_S, segments, condition).F_TC
    sum(part.square().mean() for part in segments.split(F - fixed)).backward()  # type: ignore[union-attr]
    expected = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(received) == len(expected) > 4
    for a, b in zip(received, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_calls_without_gradient_come_first_and_features_only_from_the_main_call() -> None:
    network, bare = SmoothNetwork(8), SmoothNetwork(8)
    loss(network, differenced(repa_weight=1.0), features_TZ=torch.ones(19, 3).double())
    assert [call.with_features for call in network.calls] == [False, True]
    assert network.calls[1].segments.grids == tuple(GRIDS)
    loss(bare, differenced())
    assert [call.with_features for call in bare.calls] == [False, False]


def test_direction_is_compared_per_latent_cell() -> None:
    """Against the picture itself: unpatchify, cosine over channels, mean over pixels."""
    latent_channels, patch = 2, 2

    def network(
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        return NetworkOutput(torch.sin(3 * x_TC) + 0.3, None)

    config = differenced(diffusion_share=1.0, weight=PLAIN)
    x, z, times, segments, condition = pack()
    times = Times.from_tensors(TRANSPORTS["tim"], times.t_S, times.t_S)
    terms = transition_loss(
        network, TRANSPORTS["tim"], config, x, z, times, segments, condition, latent_channels=latent_channels
    )
    x_t = TRANSPORTS["tim"].interpolate(x, z, segments.expand(times.t_S)[:, None])
    F = torch.sin(3 * x_t) + 0.3
    for i, grid in enumerate(GRIDS):
        picture, target = (unpatchify(segments.split(v)[i], grid, patch) for v in (F, z - x))
        expected = 1 - nnf.cosine_similarity(picture, target, dim=0).mean()
        torch.testing.assert_close(terms.directional_S[i], expected, rtol=1e-12, atol=0)


def test_a_zero_initialised_output_has_a_bounded_gradient() -> None:
    network = SmoothNetwork(8)
    torch.nn.init.zeros_(network.outward)
    terms = loss(network, differenced(weight=PLAIN))
    torch.testing.assert_close(terms.directional_S, torch.ones(3).double(), rtol=0, atol=0)
    terms.total_S.mean().backward()
    assert network.outward.grad is not None
    # Of order 1 / COSINE_FLOOR = 100; with the usual floor of 1e-8 it is of order 1e8.
    assert 1 < network.outward.grad.norm() < 300


def test_bfloat16_outputs_meet_a_float32_target() -> None:
    def network(
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        return NetworkOutput((0.5 * x_TC).bfloat16(), None)

    x, z, times, segments, condition = pack()
    times32 = Times.from_tensors(TRANSPORTS["tim"], times.t_S.float(), times.r_S.float())
    terms = transition_loss(
        network,
        TRANSPORTS["tim"],
        differenced(),
        x.bfloat16(),
        z.float(),
        times32,
        segments,
        condition,
        latent_channels=2,
    )
    assert {term.dtype for term in terms} == {torch.float32}


def test_times_wider_than_the_images_reach_the_network_and_widen_nothing_else() -> None:
    seen: list[tuple[torch.dtype, ...]] = []

    def network(
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        seen.append((x_TC.dtype, t_S.dtype, r_S.dtype))
        times_T1 = segments.expand(torch.sin(t_S - 0.5 * r_S).to(x_TC.dtype))[:, None]
        return NetworkOutput(torch.tanh(x_TC + times_T1), None)

    x, z, times, segments, condition = pack()
    guided = GuidedTargetConfig(start=0.0, end=1.0)
    config = differenced(guided_target=guided)
    narrow, wide = (
        transition_loss(
            network,
            TRANSPORTS["tim"],
            config,
            x.to(dtype),
            z.to(dtype),
            times,
            segments,
            condition,
            latent_channels=2,
            teacher=network,
            null_condition=condition,
        )
        for dtype in (torch.float32, torch.float64)
    )
    # The teacher, both sides, the main call.
    assert seen[:3] == [(torch.float32, torch.float64, torch.float64)] * 3
    assert {term.dtype for term in narrow} == {torch.float32}
    # float32 rounding of F, 6e-8, divided by 2e = 0.01.
    assert all(torch.allclose(a.double(), b, rtol=1e-4) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("estimator", ["dde", "jvp"])
def test_float32_times_are_all_that_a_network_of_float32_is_given(estimator: Literal["dde", "jvp"]) -> None:
    """As drawn by default: a linear layer of torch takes them."""
    layer = torch.nn.Linear(2, 8)

    def network(
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        return NetworkOutput(x_TC + segments.expand(layer(torch.stack([t_S, r_S], -1))), None)

    x, z, _, segments, condition = pack()
    draws = torch.Generator().manual_seed(3)
    normals, uniforms = (torch.rand(3, n, generator=draws, dtype=torch.float64) for n in (2, 3))
    config = ObjectiveConfig(derivative=estimator, diffusion_share=0.0)
    times = draw_times(TRANSPORTS["vp"], config, normals, uniforms)
    given = (x.float(), z.float(), times, segments, condition)
    terms = transition_loss(network, TRANSPORTS["vp"], config, *given, latent_channels=2)
    assert {term.dtype for term in terms} == {torch.float32}


def broken(index: int, value: float):
    """A network whose output for segment `index` holds one bad number in the main call."""
    inner = SmoothNetwork(8)

    def network(
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        F = inner(x_TC, t_S, r_S, segments, condition).F_TC
        if torch.is_grad_enabled():
            F = F.clone()
            F[segments.token_index([index])[0], 0] = value
        return NetworkOutput(F, None)

    return network


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_is_kept_and_named(value: float) -> None:
    terms = loss(broken(1, value), differenced())
    assert terms.total_S.isfinite().tolist() == [True, False, True]
    assert non_finite_samples(terms, ["a.tar:0", "a.tar:1", "b.tar:7"]) == ["a.tar:1"]


def test_a_bad_image_is_named_alone_where_its_kind_shares_a_divisor() -> None:
    config = differenced(weight=WeightConfig(adaptive_over="kind"))
    assert non_finite_samples(loss(broken(1, math.nan), config), ["a", "b", "c"]) == ["b"]


def test_finite_losses_name_nobody() -> None:
    terms = loss(SmoothNetwork(8), differenced())
    assert non_finite_samples(terms, ["a", "b", "c"]) == []
    with pytest.raises(ShapeError, match="3 images, 2 keys"):
        non_finite_samples(terms, ["a", "b"])


def test_what_does_not_fit_together_is_refused() -> None:
    network = SmoothNetwork(8)
    x, z, times, segments, condition = pack()
    transport, config = TRANSPORTS["tim"], differenced()
    with pytest.raises(ShapeError, match="expected x and z"):
        transition_loss(network, transport, config, x[1:], z, times, segments, condition, latent_channels=2)
    with pytest.raises(ShapeError, match="3 segments, 3 times, 2 conditions"):
        transition_loss(
            network, transport, config, x, z, times, segments, condition.select([0, 1]), latent_channels=2
        )
    with pytest.raises(ShapeError, match="whole cells of 3"):
        transition_loss(network, transport, config, x, z, times, segments, condition, latent_channels=3)
    with pytest.raises(ShapeError, match="at least one token"):
        transition_loss(
            network,
            transport,
            config,
            x[:4],
            z[:4],
            times,
            Segments.from_lengths([4, 0, 0]),
            condition,
            latent_channels=2,
        )
    with pytest.raises(ShapeError, match="network: F is"):
        loss(lambda *_, **__: NetworkOutput(torch.zeros(19, 4), None), differenced(diffusion_share=1.0))
    with pytest.raises(TimeDomainError, match="tangent"):
        edm = TRANSPORTS["edm_sd1"]
        edm_times = Times.from_tensors(edm, times.t_S, torch.full_like(times.t_S, 0.1))
        transition_loss(network, edm, config, x, z, edm_times, segments, condition, latent_channels=2)


def test_alignment_without_its_inputs_is_refused() -> None:
    features = torch.ones(19, 3, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"objective\.repa_weight: 1\.0, but encoder features are missing"):
        loss(SmoothNetwork(8), differenced(repa_weight=1.0))
    with pytest.raises(ConfigError, match=r"objective\.repa_weight: 0\.0, but encoder features are given"):
        loss(SmoothNetwork(8), differenced(), features_TZ=features)
    with pytest.raises(ConfigError, match=r"returned no features; set model\.z_dim"):
        loss(broken(0, 0.0), differenced(repa_weight=1.0), features_TZ=features)
