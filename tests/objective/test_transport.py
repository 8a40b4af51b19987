"""Every row of Table 1 against computer algebra, stored values and its own invariants."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import mpmath
import pytest
import sympy
import torch
from safetensors.torch import load_file

from tests.objective.networks import TRANSPORTS, GaussianNetwork, random_times
from tim_ds.errors import ConfigError, RequestError, TimeDomainError
from tim_ds.objective.config import TransportConfig
from tim_ds.objective.transport import EDM, OTFM, VE, VP, TiMTransport, Transport, TrigFlow, build_transport

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "golden_dev_formulas.safetensors")
ROWS = list(TRANSPORTS)
STORED = [name for name in ROWS if f"{name}/t" in GOLDEN]

# Evaluated at 30 digits; the classes at float64, whose tangents and differences lose a few digits of 2e-16.
ALGEBRA_TOLERANCE = 1e-10


def definitions(name: str, t: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr, sympy.Expr]:
    """alpha, sigma, alpha_hat, sigma_hat of a row: the only input of the algebra."""
    if name == "ot_fm":
        return 1 - t, t, sympy.Integer(-1), sympy.Integer(1)
    if name == "trigflow":
        return sympy.cos(t), sympy.sin(t), -sympy.sin(t), sympy.cos(t)
    if name.startswith("edm"):
        d = sympy.Rational(1, 2) if name.endswith("0p5") else sympy.Integer(1)
        s = sympy.sqrt(t**2 + d**2)
        return 1 / s, t / s, t / (d * s), -d / s
    if name == "vp":
        beta = sympy.sqrt(sympy.exp(sympy.Rational(199, 20) * t**2 + t / 10) - 1)
        return 1 / sympy.sqrt(beta**2 + 1), beta / sympy.sqrt(beta**2 + 1), sympy.Integer(0), sympy.Integer(1)
    if name == "ve":
        return sympy.Integer(1), t, sympy.Integer(0), sympy.Integer(-1)
    if name == "tim":
        return sympy.cos(sympy.pi * t / 2), sympy.sin(sympy.pi * t / 2), sympy.Integer(-1), sympy.Integer(1)
    raise KeyError(f"{name}: expected its path here, from which the other coefficients follow")


def relative_error(received: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error against the value itself, or against 1 where the value is smaller than 1e-6."""
    scale = torch.where(expected.abs() > 1e-6, expected.abs(), torch.ones_like(expected))
    return ((received - expected).abs() / scale).max().item()


@pytest.mark.parametrize("name", ROWS)
def test_every_coefficient_follows_from_the_path_by_algebra(name: str) -> None:
    transport = TRANSPORTS[name]
    t, r, x, z, dF, F = sympy.symbols("t r x z dF F", real=True)
    alpha, sigma, alpha_hat, sigma_hat = definitions(name, t)
    alpha_r, sigma_r = alpha.subs(t, r), sigma.subs(t, r)
    D = sigma_hat * alpha - alpha_hat * sigma
    A = (alpha_r * sigma_hat - sigma_r * alpha_hat) / D
    B = (sigma_r * alpha - alpha_r * sigma) / D
    h = alpha_hat * x + sigma_hat * z
    x_t = alpha * x + sigma * z
    expressions = {
        "alpha": alpha,
        "sigma": sigma,
        "alpha_hat": alpha_hat,
        "sigma_hat": sigma_hat,
        "d_alpha": sympy.diff(alpha, t),
        "d_sigma": sympy.diff(sigma, t),
        "d_alpha_hat": sympy.diff(alpha_hat, t),
        "d_sigma_hat": sympy.diff(sigma_hat, t),
        "D": D,
        "A": A,
        "B": B,
        "dB": sympy.diff(B, t),
        "B_over_dB": B / sympy.diff(B, t),
        "x_t": x_t,
        "velocity": sympy.diff(x_t, t),
        "x_r": A * x_t + B * F,
        "predict_x": (sigma_hat * x_t - sigma * F) / D,
        "predict_z": (alpha * F - alpha_hat * x_t) / D,
        "target": h + B / sympy.diff(B, t) * (sympy.diff(h, t) - dF),
        # Eq. 8: on the true path A x_t + B h is x_r, whatever t; so its slope is zero.
        "slope_of_x_r": sympy.diff(A * x_t + B * h, t),
    }
    evaluate = sympy.lambdify((t, r, x, z, dF, F), list(expressions.values()), modules="mpmath")
    times_t, times_r = random_times(transport, 24, seed=1)
    data = torch.randn(4, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with mpmath.workdps(30):
        points = [
            [mpmath.mpf(v.item()) for v in point] for point in zip(times_t, times_r, *data, strict=True)
        ]
        rows = [[float(v) for v in evaluate(*point)] for point in points]
    expected = dict(zip(expressions, torch.tensor(rows, dtype=torch.float64).T, strict=True))

    x_, z_, dF_, F_ = data
    state = transport.interpolate(x_, z_, times_t)
    received = {
        **{k: getattr(transport, k)(times_t) for k in list(expressions)[:9]},
        **{k: getattr(transport, k)(times_t, times_r) for k in ("A", "B", "dB", "B_over_dB")},
        "x_t": state,
        "velocity": transport.velocity(x_, z_, times_t),
        "x_r": transport.step(state, times_t, times_r, F_),
        "predict_x": transport.predict_x(state, times_t, F_),
        "predict_z": transport.predict_z(state, times_t, F_),
        "target": transport.target(x_, z_, times_t, times_r, dF_),
    }
    for key, value in received.items():
        assert relative_error(value, expected[key]) < ALGEBRA_TOLERANCE, key
    assert expected["slope_of_x_r"].abs().max() < 1e-15


@pytest.mark.parametrize("name", STORED)
def test_stored_formula_values(name: str) -> None:
    assert len(STORED) == 7  # the six rows of Table 1, EDM with two widths of the data
    transport = TRANSPORTS[name]
    t, r = GOLDEN[f"{name}/t"], GOLDEN[f"{name}/r"]
    x, z, dF, F = (GOLDEN[f"in/{k}"] for k in ("x", "z", "dF", "F"))
    assert t.dtype == torch.float64 and t[0] == r[0] and (r[1:] < t[1:]).all()
    one = ("alpha", "sigma", "alpha_hat", "sigma_hat", "d_alpha", "d_sigma", "d_alpha_hat", "d_sigma_hat")
    received = {k: getattr(transport, k)(t) for k in one}
    received |= {k: getattr(transport, k)(t, r) for k in ("A", "B", "dB", "B_over_dB")}
    received["x_t"] = transport.interpolate(x, z, t)
    received["target"] = transport.target(x, z, t, r, dF)
    received["x_r"] = transport.step(received["x_t"], t, r, F)
    for key, value in received.items():
        expected = GOLDEN[f"{name}/eq/{key}"]
        # 1e-12 of the largest value: the tolerance that the stored values were published with.
        assert (value - expected).abs().max() <= 1e-12 * expected.abs().max(), key


@pytest.mark.parametrize("name", ["ot_fm", "trigflow", "edm_sd1", "edm_sd0p5", "vp", "ve"])
def test_stored_conditioning_times(name: str) -> None:
    transport = TRANSPORTS[name]
    for key in ("t", "r"):
        expected = GOLDEN[f"{name}/ref/c_{key}"]
        torch.testing.assert_close(
            transport.c_noise(GOLDEN[f"{name}/{key}"]), expected, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("name", ROWS)
def test_r_equal_t_gives_the_diffusion_target_and_stays_in_place(name: str) -> None:
    transport = TRANSPORTS[name]
    t, _ = random_times(transport, 50, seed=3)
    x, z, dF = torch.randn(3, 50, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.equal(transport.B_over_dB(t, t), torch.zeros_like(t))
    assert torch.equal(transport.target(x, z, t, t, 1e6 * dF), transport.diffusion_target(x, z, t))
    state = transport.interpolate(x, z, t)
    # A = 1 and B = 0 up to the rounding of products of square roots (EDM).
    torch.testing.assert_close(transport.step(state, t, t, dF), state, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ROWS)
def test_the_diffusion_target_steps_exactly_along_the_path(name: str) -> None:
    transport = TRANSPORTS[name]
    t, r = random_times(transport, 200, seed=5)
    x, z = torch.randn(2, 200, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    state, h = transport.interpolate(x, z, t), transport.diffusion_target(x, z, t)
    # Cancellation in A x_t + B h: bounded by the size of the two products.
    scale = (transport.A(t, r) * state).abs() + (transport.B(t, r) * h).abs() + 1
    error = (transport.step(state, t, r, h) - transport.interpolate(x, z, r)).abs() / scale
    assert error.max() < 1e-14
    for predicted, truth, size in (
        (transport.predict_x(state, t, h), x, transport.sigma(t) * h / transport.D(t)),
        (transport.predict_z(state, t, h), z, transport.alpha(t) * h / transport.D(t)),
    ):
        assert ((predicted - truth).abs() / (size.abs() + 1)).max() < 1e-14


@pytest.mark.parametrize("name", ROWS)
def test_short_intervals_keep_their_digits_in_float32(name: str) -> None:
    """B / B' from the quotient of Eq. 6 would lose all digits here; the closed form keeps float32's."""
    transport = TRANSPORTS[name]
    t, _ = random_times(transport, 40, seed=7)
    t = t.float()
    r = torch.maximum(torch.nextafter(t, torch.zeros(())), torch.tensor(transport.T_min))
    exact = transport.B_over_dB(t.double(), r.double())
    moving = exact > 0
    assert moving.sum() > 30
    error = (transport.B_over_dB(t, r).double() - exact).abs()[moving] / exact[moving]
    # A dozen roundings of 6e-8 each (VP); VP's exponent is up to 10, which multiplies its own rounding.
    assert error.max() < 5e-6


@pytest.mark.parametrize("name", ROWS)
def test_a_row_without_closed_forms_gets_the_same_coefficients(name: str) -> None:
    """What `Transport` derives from the path alone, for a row of one's own, beside what each row states."""
    transport = TRANSPORTS[name]
    t, r = random_times(transport, 400, seed=11)
    for coefficient in ("A", "B", "dB", "B_over_dB"):
        derived = getattr(Transport, coefficient)(transport, t, r)
        # The difference in B cancels for r near t: 4e-13 at the nearest of these pairs.
        assert relative_error(derived, getattr(transport, coefficient)(t, r)) < 1e-11, coefficient
    assert torch.equal(Transport.B_over_dB(transport, t, t), torch.zeros_like(t))
    # Times one float32 apart: the difference is taken in float64, of which 1e-16 / 6e-8 is left.
    t = t.float()
    r = torch.maximum(torch.nextafter(t, torch.zeros(())), torch.tensor(transport.T_min))
    exact = transport.B_over_dB(t.double(), r.double())
    moving = exact > 0
    assert moving.sum() > 300
    derived = Transport.B_over_dB(transport, t, r)
    assert derived.dtype == torch.float32
    assert relative_error((derived.double() / exact)[moving], torch.ones_like(exact)[moving]) < 1e-7


@pytest.mark.parametrize("name", ROWS)
def test_coefficients_are_finite_over_the_declared_domain(name: str) -> None:
    transport = TRANSPORTS[name]
    ends = torch.tensor([transport.T_min, transport.T_max], dtype=torch.float32)
    t, r = ends[[0, 1, 1]], ends[[0, 0, 1]]
    transport.check_times(t, r)
    for value in (transport.A(t, r), transport.B(t, r), transport.dB(t, r), transport.B_over_dB(t, r)):
        assert value.isfinite().all()
    for value in (transport.d_alpha(t), transport.d_sigma(t), transport.c_noise(t), transport.sigma(t)):
        assert value.isfinite().all()


@pytest.mark.parametrize("name", ROWS)
def test_slope_of_the_conditioning_time(name: str) -> None:
    transport = TRANSPORTS[name]
    t, _ = random_times(transport, 9, seed=3)
    t.requires_grad_()
    (slope,) = torch.autograd.grad(transport.c_noise(t).sum(), t)
    torch.testing.assert_close(transport.d_c_noise(t), slope, rtol=1e-14, atol=0)
    assert transport.d_c_noise(t.float()).dtype == torch.float32


@pytest.mark.parametrize("name", ROWS)
def test_times_outside_the_domain_are_refused_by_name(name: str) -> None:
    transport = TRANSPORTS[name]
    low, high = transport.T_min, transport.T_max
    middle = torch.tensor([0.5 * (low + high)] * 2)
    for t, r in (
        (middle, torch.tensor([low, low - 0.1])),
        (torch.tensor([high, high * 1.01]), middle),
        (middle, middle + 0.01),
        (torch.tensor([high, math.nan]), middle),
    ):
        with pytest.raises(
            TimeDomainError, match=rf"transport {transport.name}: expected .* received t = .*entry"
        ):
            transport.check_times(t, r)
    transport.check_times(torch.tensor([high]), torch.tensor([low]))


def test_the_domain_ends_are_compared_in_the_dtype_of_the_times() -> None:
    # float32(0.01) = 0.0099999998 lies below the float64 number 0.01.
    EDM().check_times(torch.tensor([0.5]), torch.tensor([0.01]))
    EDM().check_times(torch.tensor([0.5]).double(), torch.tensor([0.01], dtype=torch.float64))


@pytest.mark.parametrize(
    ("transport", "normal", "uniform", "expected"),
    [
        (OTFM(p_mean=-0.4, p_std=1.5), 0.7, 0.0, 1 / (1 + math.exp(-(1.5 * 0.7 - 0.4)))),
        (TiMTransport(p_mean=0.2, p_std=1.6), -1.1, 0.0, 1 / (1 + math.exp(1.6 * 1.1 - 0.2))),
        (TrigFlow(), 0.3, 0.0, math.atan(math.exp(1.6 * 0.3 - 1))),
        (EDM(), -0.5, 0.0, math.exp(-0.6 - 1.2)),
        (VP(), 0.0, 0.25, 1 + 0.25 * (1e-5 - 1)),
        (VE(), 0.0, 0.25, 0.02 * 5000**0.25),
    ],
    ids=lambda v: v.name if isinstance(v, Transport) else None,
)
def test_draws_follow_the_row(transport: Transport, normal: float, uniform: float, expected: float) -> None:
    drawn = transport.draw_t(*torch.tensor([[normal], [uniform]], dtype=torch.float64))
    assert drawn.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", ROWS)
def test_draws_are_clamped_to_the_domain(name: str) -> None:
    transport = TRANSPORTS[name]
    normal = torch.tensor([-60.0, 0.0, 60.0], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    drawn = transport.draw_t(normal, uniform)
    assert drawn.min() >= transport.T_min and drawn.max() <= transport.T_max
    transport.check_times(drawn.float(), drawn.float())


@pytest.mark.parametrize("name", ["ot_fm", "tim"])
def test_stochastic_step_keeps_the_marginals_to_first_order(name: str) -> None:
    """On Gaussian data the step is linear in (x_t, noise); its variance matches the marginal up to O(h^2)."""
    transport = TRANSPORTS[name]
    exact = GaussianNetwork(transport, mean=0.0, deviation=0.6)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t_value in (0.25, 0.5, 0.85):
        t = torch.tensor(t_value, dtype=torch.float64)

        def variance_error(h: float, share: float, t: torch.Tensor = t) -> float:
            r = t - h
            gain = transport.stochastic_step(one, t, r, exact.F(one, t, r), zero, share)
            noise = transport.stochastic_step(zero, t, r, zero, one, share)
            variance = gain**2 * exact.spread(t) ** 2 + noise**2
            return (variance - exact.spread(r) ** 2).abs().item()

        assert variance_error(0.1, 0.0) < 1e-15
        errors = [variance_error(h, 0.7) for h in (4e-3, 2e-3, 1e-3)]
        slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
        # Second order in h; a wrong noise or drift would leave slope 1.
        assert min(slopes) > 1.95


def test_stochastic_step_of_flow_matching_is_the_published_one() -> None:
    transport = OTFM()
    x_t, F, noise = torch.randn(3, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    t, r, share = torch.tensor(0.7).double(), torch.tensor(0.4).double(), 0.2
    dt = t - r
    expected = x_t - dt * F - share * (x_t + (1 - t) * F) * dt + torch.sqrt(2 * share * t * dt) * noise
    torch.testing.assert_close(
        transport.stochastic_step(x_t, t, r, F, noise, share), expected, rtol=1e-14, atol=1e-14
    )


def test_stochastic_step_of_tim_is_the_published_one() -> None:
    transport = TiMTransport()
    x_t, F, noise = torch.randn(3, 6, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    t, r, share = torch.tensor(0.7).double(), torch.tensor(0.4).double(), 0.2
    angle, dt = 0.5 * math.pi * t, t - r
    z_hat = (x_t + torch.cos(angle) * F) / (torch.cos(angle) + torch.sin(angle))
    expected = transport.step(x_t, t, r, F) - share * 0.5 * math.pi * z_hat * dt
    expected = expected + torch.sqrt(share * math.pi * torch.sin(angle) * dt) * noise
    received = transport.stochastic_step(x_t, t, r, F, noise, share)
    torch.testing.assert_close(received, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["trigflow", "edm_sd1", "vp", "ve"])
def test_stochastic_step_names_the_transport_that_has_none(name: str) -> None:
    transport = TRANSPORTS[name]
    value = torch.full((2,), 0.5)
    with pytest.raises(RequestError, match=rf"transport {transport.name} has no stochastic step"):
        transport.stochastic_step(value, value, value / 2, value, value, 0.2)


def test_edm_is_trigflow_on_rescaled_data() -> None:
    d = 0.37
    edm, trig = EDM(sigma_data=d), TrigFlow()
    t, r = random_times(edm, 30, seed=9)
    x_t, F = torch.randn(2, 30, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    angle_t, angle_r = torch.atan(t / d), torch.atan(r / d)
    # x / sigma_data has unit variance, as TrigFlow's data; both paths then have the same states.
    expected = trig.step(x_t, angle_t, angle_r, -F)
    torch.testing.assert_close(edm.step(x_t, t, r, F), expected, rtol=1e-12, atol=1e-12)


def test_build_transport_takes_the_rows_defaults() -> None:
    defaults = {"ot_fm": (0, 1, 1), "trigflow": (-1, 1.6, 0.5), "edm": (-1.2, 1.2, 0.5), "tim": (0, 1, 1)}
    for kind, expected in defaults.items():
        transport = build_transport(TransportConfig(kind=kind))  # type: ignore[arg-type]
        assert isinstance(transport, OTFM | TrigFlow | EDM | TiMTransport) and transport.name == kind
        assert (transport.p_mean, transport.p_std, transport.sigma_data) == expected


def test_build_transport_passes_constants_on() -> None:
    vp = build_transport(TransportConfig(kind="vp", beta_min=0.2, beta_d=10.0, sigma_data=0.7))
    assert isinstance(vp, VP) and (vp.beta_min, vp.beta_d, vp.sigma_data) == (0.2, 10.0, 0.7)
    ve = build_transport(TransportConfig(kind="ve", sigma_min=0.1, sigma_max=50.0))
    assert (ve.T_min, ve.T_max, ve.sigma_data) == (0.1, 50.0, 1.0)
    edm = build_transport(TransportConfig(kind="edm", sigma_data=0.8, p_mean=-0.3, p_std=0.9))
    assert isinstance(edm, EDM) and (edm.sigma_data, edm.p_mean, edm.p_std) == (0.8, -0.3, 0.9)
    with pytest.raises(ConfigError, match="p_mean/p_std"):
        TransportConfig(kind="ve", p_mean=0.0)
