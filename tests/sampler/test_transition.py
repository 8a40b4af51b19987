"""The sampling loop, against closed forms and with a network that records how it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.networks import class_config, random_network, random_pack, text_config
from tim_ds.errors import NonFiniteError, RequestError, ShapeError
from tim_ds.objective.config import TransportConfig
from tim_ds.objective.transport import Transport, build_transport
from tim_ds.packed import ClassCondition, Condition, NetworkOutput, Segments, TextCondition
from tim_ds.sampler.config import SamplerConfig
from tim_ds.sampler.rng import initial_noise
from tim_ds.sampler.transition import SampleResult, sample

TRANSPORTS = ("ot_fm", "trigflow", "edm", "vp", "ve", "tim")
GRIDS = ((3, 5), (1, 1), (4, 2))
SEEDS = (5, 6, 7)
SEGMENTS = Segments.from_grids(GRIDS)
CHANNELS = 4
LABELS = ClassCondition(torch.tensor([0, 1, 2]))
NULL = ClassCondition(torch.tensor([9, 9, 9]))

MEAN, STD = 0.7, 0.4
"""Of the Gaussian data for which F is known."""


def _transport(kind: str) -> Transport:
    return build_transport(TransportConfig(kind=kind))  # type: ignore[arg-type]


def _time_of(kind: str, c: Tensor) -> Tensor:
    """Inverse of c_noise."""
    match kind:
        case "edm":
            return torch.exp(4 * c)
        case "vp":
            return c / 999
        case "ve":
            return 2 * torch.exp(c)
    return c


def _flow(transport: Transport, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The probability-flow map x_t -> x_r of Gaussian data N(MEAN, STD^2)."""

    def spread(s: Tensor) -> Tensor:
        return torch.sqrt((transport.alpha(s) * STD) ** 2 + transport.sigma(s) ** 2)

    return transport.alpha(r) * MEAN + spread(r) / spread(t) * (x_t - transport.alpha(t) * MEAN)


class GaussianNetwork:
    """The exact F of Gaussian data: its transition is the flow map, at r = t it is E[target | x_t]."""

    def __init__(self, kind: str) -> None:
        self.kind, self.transport = kind, _transport(kind)

    def __call__(
        self, x_TC: Tensor, t_S: Tensor, r_S: Tensor, segments: Segments, condition: Condition, **_: Any
    ) -> NetworkOutput:
        tr = self.transport
        t, r = (segments.expand(_time_of(self.kind, c))[:, None] for c in (t_S, r_S))
        variance = (tr.alpha(t) * STD) ** 2 + tr.sigma(t) ** 2
        centred = x_TC - tr.alpha(t) * MEAN
        x_mean = MEAN + tr.alpha(t) * STD**2 / variance * centred
        z_mean = tr.sigma(t) / variance * centred
        at_once = tr.alpha_hat(t) * x_mean + tr.sigma_hat(t) * z_mean
        F = (_flow(tr, x_TC, t, r) - tr.A(t, r) * x_TC) / tr.B(t, r)
        return NetworkOutput(torch.where(r < t, F, at_once), None)


class Spy:
    """A network with F = x / 3 + label, that records its calls."""

    def __init__(self, change: Callable[[Tensor, Segments], Tensor] | None = None) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Segments, Condition]] = []
        self.change = change

    def __call__(
        self, x_TC: Tensor, t_S: Tensor, r_S: Tensor, segments: Segments, condition: Condition, **_: Any
    ) -> NetworkOutput:
        self.calls.append((x_TC, t_S, r_S, segments, condition))
        assert isinstance(condition, ClassCondition)
        F_TC = x_TC / 3 + segments.expand(condition.labels_S.to(x_TC.dtype))[:, None]
        return NetworkOutput(F_TC if self.change is None else self.change(F_TC, segments), None)


def _noise(dtype: torch.dtype = torch.float64) -> Tensor:
    return initial_noise(GRIDS, CHANNELS, SEEDS).to(dtype)


def _run(network: Any, kind: str = "ot_fm", *, z: Tensor | None = None, **options: Any) -> SampleResult:
    keywords = {k: options.pop(k) for k in ("seeds", "noise", "on_step", "keep_trajectory") if k in options}
    null = options.pop("null", NULL)
    return sample(
        network,
        _transport(kind),
        _noise() if z is None else z,
        SEGMENTS,
        LABELS,
        SamplerConfig(**options),
        null_condition=null,
        **keywords,
    )


@pytest.mark.parametrize("kind", TRANSPORTS)
@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_exact_network_reaches_the_flow_map_of_gaussian_data_in_any_number_of_steps(
    kind: str, num_steps: int
) -> None:
    transport = _transport(kind)
    start, end = (torch.tensor(s, dtype=torch.float64) for s in (transport.T_max, transport.T_min))
    expected = _flow(transport, transport.sigma(start) * _noise(), start, end) / transport.alpha(end)
    got = _run(GaussianNetwork(kind), kind, num_steps=num_steps)
    # The result is handed over in float32.
    assert (got.x_TC - expected).abs().max() < 3e-7 * expected.abs().max()
    # 96 draws: a standard error of 7 %.
    assert expected.std().item() == pytest.approx(STD, rel=0.3)


@pytest.mark.parametrize("kind", ["ot_fm", "trigflow", "tim"])
def test_diffusion_mode_is_an_ode_solver_of_first_order(kind: str) -> None:
    exact = _run(GaussianNetwork(kind), kind, num_steps=1).x_TC
    errors = [
        (_run(GaussianNetwork(kind), kind, num_steps=n, mode="diffusion").x_TC - exact).abs().max().item()
        for n in (64, 128)
    ]
    # Halving the step halves the error, up to the second order, some 1/64 of it.
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


def test_diffusion_mode_tells_the_network_r_equal_t_while_the_state_moves() -> None:
    spy = Spy()
    _run(spy, "ve", num_steps=3, mode="diffusion")
    assert all(torch.equal(t, r) for _, t, r, _, _ in spy.calls)
    assert len({t[0].item() for _, t, _, _, _ in spy.calls}) == 3


def test_transition_mode_tells_the_network_where_each_step_begins_and_ends() -> None:
    spy = Spy()
    _run(spy, "vp", num_steps=2)
    middle = 999 * (1 + 1e-5) / 2
    expected = [(999.0, middle), (middle, 999e-5)]
    for (t, r), (_, t_S, r_S, _, _) in zip(expected, spy.calls, strict=True):
        assert t_S.shape == r_S.shape == (3,)
        assert t_S.tolist() == pytest.approx([t] * 3, rel=1e-14)
        assert r_S.tolist() == pytest.approx([r] * 3, rel=1e-14)


@pytest.mark.parametrize("condition", ["text", "class"])
@pytest.mark.parametrize("stochasticity", [0.0, 0.3])
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(condition: str, stochasticity: float) -> None:
    model = text_config() if condition == "text" else class_config()
    network = random_network(model)
    _, _, _, segments, full = random_pack(model)
    assert segments.grids is not None
    seeds = [100 + i for i in range(segments.num_segments)]
    config = SamplerConfig(num_steps=3, cfg_scale=1.7, stochasticity=stochasticity)

    def run(indices: list[int]) -> Tensor:
        part, given = segments.select(indices), full.select(indices)
        z = initial_noise(part.grids or (), model.token_channels, [seeds[i] for i in indices]).double()
        return sample(
            network,
            _transport("tim"),
            z,
            part,
            given,
            config,
            null_condition=_null(given, part),
            seeds=[seeds[i] for i in indices],
        ).x_TC

    together = segments.split(run([*range(segments.num_segments)]))
    for indices in ([2], [4, 0], [3, 1, 2]):
        parts = segments.select(indices).split(run(indices))
        for i, part in zip(indices, parts, strict=True):
            # float64 network: packs of other sizes differ by the order of its sums; float32 at the very end.
            assert torch.allclose(part, together[i], rtol=3e-7, atol=1e-7)


def _null(condition: Condition, segments: Segments) -> Condition:
    if isinstance(condition, ClassCondition):
        return ClassCondition(torch.full_like(condition.labels_S, 5))
    assert isinstance(condition, TextCondition)
    width = condition.states_LE.shape[1]
    states = torch.full((segments.num_segments, width), 0.3, dtype=torch.float64)
    return TextCondition(states, Segments.from_lengths([1] * segments.num_segments))


def test_guided_step_combines_both_predictions_in_one_call() -> None:
    spy, scale = Spy(), 2.5
    result = _run(spy, num_steps=1, cfg_scale=scale)
    assert result.nfe == 2
    ((x, t_S, r_S, segments, condition),) = spy.calls
    assert segments.grids == GRIDS + GRIDS
    assert isinstance(condition, ClassCondition) and condition.labels_S.tolist() == [0, 1, 2, 9, 9, 9]
    assert torch.equal(x, torch.cat([_noise(), _noise()]))
    assert (t_S.tolist(), r_S.tolist()) == ([1.0] * 6, [0.0] * 6)
    z = _noise()
    label = SEGMENTS.expand(torch.tensor([0.0, 1.0, 2.0]).double())[:, None]
    guided = (z / 3 + 9) + scale * (label - 9)
    assert torch.allclose(result.x_TC, (z - guided).float(), rtol=1e-6)


def test_guidance_1_equals_no_guidance_and_needs_no_null_condition() -> None:
    plain = _run(Spy(), num_steps=3, null=None)
    assert torch.equal(_run(Spy(), num_steps=3, cfg_scale=1.0).x_TC, plain.x_TC)
    assert plain.nfe == 3


@pytest.mark.parametrize(
    ("options", "guided"),
    [
        ({}, [True] * 4),
        ({"cfg_upper": "exclusive"}, [False, True, True, True]),
        ({"cfg_interval": (0.0, 0.5)}, [False, False, True, True]),
        ({"cfg_interval": (0.3, 0.6)}, [False, False, True, False]),
    ],
    ids=["default", "exclusive", "low", "inner"],
)
def test_nfe_counts_guided_steps_twice(options: dict[str, Any], guided: list[bool]) -> None:
    spy = Spy()
    result = _run(spy, num_steps=4, cfg_scale=2.0, **options)
    assert [call[3].num_segments == 6 for call in spy.calls] == guided
    assert result.nfe == 4 + sum(guided)


def test_guidance_without_null_condition_is_refused_before_any_work() -> None:
    spy = Spy()
    with pytest.raises(RequestError, match="null_condition"):
        _run(spy, num_steps=2, cfg_scale=2.0, null=None)
    assert not spy.calls


@pytest.mark.parametrize("kind", ["trigflow", "edm", "vp", "ve"])
def test_stochasticity_is_refused_by_transports_without_it_before_any_work(kind: str) -> None:
    spy = Spy()
    with pytest.raises(RequestError, match=f"transport {kind} has no stochastic step"):
        _run(spy, kind, num_steps=4, stochasticity=0.2, seeds=SEEDS)
    assert not spy.calls


def test_stochasticity_without_seeds_is_refused_before_any_work() -> None:
    spy = Spy()
    with pytest.raises(RequestError, match="pass seeds"):
        _run(spy, num_steps=4, stochasticity=0.2)
    assert not spy.calls


@pytest.mark.parametrize(("num_steps", "draws"), [(1, 0), (2, 0), (3, 1), (6, 4)])
def test_first_and_last_step_are_never_stochastic(num_steps: int, draws: int) -> None:
    drawn: list[int] = []

    def source() -> Any:
        while True:
            drawn.append(1)
            yield torch.ones_like(_noise())

    noisy = _run(Spy(), num_steps=num_steps, stochasticity=0.5, noise=source(), keep_trajectory=True)
    plain = _run(Spy(), num_steps=num_steps, keep_trajectory=True)
    assert len(drawn) == draws
    assert noisy.trajectory is not None and plain.trajectory is not None
    assert torch.equal(noisy.trajectory[0], plain.trajectory[0])
    assert torch.equal(noisy.x_TC, plain.x_TC) == (draws == 0)


@pytest.mark.parametrize("kind", ["ot_fm", "tim"])
def test_stochastic_steps_keep_the_distribution_of_the_data(kind: str) -> None:
    grid = (100, 100)
    segments = Segments.from_grids([grid])
    z = initial_noise([grid], 2, [1]).double()
    result = sample(
        GaussianNetwork(kind),
        _transport(kind),
        z,
        segments,
        ClassCondition(torch.tensor([0])),
        SamplerConfig(num_steps=64, stochasticity=0.5),
        seeds=[1],
    )
    # 20,000 draws: standard errors 0.003 and 0.002; the first-order steps of 1/64 add up to some 0.004.
    assert result.x_TC.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert result.x_TC.std().item() == pytest.approx(STD, abs=0.015)
    # The noise is really fresh: the deterministic run would be a function of z.
    correlation = torch.corrcoef(torch.stack([result.x_TC.flatten(), z.float().flatten()]))[0, 1]
    assert correlation < 0.9


def test_a_non_finite_prediction_stops_the_run_and_names_the_image_and_the_step() -> None:
    def spoil(F_TC: Tensor, segments: Segments) -> Tensor:
        return torch.where((segments.segment_ids == 1)[:, None], torch.nan, F_TC)

    spy = Spy(spoil)
    with pytest.raises(NonFiniteError, match=r"images \[1\] of 3 .* after step 1 of 4 \(t=1 to r=0.75\)"):
        _run(spy, num_steps=4)
    assert len(spy.calls) == 1


def test_non_finite_noise_is_named_before_any_work() -> None:
    spy, z = Spy(), _noise()
    z[-1, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"images \[2\] of 3 .* in the initial noise"):
        _run(spy, z=z, num_steps=4)
    assert not spy.calls


def test_trajectory_and_observer_see_the_state_after_every_step() -> None:
    seen: list[tuple[int, float, Tensor]] = []
    result = _run(Spy(), num_steps=4, keep_trajectory=True, on_step=lambda *step: seen.append(step))
    assert [(i, r) for i, r, _ in seen] == [(1, 0.75), (2, 0.5), (3, 0.25), (4, 0.0)]
    assert result.trajectory is not None
    assert torch.equal(result.trajectory, torch.stack([x.float() for _, _, x in seen]))
    assert torch.equal(result.trajectory[-1], result.x_TC)
    assert _run(Spy(), num_steps=2).trajectory is None


@pytest.mark.parametrize(
    ("dtype", "time_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_network_sees_the_state_in_the_dtype_of_the_noise_and_never_coarse_times(
    dtype: torch.dtype, time_dtype: torch.dtype
) -> None:
    spy = Spy()
    result = _run(spy, z=_noise(dtype), num_steps=2)
    for x, t_S, r_S, _, _ in spy.calls:
        assert (x.dtype, t_S.dtype, r_S.dtype) == (dtype, time_dtype, time_dtype)
    assert result.x_TC.dtype == torch.float32


def test_state_is_carried_in_float64_whatever_the_network_sees() -> None:
    states: list[Tensor] = []
    _run(Spy(), z=_noise(torch.bfloat16), num_steps=3, on_step=lambda i, r, x: states.append(x))
    assert all(x.dtype == torch.float64 for x in states)
    assert not any(torch.equal(x, x.float().double()) for x in states)


def test_the_first_step_starts_from_the_unrounded_noise() -> None:
    z = _noise(torch.bfloat16)
    result = _run(Spy(), "trigflow", z=z, num_steps=1)
    F = (z / 3 + SEGMENTS.expand(torch.tensor([0.0, 1.0, 2.0]).bfloat16())[:, None]).double()
    angle = torch.tensor(1.57, dtype=torch.float64)
    expected = angle.cos() * (angle.sin() * z.double()) - angle.sin() * F
    assert torch.equal(result.x_TC, expected.float())


def test_no_gradient_graph_is_kept() -> None:
    model = class_config()
    network = random_network(model)
    z, _, _, segments, condition = random_pack(model)
    assert not sample(
        network, _transport("ot_fm"), z, segments, condition, SamplerConfig(num_steps=1)
    ).x_TC.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_TC": torch.zeros(7, 4)}, r"z_TC: expected \[24, C\], received \[7, 4\]"),
        ({"condition": ClassCondition(torch.tensor([1]))}, "condition: expected one for each of 3 images"),
        ({"null_condition": ClassCondition(torch.tensor([1]))}, "null_condition: expected one for each of 3"),
        (
            {"null_condition": TextCondition(torch.zeros(3, 2), Segments.from_lengths([1, 1, 1]))},
            "expected ClassCondition like the condition, received TextCondition",
        ),
    ],
    ids=["noise", "condition", "null", "kinds"],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"z_TC": _noise(), "condition": LABELS, "null_condition": NULL, **changes}
    with pytest.raises(ShapeError, match=message):
        sample(
            Spy(), _transport("ot_fm"), segments=SEGMENTS, config=SamplerConfig(cfg_scale=2.0), **arguments
        )
