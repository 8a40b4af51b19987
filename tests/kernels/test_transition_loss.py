"""Target and loss in one pass against the float64 twin; the twin against the objective's own functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from tests.kernels.compare import assert_kernel_equals_twin, normal, outputs_and_gradients
from tim_ds.objective import loss as objective_loss
from tim_ds.objective.config import TransportConfig
from tim_ds.objective.transport import build_transport
from tim_ds.packed import Segments
from tim_kernels import ChunkPlan, TargetCoefficients, path_taken, transition_loss, use_path
from tim_kernels.saved import saved_bytes
from tim_kernels.transition_loss import reference

# float32 sums over a chunk's cells and then over its chunks: 1e-7 to 3e-7 seen.
FLOAT32 = 2e-6


class _Op:
    """The op as a function of F, everything else bound."""

    def __init__(
        self, lengths, channels, latent_channels, *, derivative=True, guided=False, directional=True, **plan
    ):
        rows, segments = sum(lengths), len(lengths)
        self.fields = [normal(rows, channels, seed=s) for s in (1, 2)]
        self.dF_dt = normal(rows, channels, seed=3) if derivative else None
        self.guided = normal(rows, channels, seed=4) if guided else None
        self.coefficients = [normal(segments, seed=5 + i) for i in range(5)]
        self.plan = ChunkPlan.from_lengths(lengths, **plan)
        self.options = {"latent_channels": latent_channels, "directional": directional}

    def __call__(self, F):
        def like(x: Tensor) -> Tensor:
            return x.to(F.device, torch.promote_types(F.dtype, torch.float32))

        x, z = map(like, self.fields)
        return transition_loss(
            F,
            x,
            z,
            None if self.dF_dt is None else like(self.dF_dt),
            TargetCoefficients(*map(like, self.coefficients)),
            self.plan.to(F.device),
            diffusion_target_TC=None if self.guided is None else like(self.guided),
            **self.options,
        )


SIZES = {
    "one-token": ((1,), 8, 8),
    "63-tokens": ((63,), 32, 32),
    "123-tokens": ((123,), 8, 4),
    "one-token-and-empty": ((0, 1, 5, 0, 0, 1, 33, 0), 16, 4),
    "three-channels": ((5, 2), 12, 3),
    "72-channels": ((5, 2), 72, 72),
    "1152-channels": ((2, 1), 1152, 1152),
    "one-channel": ((4,), 2, 1),
}


@pytest.mark.parametrize(
    "form", [{}, {"guided": True}, {"derivative": False}], ids=["plain", "guided", "no-dF"]
)
@pytest.mark.parametrize(("lengths", "channels", "cell"), SIZES.values(), ids=SIZES.keys())
def test_both_terms_and_the_gradient_of_F(lengths, channels, cell, form, device):
    inputs = {"F": normal(sum(lengths), channels, seed=0)}
    assert_kernel_equals_twin(_Op(lengths, channels, cell, **form), inputs, device, FLOAT32)
    assert path_taken("transition_loss") == "triton"


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["denoising", "directional"])
def test_each_term_alone(used, device):
    op = _Op((5, 3), 16, 4)
    assert_kernel_equals_twin(op, {"F": normal(8, 16, seed=0)}, device, FLOAT32, used)


def test_without_the_directional_term(device):
    op = _Op((5, 3), 16, 4, directional=False)
    results = assert_kernel_equals_twin(op, {"F": normal(8, 16, seed=0)}, device, FLOAT32, (True, False))
    assert torch.equal(results["out1"].cpu(), torch.zeros(2))


def test_cells_at_and_below_the_floor_of_the_cosine(device):
    """Zero, far below, just below and just above the floor, in F and in the target."""
    sizes = (0.0, 1e-6, 3e-3, 0.9e-2, 1.1e-2, 1.0)
    direction = normal(len(sizes) ** 2, 8, seed=0)
    direction = direction / direction.norm(dim=1, keepdim=True)
    lengths = (len(sizes) ** 2,)
    op = _Op(lengths, 8, 8, derivative=False)
    op.coefficients = [torch.tensor([c]) for c in (1.0, 0.0, 0.0, 0.0, 0.0)]
    op.fields[0] = (
        torch.tensor(sizes).repeat(len(sizes))[:, None]
        * normal(*direction.shape, seed=1).sign()
        / math.sqrt(8)
    )
    F = torch.tensor(sizes).repeat_interleave(len(sizes))[:, None] * direction
    assert_kernel_equals_twin(op, {"F": F}, device, 1e-5)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 64])
def test_any_cut_into_chunks_gives_the_same_terms(rows_per_chunk, device):
    op = _Op((7, 1, 0, 70), 32, 32, rows_per_chunk=rows_per_chunk)
    assert_kernel_equals_twin(op, {"F": normal(78, 32, seed=0)}, device, FLOAT32)


def test_a_tile_smaller_than_the_chunk(device):
    """More cells than one tile holds: 32 tokens of 16 cells of 4 channels."""
    op = _Op((40,), 64, 4, rows_per_chunk=32)
    assert_kernel_equals_twin(op, {"F": normal(40, 64, seed=0)}, device, FLOAT32)


def test_inputs_that_are_not_contiguous(device):
    op = _Op((5, 3), 16, 4)
    op.fields = [x.t().contiguous().t() for x in op.fields]
    assert_kernel_equals_twin(op, {"F": normal(16, 8, seed=0).t()}, device, FLOAT32)


def test_repeated_gradients_of_the_terms(device):
    """The gradient of a sum has stride 0."""
    op, F = _Op((5, 3), 16, 4), normal(8, 16, seed=0)

    def gradient(path, dtype, where):
        leaf = F.detach().to(where, dtype).requires_grad_()
        with use_path(path):
            denoising_S, directional_S = op(leaf)
        return torch.autograd.grad(denoising_S.sum() + 2 * directional_S.sum(), leaf)[0]

    ours, truth = gradient("triton", torch.float32, device), gradient("torch", torch.float64, "cpu")
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-5, atol=FLOAT32)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_network_output_in_16_bits(stored, device):
    inputs = {"F": normal(8, 16, seed=0, dtype=stored)}
    # The terms are float32 sums of exact inputs; the gradient is rounded to 16 bits.
    results = assert_kernel_equals_twin(_Op((5, 3), 16, 4), inputs, device, 2**-7)
    assert results["out0"].dtype == torch.float32 and results["d_F"].dtype == stored


def test_terms_and_gradient_are_bitwise_repeatable(device):
    op, inputs = _Op((17, 1, 5), 32, 32, rows_per_chunk=4), {"F": normal(23, 32, seed=0).to(device)}
    with use_path("triton"):
        first, second = (outputs_and_gradients(op, inputs, (True, True)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_no_image_sees_another(device):
    op, F = _Op((3, 4, 2), 16, 4, rows_per_chunk=2), normal(9, 16, seed=0).to(device)
    spoiled = F.clone()
    spoiled[3:7] = float("nan")
    with use_path("triton"):
        clean, dirty = (outputs_and_gradients(op, {"F": x}, (True, True)) for x in (F, spoiled))
    for name, y in clean.items():
        rows = [0, 2] if y.shape[0] == 3 else [0, 1, 2, 7, 8]
        assert torch.equal(y[rows], dirty[name][rows]), name
        assert dirty[name].isnan().any(), name


TRANSPORTS = ("ot_fm", "trigflow", "edm", "vp", "ve", "tim")


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_the_twin_is_the_objectives_target_and_loss(name, guided):
    """Target of the transport, per-image mean square and per-cell cosine as the objective composes them."""
    transport = build_transport(TransportConfig(kind=name))
    segments = Segments.from_lengths((5, 1, 3))
    F, x, z, dF_dt, base = (normal(9, 16, seed=s, dtype=torch.float64) for s in range(5))
    low, high = transport.T_min, min(transport.T_max, 2.0)
    t_S = torch.tensor([0.9, 0.5, 0.7], dtype=torch.float64) * (high - low) + low
    r_S = torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64) * (high - low) + low
    t_T1, r_T1 = segments.expand(t_S)[:, None], segments.expand(r_S)[:, None]
    target = transport.target(x, z, t_T1, r_T1, dF_dt, diffusion_target=base if guided else None)
    denoising = segments.mean((F - target).square().mean(-1))
    cosine = torch.nn.functional.cosine_similarity(
        F.reshape(9, 4, 4), target.reshape(9, 4, 4), dim=-1, eps=objective_loss.COSINE_FLOOR
    )
    directional = segments.mean((1 - cosine).mean(-1))

    coefficients = TargetCoefficients(*transport.target_coefficients(t_S, r_S))
    with use_path("torch"):
        terms = transition_loss(
            F,
            x,
            z,
            dF_dt,
            coefficients,
            ChunkPlan.from_lengths(segments.lengths),
            latent_channels=4,
            diffusion_target_TC=base if guided else None,
        )
    torch.testing.assert_close(terms, (denoising, directional), rtol=1e-12, atol=1e-13)


def test_the_floor_of_the_cosine_is_the_objectives():
    assert reference.COSINE_FLOOR == objective_loss.COSINE_FLOOR


def test_the_twins_gradient_is_that_of_finite_differences():
    F = normal(4, 8, seed=0, dtype=torch.float64).requires_grad_()
    with use_path("torch"):
        assert torch.autograd.gradcheck(_Op((3, 1), 8, 4), (F,))


def test_no_gradient_reaches_the_target(device):
    F, x, z, dF_dt = (normal(4, 8, seed=s).to(device).requires_grad_() for s in range(4))
    coefficients = TargetCoefficients(*(torch.ones(1, device=device, requires_grad=True) for _ in range(5)))
    plan = ChunkPlan.from_lengths((4,), device=device)
    for path in ("torch", "triton"):
        with use_path(path):
            terms = transition_loss(F, x, z, dF_dt, coefficients, plan, latent_channels=4)
        gradients = torch.autograd.grad(
            terms[0].sum() + terms[1].sum(), [F, x, z, dF_dt, *coefficients], allow_unused=True
        )
        assert gradients[0].abs().sum() > 0
        assert gradients[1:] == (None,) * 8


def test_only_the_inputs_are_saved(device):
    """F, x, z and dF/dt: 16 bytes a channel in float32, and neither the target nor the error."""
    op, F = _Op((30, 34), 32, 32), normal(64, 32, seed=0).to(device).requires_grad_()
    with use_path("triton"):
        total = saved_bytes(lambda: op(F))
    # Besides: five coefficients and the number of tokens of each segment.
    assert total - 2 * 6 * 4 == 16 * 64 * 32


def test_forward_mode_goes_through_the_twin(device):
    op, F, tangent = _Op((3, 1), 8, 4), normal(4, 8, seed=0).to(device), normal(4, 8, seed=9).to(device)
    _, derivative = jvp(op, (F,), (tangent,))  # type: ignore[misc]
    assert path_taken("transition_loss") == "torch"
    leaf = F.clone().requires_grad_()
    with use_path("torch"):
        gradients = [torch.autograd.grad(term.sum(), leaf)[0] for term in op(leaf)]
    expected = tuple((g * tangent).sum() for g in gradients)
    torch.testing.assert_close(tuple(d.sum() for d in derivative), expected, rtol=1e-4, atol=1e-5)


def test_arguments_that_do_not_fit_are_named():
    op, F = _Op((5, 3), 16, 4), normal(8, 16, seed=0)
    with pytest.raises(ValueError, match="transition_loss: plan: made for 8 rows, received 7"):
        op(F[:7])
    with pytest.raises(ValueError, match=r"transition_loss: x: expected shape \[8, 8\], received \[8, 16\]"):
        op(F[:, :8])
    op.options["latent_channels"] = 5
    with pytest.raises(ValueError, match="expected a divisor of the 16 channels of a token, received 5"):
        op(F)
    op.options["latent_channels"], op.coefficients[2] = 4, torch.ones(3)
    with pytest.raises(ValueError, match=r"b_over_db: expected shape \[2\], received \[3\]"):
        op(F)
