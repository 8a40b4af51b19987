"""The fused norm against its float64 twin, and the twin against its formula."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from tests.kernels.compare import assert_kernel_equals_twin, far_apart, normal, outputs_and_gradients
from tim_kernels import ChunkPlan, modulated_layer_norm, path_taken, use_path
from tim_kernels.saved import saved_bytes

# float32 sums of up to 1152 terms: 1e-7 to 2e-7 seen at every size.
FLOAT32 = 1e-6
# One rounding of a float16 output; the interpreter's bfloat16 truncates, which doubles it.
STORAGE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}


def _inputs(lengths: tuple[int, ...], width: int, *, branch: bool = True) -> dict[str, Tensor | None]:
    rows, segments = sum(lengths), len(lengths)
    return {
        "x": normal(rows, width, seed=0),
        "branch": normal(rows, width, seed=1) if branch else None,
        "gate": normal(segments, width, seed=2) if branch else None,
        "shift": normal(segments, width, seed=3),
        "scale": normal(segments, width, seed=4),
    }


class _Op:
    """The op with its plan bound; on float64 inputs h is float64."""

    def __init__(self, lengths: tuple[int, ...], h_dtype: torch.dtype | None = None, **plan: Any) -> None:
        self.plan = ChunkPlan.from_lengths(lengths, **plan)
        self.h_dtype = h_dtype

    def __call__(self, x, branch, gate, shift, scale):
        h_dtype = None if x.dtype == torch.float64 else self.h_dtype
        return modulated_layer_norm(x, branch, gate, shift, scale, self.plan.to(x.device), h_dtype=h_dtype)


SIZES = {
    "one-row": ((1,), 8),
    "63-rows": ((63,), 72),
    "123-rows": ((123,), 8),
    "one-token-and-empty": ((0, 1, 5, 0, 0, 1, 3, 0), 72),
    "width-1152": ((3, 2), 1152),
    "masked-tail": ((2, 1), 1176),
    "too-wide-for-stages": ((2,), 2176),
    "odd-width": ((3, 2), 37),
    "single-column": ((3,), 1),
}


@pytest.mark.parametrize("branch", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize(("lengths", "width"), SIZES.values(), ids=SIZES.keys())
def test_forward_and_every_gradient(lengths, width, branch, device):
    # One column does not deviate from its mean. Where a multiply-add leaves the rounding of a product, it is
    # divided by sqrt(eps).
    tolerance = FLOAT32 if width > 1 else 1e3 * FLOAT32
    assert_kernel_equals_twin(_Op(lengths), _inputs(lengths, width, branch=branch), device, tolerance)
    assert path_taken("modulated_layer_norm") == "triton"


@pytest.mark.parametrize("branch", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["only-x-new", "only-h"])
def test_gradients_when_one_output_is_unused(used, branch, device):
    lengths = (4, 2)
    assert_kernel_equals_twin(_Op(lengths), _inputs(lengths, 24, branch=branch), device, FLOAT32, used)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 32])
def test_any_cut_into_chunks_gives_the_same_sums(rows_per_chunk, device):
    lengths = (7, 1, 0, 33)
    op = _Op(lengths, rows_per_chunk=rows_per_chunk)
    assert_kernel_equals_twin(op, _inputs(lengths, 16), device, FLOAT32)


def test_a_segment_of_more_chunks_than_one_summation_step(device):
    lengths = (2, 35)
    op = _Op(lengths, rows_per_chunk=1)
    assert_kernel_equals_twin(op, _inputs(lengths, 8), device, FLOAT32)


def test_a_large_common_offset_does_not_spoil_the_variance(device):
    lengths = (3,)
    inputs = _inputs(lengths, 64)
    assert inputs["x"] is not None
    inputs["x"] = inputs["x"] + 1000.0
    # x - mean carries x's own rounding, 1000 * 2^-24 = 6e-5, once for x' and once for the mean.
    assert_kernel_equals_twin(_Op(lengths), inputs, device, 2e-4)


def test_views_of_one_modulation_matrix(device):
    """gate, shift and scale as chunks of the generator's [S, 9 D], without a copy."""
    lengths, width = (5, 3), 24
    matrix = normal(2, 9 * width, seed=7)
    chunks = matrix.chunk(9, dim=1)
    inputs = {**_inputs(lengths, width), "gate": chunks[2], "shift": chunks[3], "scale": chunks[4]}
    assert chunks[3].stride(0) == 9 * width
    assert_kernel_equals_twin(_Op(lengths), inputs, device, FLOAT32)


LAYOUTS = {
    "rows-of-a-wider-matrix": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every-second-row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_inputs_that_are_not_contiguous(layout, device):
    lengths = (5, 3)
    dense = _inputs(lengths, 24)
    inputs = {k: None if x is None else layout(x) for k, x in dense.items()}
    assert not any(x.is_contiguous() for x in inputs.values() if x is not None)
    assert_kernel_equals_twin(_Op(lengths), inputs, device, FLOAT32)


def test_gradients_that_are_not_contiguous(device):
    lengths, width = (5, 3), 24
    op, inputs = _Op(lengths), _inputs(lengths, width)
    row, column = normal(1, width, seed=8), normal(8, 1, seed=9)

    def expanded(dtype, where):
        return [g.to(where, dtype).expand(8, width) for g in (row, column)]

    def gradients(path, dtype, where):
        leaves = [x.to(where, dtype).requires_grad_() for x in inputs.values() if x is not None]
        with use_path(path):
            outputs = op(**dict(zip(inputs, leaves, strict=True)))
            return torch.autograd.grad(outputs, leaves, expanded(dtype, where))

    for ours, truth in zip(
        gradients("triton", torch.float32, device), gradients("torch", torch.float64, "cpu"), strict=True
    ):
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=FLOAT32, atol=1e-5)


@pytest.mark.parametrize("stored", STORAGE, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("residual", ["wide", "narrow"])
def test_stored_precisions(stored, residual, device):
    """A 16-bit branch and h beside a float32 or a 16-bit residual stream."""
    lengths, width = (5, 3), 72
    inputs = _inputs(lengths, width)
    assert inputs["x"] is not None and inputs["branch"] is not None
    x_dtype = torch.float32 if residual == "wide" else stored
    inputs["x"], inputs["branch"] = inputs["x"].to(x_dtype), inputs["branch"].to(stored)
    # The twin in float64 does not round x': the narrow stream adds that rounding to what follows.
    tolerance = STORAGE[stored] * (1 if residual == "wide" else 3)
    results = assert_kernel_equals_twin(_Op(lengths, stored), inputs, device, tolerance)
    assert results["out0"].dtype == results["d_x"].dtype == x_dtype
    assert results["out1"].dtype == results["d_branch"].dtype == stored
    assert results["d_gate"].dtype == results["d_shift"].dtype == results["d_scale"].dtype == torch.float32


def test_gradients_are_bitwise_repeatable(device):
    lengths = (17, 1, 5)
    inputs = {k: None if x is None else x.to(device) for k, x in _inputs(lengths, 72).items()}
    with use_path("triton"):
        first, second = (
            outputs_and_gradients(_Op(lengths, rows_per_chunk=4), inputs, (True, True)) for _ in range(2)
        )
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_no_image_sees_another(device):
    """NaN in one segment leaves outputs and gradients of the others bit-equal."""
    lengths, width = (3, 4, 2), 24
    inputs = {k: None if x is None else x.to(device) for k, x in _inputs(lengths, width).items()}
    spoiled = {k: None if x is None else x.clone() for k, x in inputs.items()}
    for name, x in spoiled.items():
        assert x is not None
        x[1 if name in ("gate", "shift", "scale") else slice(3, 7)] = float("nan")
    op = _Op(lengths, rows_per_chunk=2)
    with use_path("triton"):
        clean, dirty = (outputs_and_gradients(op, i, (True, True)) for i in (inputs, spoiled))
    for name, y in clean.items():
        rows = [0, 2] if y.shape[0] == 3 else [0, 1, 2, 7, 8]
        assert torch.equal(y[rows], dirty[name][rows]), name
        # The gradient of shift is the sum of the cotangents alone.
        assert dirty[name].isnan().any() or name == "d_shift"


def test_rows_beyond_two_to_the_31_elements(device, tmp_path: Path):
    width, plan = 16, ChunkPlan.from_lengths((3,), device=device)
    dense = normal(3, width, seed=0, dtype=torch.bfloat16).to(device)
    x = far_apart(dense, tmp_path)
    modulation = [normal(1, width, seed=s).to(device) for s in (1, 2)]
    with use_path("triton"):
        far, near = (
            modulated_layer_norm(y, y, modulation[0], *modulation, plan=plan, h_dtype=torch.float32)
            for y in (x, dense)
        )
    for a, b in zip(far, near, strict=True):
        assert torch.equal(a, b)


def test_an_empty_pack(device):
    inputs = _inputs((0, 0), 24)
    results = assert_kernel_equals_twin(_Op((0, 0)), inputs, device, 0.0)
    assert results["out1"].shape == (0, 24)
    assert torch.equal(results["d_scale"].cpu(), torch.zeros(2, 24))


def test_the_twin_is_its_formula():
    lengths, width = (3, 1, 2), 10
    x, branch, gate, shift, scale = (
        torch.as_tensor(x, dtype=torch.float64) for x in _inputs(lengths, width).values() if x is not None
    )
    with use_path("torch"):
        x_new, h = modulated_layer_norm(x, branch, gate, shift, scale, ChunkPlan.from_lengths(lengths))
    for token, s in enumerate(itertools.chain.from_iterable([i] * n for i, n in enumerate(lengths))):
        row = x[token] + gate[s] * branch[token]
        normalised = (row - row.mean()) / torch.sqrt(row.var(unbiased=False) + 1e-6)
        torch.testing.assert_close(x_new[token], row, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(h[token], normalised * (1 + scale[s]) + shift[s], rtol=1e-12, atol=1e-12)


def test_the_twins_gradients_are_those_of_finite_differences():
    lengths = (2, 1)
    inputs = [x.double().requires_grad_() for x in _inputs(lengths, 6).values() if x is not None]
    with use_path("torch"):
        assert torch.autograd.gradcheck(_Op(lengths), inputs)


def test_forward_mode_goes_through_the_twin(device):
    lengths = (2, 3)
    plan = ChunkPlan.from_lengths(lengths, device=device)
    x, *others = (x.to(device) for x in _inputs(lengths, 8).values() if x is not None)
    tangent = normal(*x.shape, seed=5).to(device)

    def of_x(y):
        return modulated_layer_norm(y, *others, plan=plan)

    d_x_new, _ = jvp(of_x, (x,), (tangent,))[1]
    assert path_taken("modulated_layer_norm") == "torch"
    torch.testing.assert_close(d_x_new, tangent)
    with use_path("triton"), pytest.raises(ValueError, match="a forward-mode derivative is being taken"):
        jvp(of_x, (x,), (tangent,))


WRONG = {
    "branch without gate": ({"gate": None}, "branch and gate: expected both or neither"),
    "branch of another shape": (
        {"branch": torch.zeros(8, 12)},
        r"branch: expected shape \[8, 24\], received \[8, 12\]",
    ),
    "one gate too few": ({"gate": torch.zeros(1, 24)}, r"gate: expected shape \[2, 24\], received \[1, 24\]"),
    "integers": ({"shift": torch.zeros(2, 24, dtype=torch.int64)}, "shift: expected a floating-point tensor"),
    "rows of another pack": ({"x": torch.zeros(7, 24)}, "plan: made for 8 rows, received 7"),
    "not a matrix": ({"x": torch.zeros(8)}, r"x: expected \[tokens, width\], received \[8\]"),
    "another device": ({"scale": torch.zeros(2, 24, device="meta")}, "scale: expected on cpu as x is"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_arguments_that_do_not_fit_are_named(change, message):
    lengths = (5, 3)
    with pytest.raises(ValueError, match="modulated_layer_norm: " + message):
        _Op(lengths)(**{**_inputs(lengths, 24), **change})


@pytest.mark.parametrize(
    ("branch", "stream", "expected"),
    [(True, torch.float32, 6), (True, torch.bfloat16, 4), (False, torch.float32, 4)],
    ids=["residual-float32", "residual-bfloat16", "plain"],
)
def test_saved_for_backward(branch, stream, expected, device):
    """x' and the 16-bit branch; x, h and the normalised rows are not kept. Bytes a hidden unit and token."""
    lengths, width = (30, 34), 128
    inputs = {
        k: None if x is None else x.to(device) for k, x in _inputs(lengths, width, branch=branch).items()
    }
    inputs["x"] = normal(64, width, seed=0, dtype=stream).to(device)
    if branch:
        inputs["branch"] = normal(64, width, seed=1, dtype=torch.bfloat16).to(device)
    leaves = {k: None if x is None else x.requires_grad_() for k, x in inputs.items()}
    op = _Op(lengths, torch.bfloat16)
    with use_path("triton"):
        total = saved_bytes(lambda: op(**leaves))
    # Besides: mean and deviation of each row, gate and scale of each segment.
    per_row, per_segment = 8, (8 if branch else 4) * width
    assert total - 64 * per_row - len(lengths) * per_segment == expected * 64 * width
