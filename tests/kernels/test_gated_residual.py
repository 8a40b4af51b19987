"""The gated residual against its float64 twin, and beside the norm that takes it along."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.compare import assert_kernel_equals_twin, normal, outputs_and_gradients
from tim_kernels import ChunkPlan, gated_residual, modulated_layer_norm, path_taken, use_path
from tim_kernels.saved import saved_bytes

# float32: two roundings a value, sums of up to 123 terms for the gate.
FLOAT32 = 1e-6


def _inputs(lengths: tuple[int, ...], width: int) -> dict[str, Tensor]:
    rows = sum(lengths)
    return {
        "x": normal(rows, width, seed=0),
        "branch": normal(rows, width, seed=1),
        "gate": normal(len(lengths), width, seed=2),
    }


class _Op:
    def __init__(self, lengths: tuple[int, ...], rows_per_chunk: int | None = None) -> None:
        self.plan = ChunkPlan.from_lengths(lengths, rows_per_chunk=rows_per_chunk)

    def __call__(self, x, branch, gate):
        return (gated_residual(x, branch, gate, self.plan.to(x.device)),)


SIZES = {
    "one-row": ((1,), 8),
    "63-rows": ((63,), 72),
    "123-rows": ((123,), 8),
    "one-token-and-empty": ((0, 1, 5, 0, 0, 1, 3, 0), 72),
    "width-1152": ((3, 2), 1152),
    "masked-tail": ((2, 1), 1176),
    "no-rows": ((0,), 8),
}


@pytest.mark.parametrize(("lengths", "width"), SIZES.values(), ids=SIZES.keys())
def test_forward_and_every_gradient(lengths, width, device):
    assert_kernel_equals_twin(_Op(lengths), _inputs(lengths, width), device, FLOAT32)
    assert path_taken("gated_residual") == "triton"


def test_inputs_that_are_not_contiguous(device):
    inputs = {k: torch.cat([x, x], 1)[:, : x.shape[1]] for k, x in _inputs((5, 3), 24).items()}
    inputs["branch"] = inputs["branch"].t().contiguous().t()
    assert not any(x.is_contiguous() for x in inputs.values())
    assert_kernel_equals_twin(_Op((5, 3)), inputs, device, FLOAT32)


def test_gradients_are_bitwise_repeatable(device):
    inputs = {k: x.to(device) for k, x in _inputs((17, 1, 5), 72).items()}
    with use_path("triton"):
        first, second = (
            outputs_and_gradients(_Op((17, 1, 5), rows_per_chunk=4), inputs, (True,)) for _ in range(2)
        )
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_it_is_the_first_half_of_the_modulated_norm(device):
    """Bit for bit, so that a network may be cut anywhere."""
    lengths, width = (5, 3), 72
    plan = ChunkPlan.from_lengths(lengths, device=device)
    x, branch, gate = (y.to(device) for y in _inputs(lengths, width).values())
    shift, scale = (normal(2, width, seed=s).to(device) for s in (3, 4))
    with use_path("triton"):
        fused = modulated_layer_norm(x, branch, gate, shift, scale, plan)
        x_new = gated_residual(x, branch, gate, plan)
        apart = modulated_layer_norm(x_new, None, None, shift, scale, plan)
    assert torch.equal(fused[0], x_new) and torch.equal(fused[1], apart[1])


def test_the_branch_alone_is_saved(device):
    """2 bytes a hidden unit and token, beside the gate."""
    x, branch, gate = (y.to(device) for y in _inputs((30, 34), 128).values())
    leaves = [x.requires_grad_(), branch.to(torch.bfloat16).requires_grad_(), gate.requires_grad_()]
    op = _Op((30, 34))
    with use_path("triton"):
        assert saved_bytes(lambda: op(*leaves)) == 2 * 64 * 128 + 4 * 2 * 128


def test_the_twins_gradients_are_those_of_finite_differences():
    inputs = [x.double().requires_grad_() for x in _inputs((2, 1), 6).values()]
    with use_path("torch"):
        assert torch.autograd.gradcheck(_Op((2, 1)), inputs)


def test_arguments_that_do_not_fit_are_named():
    x, branch, gate = _inputs((5, 3), 24).values()
    plan = ChunkPlan.from_lengths((5, 3))
    with pytest.raises(
        ValueError, match=r"gated_residual: branch: expected shape \[8, 24\], received \[8, 12\]"
    ):
        gated_residual(x, branch[:, :12], gate, plan)
    with pytest.raises(
        ValueError, match=r"gated_residual: gate: expected shape \[2, 24\], received \[1, 24\]"
    ):
        gated_residual(x, branch, gate[:1], plan)
