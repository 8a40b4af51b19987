"""Head norms and rotation against their float64 twin, and the twin against its formula."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from tests.kernels.compare import assert_kernel_equals_twin, normal, outputs_and_gradients
from tim_kernels import ChunkPlan, path_taken, use_path
from tim_kernels.qk_norm_rope import RotaryTable, kernel, kv_norm_rope, qk_norm_rope, qkv_norm_rope
from tim_kernels.saved import saved_bytes

# float32 sums of up to 128 terms, gradients of the affine weights over a few hundred: 1e-7 to 3e-7 seen.
FLOAT32 = 1e-6
# One rounding of a float16 output; the interpreter's bfloat16 truncates, which doubles it.
STORAGE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
NUM_POSITIONS = 11


def _table(tokens: int, head_dim: int, like: Tensor) -> RotaryTable:
    """Coordinates without order or repetition of a grid."""
    n = torch.arange(tokens, dtype=torch.int32)
    dtype = torch.promote_types(like.dtype, torch.float32)
    a, b = n * 7 % NUM_POSITIONS, (n * n + 3) % NUM_POSITIONS
    return RotaryTable.from_positions(a, b, NUM_POSITIONS, head_dim, dtype=dtype).to(like.device)


class _One:
    """qk_norm_rope with its table bound, in the precision of x."""

    def __init__(self, *, rotated: bool = True) -> None:
        self.rotated = rotated

    def __call__(self, x, weight=None, bias=None):
        table = _table(x.shape[0], x.shape[2], x) if self.rotated else None
        return (qk_norm_rope(x, weight, bias, table),)


class _Packed:
    """qkv_norm_rope (or kv_norm_rope, without the arguments of q) with its plan and table bound."""

    def __init__(
        self, lengths: tuple[int, ...], num_heads: int, *, rotated: bool = True, **plan: Any
    ) -> None:
        self.plan = ChunkPlan.from_lengths(lengths, **plan)
        self.num_heads, self.rotated = num_heads, rotated

    def __call__(self, packed, q_weight=None, q_bias=None, k_weight=None, k_bias=None, shift=None):
        parts = 3 if q_weight is not None or k_weight is None else 2
        head_dim = packed.shape[1] // (parts * self.num_heads)
        table = _table(packed.shape[0], head_dim, packed) if self.rotated else None
        k_norm = None if k_weight is None else (k_weight, k_bias)
        if parts == 2:
            return kv_norm_rope(packed, self.num_heads, k_norm, table)
        q_norm = None if q_weight is None else (q_weight, q_bias)
        plan = self.plan.to(packed.device)
        return qkv_norm_rope(packed, self.num_heads, q_norm, k_norm, table, shift_SE=shift, plan=plan)


def _affine(head_dim: int, *names: str) -> dict[str, Tensor]:
    return {name: normal(head_dim, seed=20 + i) for i, name in enumerate(names)}


def _packed_inputs(
    lengths: tuple[int, ...], num_heads: int, head_dim: int, *, shift: bool, norm: bool = True
) -> dict[str, Tensor | None]:
    width = 3 * num_heads * head_dim
    affine = _affine(head_dim, "q_weight", "q_bias", "k_weight", "k_bias") if norm else {}
    return {
        "packed": normal(sum(lengths), width, seed=0),
        **affine,
        "shift": normal(len(lengths), width, seed=1) if shift else None,
    }


HEAD_SHAPES = {
    "one-token": (1, 1, 8),
    "63-tokens": (63, 1, 8),
    "72": (5, 3, 72),
    "64": (3, 2, 64),
    "128": (3, 2, 128),
    "xl": (2, 16, 72),
    "b-masked-heads": (2, 12, 64),
    "masked-columns": (3, 3, 120),
    "smallest": (2, 2, 4),
}


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "in-place"])
@pytest.mark.parametrize(("tokens", "num_heads", "head_dim"), HEAD_SHAPES.values(), ids=HEAD_SHAPES.keys())
def test_forward_and_every_gradient(tokens, num_heads, head_dim, rotated, device):
    inputs = {"x": normal(tokens, num_heads, head_dim, seed=0), **_affine(head_dim, "weight", "bias")}
    assert_kernel_equals_twin(_One(rotated=rotated), inputs, device, FLOAT32)
    assert path_taken("qk_norm_rope") == "triton"


@pytest.mark.parametrize("affine", [(), ("weight",)], ids=["rotation-alone", "no-bias"])
def test_parts_of_the_op(affine, device):
    inputs = {"x": normal(3, 2, 72, seed=0), **_affine(72, *affine)}
    assert_kernel_equals_twin(_One(), inputs, device, FLOAT32)
    assert path_taken("qk_norm_rope") == "triton"


PACKS = {
    "72": ((2, 3), 2, 72),
    "one-token-and-empty": ((0, 1, 3, 0, 1, 0), 1, 8),
    "masked-heads": ((2, 1), 3, 24),
    "several-chunks": ((9, 2), 1, 16),
}


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no-shift"])
@pytest.mark.parametrize(("lengths", "num_heads", "head_dim"), PACKS.values(), ids=PACKS.keys())
def test_packed_rows_and_every_gradient(lengths, num_heads, head_dim, shift, norm, device):
    inputs = _packed_inputs(lengths, num_heads, head_dim, shift=shift, norm=norm)
    assert_kernel_equals_twin(_Packed(lengths, num_heads), inputs, device, FLOAT32)
    assert path_taken("qk_norm_rope") == "triton"


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "in-place"])
def test_keys_and_values_of_cross_attention(rotated, device):
    inputs = {"packed": normal(5, 2 * 2 * 72, seed=0), **_affine(72, "k_weight", "k_bias")}
    op = _Packed((5,), 2, rotated=rotated)
    results = assert_kernel_equals_twin(op, inputs, device, FLOAT32)
    assert path_taken("qk_norm_rope") == "triton"
    assert results["out1"].shape == (5, 2, 72)


@pytest.mark.parametrize("used", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_when_outputs_are_unused(used, device):
    inputs = _packed_inputs((2, 1), 2, 8, shift=True)
    assert_kernel_equals_twin(_Packed((2, 1), 2), inputs, device, FLOAT32, used)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 32])
def test_any_cut_into_chunks_gives_the_same_sums(rows_per_chunk, device):
    lengths = (7, 0, 4)
    inputs = _packed_inputs(lengths, 1, 8, shift=True)
    assert_kernel_equals_twin(_Packed(lengths, 1, rows_per_chunk=rows_per_chunk), inputs, device, FLOAT32)


LAYOUTS = {
    "q of a packed row": lambda x: torch.cat([x, x, x], 1).unflatten(1, (3, -1))[:, 0],
    "every second token": lambda x: x.repeat_interleave(2, 0)[::2],
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_inputs_that_are_not_contiguous(layout, device):
    x = layout(normal(3, 2, 8, seed=0))
    assert not x.is_contiguous()
    affine = {
        name: v.repeat_interleave(2)[::2] for name, v in _affine(8, "weight", "bias").items() if v is not None
    }
    assert_kernel_equals_twin(_One(), {"x": x, **affine}, device, FLOAT32)


@pytest.mark.parametrize("transposed", [True, False])
def test_packed_rows_that_are_not_contiguous(transposed, device):
    inputs = {k: x for k, x in _packed_inputs((2, 1), 2, 8, shift=True).items() if x is not None}
    for name in ("packed", "shift"):
        x = inputs[name]
        inputs[name] = x.t().contiguous().t() if transposed else torch.cat([x, x], 1)[:, : x.shape[1]]
        assert not inputs[name].is_contiguous()
    assert_kernel_equals_twin(_Packed((2, 1), 2), inputs, device, FLOAT32)


def test_gradients_that_are_not_contiguous(device):
    x = normal(3, 2, 8, seed=0)
    row = normal(1, 1, 8, seed=5)

    def gradient(path, dtype, where):
        leaf = x.to(where, dtype).requires_grad_()
        with use_path(path):
            (y,) = _One()(leaf)
            return torch.autograd.grad(y, leaf, row.to(where, dtype).expand(3, 2, 8))[0]

    ours, truth = gradient("triton", torch.float32, device), gradient("torch", torch.float64, "cpu")
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("stored", STORAGE, ids=["float16", "bfloat16"])
def test_stored_precisions(stored, device):
    """16-bit rows beside float32 weights and shifts."""
    inputs = _packed_inputs((3, 2), 2, 72, shift=True)
    assert inputs["packed"] is not None
    inputs["packed"] = inputs["packed"].to(stored)
    results = assert_kernel_equals_twin(_Packed((3, 2), 2), inputs, device, STORAGE[stored])
    assert {results[name].dtype for name in ("out0", "out1", "out2", "d_packed")} == {stored}
    assert {results[f"d_{name}"].dtype for name in ("q_weight", "k_bias", "shift")} == {torch.float32}


def test_gradients_are_bitwise_repeatable(device):
    lengths = (17, 1, 5)
    inputs = _packed_inputs(lengths, 2, 8, shift=True)
    moved = {k: None if x is None else x.to(device) for k, x in inputs.items()}
    with use_path("triton"):
        first, second = (
            outputs_and_gradients(_Packed(lengths, 2, rows_per_chunk=4), moved, (True,) * 3) for _ in range(2)
        )
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_no_token_sees_another(device):
    """NaN in one image leaves the other images' outputs and gradients bit-equal."""
    lengths = (3, 4, 2)
    inputs = {
        k: None if x is None else x.to(device) for k, x in _packed_inputs(lengths, 1, 8, shift=True).items()
    }
    packed, shift = inputs["packed"], inputs["shift"]
    assert packed is not None and shift is not None
    spoiled = {**inputs, "packed": packed.clone(), "shift": shift.clone()}
    spoiled["packed"][3:7] = float("nan")
    spoiled["shift"][1] = float("nan")
    op = _Packed(lengths, 1, rows_per_chunk=2)
    with use_path("triton"):
        clean, dirty = (outputs_and_gradients(op, i, (True,) * 3) for i in (inputs, spoiled))
    for name in ("out0", "out1", "out2", "d_packed", "d_shift"):
        rows = [0, 2] if name == "d_shift" else [0, 1, 2, 7, 8]
        assert torch.equal(clean[name][rows], dirty[name][rows]), name
        assert dirty[name].isnan().any(), name


def _memory(elements: int, device: torch.device, folder: Path) -> Tensor:
    """bfloat16 zeros; on the CPU a sparse file."""
    if device.type == "cuda":
        return torch.zeros(elements, dtype=torch.bfloat16, device=device)
    return torch.from_file(str(folder / "sparse"), shared=True, size=elements, dtype=torch.bfloat16)


def test_rows_beyond_two_to_the_31_elements(device, tmp_path):
    """Row 2 of the input starts 2^31 elements and more into memory: a 32-bit offset would wrap."""
    width, stride = 3 * 8, 2**30 + 64
    memory = _memory(2 * stride + width, device, tmp_path)
    far = memory.as_strided((3, width), (stride, 1))
    near = normal(3, width, seed=0, dtype=torch.bfloat16).to(device)
    far.copy_(near)
    op = _Packed((3,), 1)
    affine = [
        x.to(device) for x in _affine(8, "q_weight", "q_bias", "k_weight", "k_bias").values() if x is not None
    ]
    gradients = []
    for packed in (far, near):
        leaf = packed.detach().requires_grad_()
        with use_path("triton"):
            outputs = op(leaf, *affine)
        cotangents = [normal(*y.shape, seed=3, dtype=y.dtype).to(device) for y in outputs]
        gradients.append([*outputs, *torch.autograd.grad(outputs, leaf, cotangents)])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_dense_rows_beyond_two_to_the_31_elements(direction, device, tmp_path):
    """The last of 2^28 + 1 rows of 8, alone in its chunk. The input has one row, and a stride of 0."""
    head_dim, row = 8, 2**28
    memory = _memory((row + 1) * head_dim, device, tmp_path)
    value = normal(1, head_dim, seed=0, dtype=torch.bfloat16).to(device)
    launched = kernel.forward_kernel if direction == "forward" else kernel.backward_kernel
    arguments: dict[str, Any] = dict.fromkeys(name for name in launched.arg_names if name.endswith("_ptr"))
    arguments |= {
        "shift_ptr": torch.zeros(1, head_dim, device=device),
        "chunks_ptr": torch.tensor([[row, 1, 0]], dtype=torch.int32, device=device),
        "num_rows": row + 1,
        "rows_per_program": 1,
        "x_stride": 0,
        "shift_stride": head_dim,
        "eps": 1e-5,
    }
    if direction == "forward":
        arguments |= {"x_ptr": value, "first_ptr": memory, **kernel.forward_options(1, head_dim)}
    else:
        memory[row * head_dim :] = value[0]
        # A stride of 0 puts the gradient's row where there is memory.
        d_x, partial = torch.zeros_like(value), torch.zeros(1, head_dim, device=device)
        arguments |= {"d_first_ptr": memory, "d_x_ptr": d_x, "shift_partial_ptr": partial, "d_x_stride": 0}
        arguments |= kernel.backward_options(1, head_dim, has_shift=True)
    launched[(1, 1, 1)](**arguments)
    found = memory[row * head_dim :] if direction == "forward" else d_x[0]
    assert torch.equal(found, value[0])


def test_an_empty_pack(device):
    results = assert_kernel_equals_twin(
        _Packed((0, 0), 2), _packed_inputs((0, 0), 2, 8, shift=True), device, 0.0
    )
    assert results["out0"].shape == (0, 2, 8)
    assert not results["d_q_weight"].any() and not results["d_shift"].any()


def test_without_a_shift_v_is_a_view(device):
    packed = normal(3, 3 * 16, seed=0).to(device)
    with use_path("triton"):
        _, _, v = qkv_norm_rope(packed, 2, None, None, _table(3, 8, packed))
    assert path_taken("qk_norm_rope") == "triton"
    assert v.data_ptr() == packed[:, 32:].data_ptr()


def test_the_twin_is_its_formula():
    """Complex multiplication, head by head, of the normalised pairs."""
    num_heads, head_dim, eps = 2, 12, 1e-5
    # Small, so that the epsilon matters.
    x, w, bias = (
        (1e-2 * normal(3, 24, seed=0)).double(),
        normal(12, seed=1).double(),
        normal(12, seed=2).double(),
    )
    a, b = torch.tensor([0, 4, 2], dtype=torch.int32), torch.tensor([3, 1, 0], dtype=torch.int32)
    table = RotaryTable.from_positions(a, b, 5, head_dim, dtype=torch.float64)
    with use_path("torch"):
        out = qk_norm_rope(x.unflatten(1, (num_heads, head_dim)), w, bias, table, eps=eps)
    for token in range(3):
        for head in range(num_heads):
            row = x[token, head * head_dim : (head + 1) * head_dim]
            row = (row - row.mean()) / torch.sqrt(row.var(unbiased=False) + eps) * w + bias
            for pair in range(head_dim // 2):
                half, k = divmod(pair, head_dim // 4)
                angle = float((a, b)[half][token]) * 10000.0 ** (-2 * k / (head_dim // 2))
                turned = complex(row[2 * pair], row[2 * pair + 1]) * complex(math.cos(angle), math.sin(angle))
                got = complex(*out[token, head, 2 * pair : 2 * pair + 2].tolist())
                assert abs(got - turned) < 1e-12


def test_the_packed_twin_is_three_single_ones_after_the_shift():
    lengths, num_heads, head_dim = (2, 1), 2, 8
    inputs = {k: x.double() for k, x in _packed_inputs(lengths, 2, 8, shift=True).items() if x is not None}
    with use_path("torch"):
        outputs = _Packed(lengths, num_heads)(**inputs)
        rows = inputs["packed"] + inputs["shift"][[0, 0, 1]]
        parts = rows.unflatten(1, (3, num_heads, head_dim)).unbind(1)
        q_alone, k_alone = (
            _One()(part, inputs[f"{n}_weight"], inputs[f"{n}_bias"])[0]
            for n, part in zip("qk", parts, strict=False)
        )
    for got, expected in zip(outputs, (q_alone, k_alone, parts[2]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def test_the_twins_gradients_are_those_of_finite_differences():
    inputs = {k: x.double() for k, x in _packed_inputs((2, 1), 1, 8, shift=True).items() if x is not None}
    with use_path("torch"):
        assert torch.autograd.gradcheck(
            lambda *x: _Packed((2, 1), 1)(**dict(zip(inputs, x, strict=True))),
            [x.requires_grad_() for x in inputs.values()],
        )


def test_forward_mode_goes_through_the_twin(device):
    x, tangent = normal(3, 2, 8, seed=0).to(device), normal(3, 2, 8, seed=1).to(device)
    # The rotation is linear: its derivative is itself.
    derivative = jvp(lambda y: _One()(y)[0], (x,), (tangent,))[1]
    assert path_taken("qk_norm_rope") == "torch"
    with use_path("triton"):
        torch.testing.assert_close(derivative, _One()(tangent)[0])
        with pytest.raises(ValueError, match="a forward-mode derivative is being taken"):
            jvp(lambda y: _One()(y)[0], (x,), (tangent,))


def test_a_compiled_model_holds_the_twin_in_one_graph():
    inputs = {k: x for k, x in _packed_inputs((2, 1), 2, 8, shift=True).items() if x is not None}
    table, plan = _table(3, 8, inputs["packed"]), ChunkPlan.from_lengths((2, 1))
    q_norm, k_norm = ((inputs[f"{n}_weight"], inputs[f"{n}_bias"]) for n in "qk")

    def run(packed, shift):
        return qkv_norm_rope(packed, 2, q_norm, k_norm, table, shift_SE=shift, plan=plan)

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    arguments = inputs["packed"], inputs["shift"]
    for received, expected in zip(compiled(*arguments), run(*arguments), strict=True):
        # Compiled, the rotation is written out in real numbers: a fused multiply-add less or more.
        torch.testing.assert_close(received, expected, rtol=1e-6, atol=1e-6)


def test_an_op_with_nothing_to_do_hands_out_its_input():
    x = normal(3, 2, 8, seed=0)
    assert qk_norm_rope(x, None, None, None) is x
    k, v = kv_norm_rope(x.flatten(1), 1, None)
    assert torch.equal(torch.cat([k, v], 2).flatten(1), x.flatten(1))


X, PLAN = torch.zeros(3, 2, 8), ChunkPlan.from_lengths((1, 2))
WRONG = {
    "head_dim": (
        lambda: qk_norm_rope(torch.zeros(3, 2, 6), None, None, None),
        "head_dim: .* multiple of 4, received 6",
    ),
    "rank": (lambda: qk_norm_rope(X[0], None, None, None), r"x: expected \[tokens, heads, head_dim\]"),
    "bias alone": (lambda: qk_norm_rope(X, None, torch.zeros(8), None), "bias: expected a weight"),
    "weight shape": (lambda: qk_norm_rope(X, torch.zeros(7), None, None), r"weight: expected shape \[8\]"),
    "integers": (
        lambda: qk_norm_rope(X, torch.zeros(8, dtype=torch.int64), None, None),
        "weight: expected a floating-point tensor",
    ),
    "device": (
        lambda: qk_norm_rope(X, torch.zeros(8, device="meta"), None, None),
        "weight: expected on cpu as x is",
    ),
    "table of another pack": (
        lambda: qk_norm_rope(X, None, None, _table(4, 8, X)),
        "table: made for 4 tokens and head_dim 8, received 3 tokens and head_dim 8",
    ),
    "row width": (
        lambda: qkv_norm_rope(torch.zeros(3, 50), 2, None, None, None),
        r"packed row: expected \[tokens, 3 \* 2 heads \* head_dim\], received \[3, 50\]",
    ),
    "one norm of two": (
        lambda: qkv_norm_rope(torch.zeros(3, 48), 2, (torch.zeros(8), None), None, None),
        "q_norm and k_norm: expected both or neither",
    ),
    "shift without plan": (
        lambda: qkv_norm_rope(torch.zeros(3, 48), 2, None, None, None, shift_SE=torch.zeros(1, 48)),
        "plan: expected with a shift",
    ),
    "shift shape": (
        lambda: qkv_norm_rope(
            torch.zeros(3, 48),
            2,
            None,
            None,
            None,
            shift_SE=torch.zeros(1, 48),
            plan=ChunkPlan.from_lengths((1, 2)),
        ),
        r"shift: expected shape \[2, 48\], received \[1, 48\]",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_arguments_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match="qk_norm_rope: " + message):
        call()


A = torch.tensor([0, 3], dtype=torch.int32)
WRONG_TABLES = {
    "dtype of positions": ((A.long(), A.long(), 4, 8), {}, "expected two int32"),
    "lengths": ((A, A[:1], 4, 8), {}, "expected two int32"),
    "head_dim": ((A, A, 4, 10), {}, "multiple of 4, received 10"),
    "narrow angles": ((A, A, 4, 8), {"dtype": torch.bfloat16}, "float32 or float64, received torch.bfloat16"),
    "out of range": ((A, A, 3, 8), {}, r"expected within \[0, 3\), received 0 to 3"),
}


@pytest.mark.parametrize(("arguments", "options", "message"), WRONG_TABLES.values(), ids=WRONG_TABLES.keys())
def test_tables_that_cannot_be_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match="rotary positions: .*" + message):
        RotaryTable.from_positions(*arguments, **options)


@pytest.mark.parametrize(
    ("shift", "norm", "expected"), [(False, True, 6), (True, True, 6), (False, False, 0)]
)
def test_saved_for_backward(shift, norm, expected, device):
    """The packed 16-bit row and nothing else a token; nothing at all for the rotation alone."""
    lengths, num_heads, head_dim = (5, 4), 2, 32
    inputs = _packed_inputs(lengths, num_heads, head_dim, shift=shift, norm=norm)
    assert inputs["packed"] is not None
    inputs["packed"] = inputs["packed"].to(torch.bfloat16)
    leaves = {k: None if x is None else x.to(device).requires_grad_() for k, x in inputs.items()}
    parameters = [x for k, x in leaves.items() if x is not None and k != "packed"]
    with use_path("triton"):
        total = saved_bytes(lambda: _Packed(lengths, num_heads)(**leaves), apart_from=parameters)
    assert total == expected * sum(lengths) * num_heads * head_dim


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_parity_at_full_size(stored):
    """The XL network's heads on packs of native resolutions; bfloat16 rounds each output once."""
    lengths, num_heads, head_dim = (1024, 1, 777, 4096), 16, 72
    inputs = _packed_inputs(lengths, num_heads, head_dim, shift=True)
    assert inputs["packed"] is not None
    inputs["packed"] = inputs["packed"].to(stored)
    tolerance = 2**-8 if stored == torch.bfloat16 else 1e-5
    assert_kernel_equals_twin(_Packed(lengths, num_heads), inputs, torch.device("cuda"), tolerance)
