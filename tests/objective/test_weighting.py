"""Weights of an image's loss, against stored values and by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from safetensors.torch import load_file

from tests.objective.networks import TRANSPORTS
from tim_ds.errors import ConfigError, TimeDomainError
from tim_ds.objective.config import ObjectiveConfig, TransportConfig, WeightConfig
from tim_ds.objective.transport import VE
from tim_ds.objective.weighting import adaptive_weight, check_warp_domain, mean_of_kind, time_weight

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "golden_dev_c2i_rect_p2.safetensors")
Type = Literal["constant", "reciprocal", "sqrt", "square", "soft_min_snr"]
Warp = Literal["identity", "tangent", "odds"]
STORED_TYPE = {"soft_min_snr": "Soft-Min-SNR"}
STORED_WARP = {"identity": "none", "odds": "sigmoid", "tangent": "tangent"}


@pytest.mark.parametrize("of_interval", [True, False], ids=["interval", "t_alone"])
@pytest.mark.parametrize("warp", get_args(Warp))
@pytest.mark.parametrize("time_type", get_args(Type))
def test_stored_weights(time_type: Type, warp: Warp, of_interval: bool) -> None:
    t, r = GOLDEN["tr/ot_fm/t"], GOLDEN["tr/ot_fm/r"]
    argument = "t_minus_r" if of_interval else "t"
    expected = GOLDEN[f"tw/{STORED_TYPE.get(time_type, time_type)}/{STORED_WARP[warp]}/{argument}"]
    config = WeightConfig(time_type=time_type, warp=warp, of_interval=of_interval)
    is_diffusion = t == r
    assert is_diffusion.tolist() == [True, True, False, False]
    received = time_weight(config, t, r, is_diffusion, 1.0)
    # float32 values through one tangent or quotient and one power.
    torch.testing.assert_close(received, expected, rtol=1e-6, atol=0)


def test_the_default_weight_is_equation_12() -> None:
    t, r = torch.tensor([0.9], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    received = time_weight(WeightConfig(), t, r, torch.tensor([False]), 0.5)
    assert received.item() == pytest.approx((0.5 + math.tan(0.9) - math.tan(0.2)) ** -0.5, rel=1e-14)


def test_diffusion_images_have_weight_one_whatever_the_time() -> None:
    t = torch.tensor([0.1, 0.9])
    for time_type in get_args(Type):
        weight = time_weight(WeightConfig(time_type=time_type), t, t, torch.tensor([True, True]), 0.5)
        assert weight.tolist() == [1.0, 1.0]


def test_odds_at_noise_has_its_limit() -> None:
    t, r = torch.tensor([1.0, 1.0]), torch.tensor([0.2, 1.0])
    weight = time_weight(WeightConfig(time_type="sqrt", warp="odds"), t, r, torch.tensor([False, True]), 1.0)
    assert weight.tolist() == [0.0, 1.0]


VALID = {
    "tangent": {"ot_fm", "trigflow", "vp", "tim"},
    "odds": {"ot_fm", "vp", "tim"},
    "identity": set(TRANSPORTS),
}


@pytest.mark.parametrize("name", list(TRANSPORTS))
@pytest.mark.parametrize("warp", get_args(Warp))
def test_a_warp_beyond_its_domain_is_refused(name: str, warp: Warp) -> None:
    transport, config = TRANSPORTS[name], WeightConfig(warp=warp)
    kind = name.split("_sd")[0]
    if name in VALID[warp]:
        check_warp_domain(config, transport)
        ObjectiveConfig(transport=TransportConfig(kind=kind), weight=config)  # type: ignore[arg-type]
    else:
        with pytest.raises(
            TimeDomainError, match=rf"{warp} is valid for t .* times of {kind} reach .* use identity"
        ):
            check_warp_domain(config, transport)
        with pytest.raises(ConfigError, match=r"^objective\.weight\.warp: "):
            ObjectiveConfig(transport=TransportConfig(kind=kind), weight=config)  # type: ignore[arg-type]
    check_warp_domain(WeightConfig(time_type="constant", warp=warp), transport)


def test_the_domain_is_that_of_the_transport_given() -> None:
    check_warp_domain(WeightConfig(warp="tangent"), VE(sigma_max=1.5))
    with pytest.raises(TimeDomainError, match=r"reach 1\.6"):
        check_warp_domain(WeightConfig(warp="tangent"), VE(sigma_max=1.6))


def test_the_adaptive_weight_turns_the_gradient_into_that_of_the_logarithm() -> None:
    loss = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    kinds = torch.tensor([True, False])
    (adaptive_weight(WeightConfig(adaptive_over="image"), loss, kinds) * loss).sum().backward()
    torch.testing.assert_close(loss.grad, 1 / (loss.detach() + 1e-5), rtol=1e-14, atol=0)


def test_the_adaptive_weight_compares_kinds_unless_told_otherwise_and_is_one_when_off() -> None:
    loss = torch.tensor([0.25, 2.0, 0.75, 4.0], dtype=torch.float64, requires_grad=True)
    kinds = torch.tensor([True, False, True, False])
    found = adaptive_weight(WeightConfig(), loss, kinds)
    expected = 1 / (torch.tensor([0.5, 3.0, 0.5, 3.0], dtype=torch.float64) + 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    assert not found.requires_grad
    assert adaptive_weight(WeightConfig(adaptive=False), loss, kinds).tolist() == [1.0] * 4


def test_the_mean_of_a_kind_is_over_the_images_of_that_kind() -> None:
    loss = torch.tensor([0.3, 2.0, 0.5, 4.0, 0.1], dtype=torch.float64)
    is_diffusion = torch.tensor([True, False, True, False, True])
    expected = torch.tensor([0.3, 3.0, 0.3, 3.0, 0.3], dtype=torch.float64)
    torch.testing.assert_close(mean_of_kind(loss, is_diffusion), expected, rtol=1e-15, atol=0)
    # A pack of one kind only, and one of a single image: no division by an empty count.
    torch.testing.assert_close(mean_of_kind(loss[1::2], is_diffusion[1::2]), expected[1::2], rtol=0, atol=0)
    torch.testing.assert_close(mean_of_kind(loss[:1], is_diffusion[:1]), loss[:1], rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stays_out_of_the_mean_of_its_kind() -> None:
    loss = torch.tensor([0.25, math.nan, 0.75, math.inf, 1.0], dtype=torch.float64)
    is_diffusion = torch.tensor([True, True, True, False, False])
    assert mean_of_kind(loss, is_diffusion).tolist() == [0.5, 0.5, 0.5, 1.0, 1.0]


def test_a_divisor_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^objective\.weight\.adaptive_over: image has no effect"):
        WeightConfig(adaptive=False, adaptive_over="image")
