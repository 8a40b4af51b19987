"""SwiGLU against its float64 twin: both forms, every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.func import jvp

from tests.kernels.compare import assert_kernel_equals_twin, far_apart, normal, outputs_and_gradients
from tim_kernels import path_taken, swiglu, swiglu_packed, use_path
from tim_kernels.saved import saved_bytes
from tim_kernels.swiglu.kernel import TILE, tile_options

# float32, element by element: a few roundings of exp and the products.
FLOAT32 = 1e-6
# One rounding of a float16 output; the interpreter's bfloat16 truncates, which doubles it.
STORAGE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}

SHAPES = {
    "one-row": (1, 8),
    "63-rows": (63, 72),
    "123-rows": (123, 8),
    "masked-columns": (3, 200),
    "several-column-blocks": (2, 1536),
    "one-column": (5, 1),
    "no-rows": (0, 16),
    "three-axes": (2, 3, 24),
    "vector": (24,),
}


def _separate(gate, up):
    return (swiglu(gate, up),)


def _packed(gate_up):
    return (swiglu_packed(gate_up),)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward_and_gradients_of_separate_halves(shape, device):
    inputs = {"gate": 3 * normal(*shape, seed=0), "up": normal(*shape, seed=1)}
    assert_kernel_equals_twin(_separate, inputs, device, FLOAT32)
    assert path_taken("swiglu") == "triton"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward_and_gradients_of_one_packed_tensor(shape, device):
    inputs = {"gate_up": 3 * normal(*shape[:-1], 2 * shape[-1], seed=0)}
    assert_kernel_equals_twin(_packed, inputs, device, FLOAT32)


def test_large_gates_neither_overflow_nor_lose_their_gradient(device):
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, -1.2784645]])
    inputs = {"gate": gate, "up": torch.ones(1, 8)}
    results = assert_kernel_equals_twin(_separate, inputs, device, FLOAT32)
    assert all(y.isfinite().all() for y in results.values())


LAYOUTS = {
    "halves-of-one-matrix": lambda g, u: torch.cat([g, u], 1).chunk(2, dim=1),
    "every-second-row": lambda g, u: (g.repeat_interleave(2, 0)[::2], u.repeat_interleave(2, 0)[::2]),
    "transposed": lambda g, u: (g.t().contiguous().t(), u),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_inputs_that_are_not_contiguous(layout, device):
    gate, up = layout(normal(5, 24, seed=0), normal(5, 24, seed=1))
    assert not gate.is_contiguous()
    assert_kernel_equals_twin(_separate, {"gate": gate, "up": up}, device, FLOAT32)


@pytest.mark.parametrize("shape", [(1, 24), (5, 1)], ids=["rows-repeat", "columns-repeat"])
def test_an_expanded_gradient(shape, device):
    inputs = [normal(5, 24, seed=s) for s in (0, 1)]
    gradient = normal(*shape, seed=2)

    def gradients(path, dtype, where):
        leaves = [x.to(where, dtype).requires_grad_() for x in inputs]
        with use_path(path):
            return torch.autograd.grad(swiglu(*leaves), leaves, gradient.to(where, dtype).expand(5, 24))

    for ours, truth in zip(
        gradients("triton", torch.float32, device), gradients("torch", torch.float64, "cpu"), strict=True
    ):
        torch.testing.assert_close(ours.cpu().double(), truth, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("stored", STORAGE, ids=["float16", "bfloat16"])
def test_stored_precisions(stored, device):
    inputs = {"gate_up": normal(5, 48, seed=0, dtype=stored)}
    results = assert_kernel_equals_twin(_packed, inputs, device, STORAGE[stored])
    assert results["out0"].dtype == results["d_gate_up"].dtype == stored


def test_both_forms_give_the_same_bits(device):
    packed = normal(5, 48, seed=0).to(device)
    gate, up = packed.chunk(2, dim=1)
    with use_path("triton"):
        one = outputs_and_gradients(_packed, {"gate_up": packed}, (True,))
        two = outputs_and_gradients(_separate, {"gate": gate, "up": up}, (True,))
    assert torch.equal(one["out0"], two["out0"])
    assert torch.equal(one["d_gate_up"], torch.cat([two["d_gate"], two["d_up"]], 1))


def test_rows_beyond_two_to_the_31_elements(device, tmp_path: Path):
    width = 16
    near = normal(3, width, seed=0, dtype=torch.bfloat16).to(device)
    far = far_apart(near, tmp_path)
    gradient = normal(3, width, seed=1, dtype=torch.bfloat16).to(device)
    with use_path("triton"):
        results = []
        for x in (far, near):
            leaf = x.detach().requires_grad_()
            out = swiglu(leaf, leaf)
            results.append((out.detach(), *torch.autograd.grad(out, leaf, gradient)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", [_separate, _packed], ids=["separate", "packed"])
def test_gate_and_up_alone_are_saved(form, device):
    """4 bytes a hidden column and token in 16 bits: SiLU(gate) and the product are computed again."""
    packed = normal(64, 48, seed=0, dtype=torch.bfloat16).to(device).requires_grad_()
    arguments = (packed,) if form is _packed else packed.chunk(2, dim=1)
    with use_path("triton"):
        assert saved_bytes(lambda: form(*arguments)) == 4 * 64 * 24


def test_the_twins_gradients_are_those_of_finite_differences():
    inputs = [normal(3, 4, seed=s, dtype=torch.float64).requires_grad_() for s in (0, 1)]
    with use_path("torch"):
        assert torch.autograd.gradcheck(swiglu, inputs)


def test_forward_mode_goes_through_the_twin(device):
    gate, up, tangent = (normal(3, 8, seed=s).to(device) for s in (0, 1, 2))
    _, derivative = jvp(lambda x: swiglu(x, up), (gate,), (tangent,))  # type: ignore[misc]
    assert path_taken("swiglu") == "torch"
    sigmoid = torch.sigmoid(gate)
    expected = tangent * up * sigmoid * (1 + gate * (1 - sigmoid))
    torch.testing.assert_close(derivative, expected, rtol=1e-5, atol=1e-6)


def test_tiles_are_whole_for_the_widths_of_the_networks():
    for width in (384, 512, 576, 2048, 3072, 4608):
        options = tile_options(width)
        assert width % options["COLUMNS"] == 0
        assert options["COLUMNS"] * options["ROWS"] == TILE


def test_arguments_that_do_not_fit_are_named():
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"swiglu: up: expected shape \[3, 8\], received \[3, 7\]"):
        swiglu(x, x[:, :7])
    with pytest.raises(ValueError, match=r"swiglu: up: expected torch\.float32 as gate is"):
        swiglu(x, x.half())
    with pytest.raises(ValueError, match="swiglu: gate: expected a floating-point tensor"):
        swiglu(x.int(), x.int())
    with pytest.raises(
        ValueError, match=r"swiglu: gate_up: expected an even number of columns, received \[3, 7\]"
    ):
        swiglu_packed(x[:, :7])
