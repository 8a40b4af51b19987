"""Tangents of the row ops: kernel against its float64 twin, twin against forward mode of the op itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from tests.kernels.compare import far_apart, normal
from tim_kernels import (
    ChunkPlan,
    RotaryTable,
    TangentPlan,
    gated_residual,
    gated_residual_jvp,
    modulated_layer_norm,
    modulated_layer_norm_jvp,
    path_taken,
    qk_norm_rope,
    qk_norm_rope_jvp,
    qkv_norm_rope,
    qkv_norm_rope_jvp,
    swiglu,
    swiglu_jvp,
    swiglu_packed_jvp,
    use_path,
)

# float32 sums of up to 1152 terms: 2e-7 seen at every size.
FLOAT32 = 1e-6
# One rounding of a float16 output; the interpreter's bfloat16 truncates, which doubles it.
STORAGE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
NUM_HEADS = 2
PER_SEGMENT = ("gate", "shift", "scale")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """An op and its tangent: value(values, plan of the pack) and tangent(values, tangents, plan), by name.

    moving: the names of the inputs that carry a tangent; the others are rows of the pack, or weights.
    """

    name: str
    moving: tuple[str, ...]
    weights: tuple[str, ...]
    parts: int
    """Columns of a row, in units of the width."""
    value: Callable[[Tensors, ChunkPlan], tuple[Tensor, ...]]
    tangent: Callable[[Tensors, Tensors, TangentPlan], tuple[Tensor, ...]]


def _table(tokens: int, head_dim: int, like: Tensor) -> RotaryTable:
    n = torch.arange(tokens, dtype=torch.int32)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return RotaryTable.from_positions(n * 7 % 11, (n * n + 3) % 11, 11, head_dim, dtype=dtype).to(like.device)


def _norm(x: Tensors, plan: ChunkPlan) -> tuple[Tensor, ...]:
    return modulated_layer_norm(x["x"], x.get("branch"), x.get("gate"), x["shift"], x["scale"], plan)


def _norm_tangent(x: Tensors, d: Tensors, plan: TangentPlan) -> tuple[Tensor, ...]:
    after = x["x"]
    if "branch" in x:
        # What the forward has stored.
        ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(after.device)
        after = after + x["gate"].to(after.dtype)[ids] * x["branch"].to(after.dtype)
    joined = (x.get("branch"), d.get("branch"), x.get("gate"), d.get("gate"))
    # 16-bit branches come with a 16-bit h.
    h_dtype = x["branch"].dtype if "branch" in x else None
    return modulated_layer_norm_jvp(
        after, d["x"], *joined, x["scale"], d["shift"], d["scale"], plan, h_dtype=h_dtype
    )


def _gated(x: Tensors, plan: ChunkPlan) -> tuple[Tensor, ...]:
    return (gated_residual(x["x"], x["branch"], x["gate"], plan),)


def _gated_tangent(x: Tensors, d: Tensors, plan: TangentPlan) -> tuple[Tensor, ...]:
    return (gated_residual_jvp(d["x"], x["branch"], d["branch"], x["gate"], d["gate"], plan),)


def _qkv(x: Tensors, plan: ChunkPlan) -> tuple[Tensor, ...]:
    table, shift = _table(x["x"].shape[0], x["x"].shape[1] // (3 * NUM_HEADS), x["x"]), x.get("shift")
    norms = (x["q_weight"], x["q_bias"]), (x["k_weight"], x["k_bias"])
    return qkv_norm_rope(x["x"], NUM_HEADS, *norms, table, shift_SE=shift, plan=plan)


def _qkv_tangent(x: Tensors, d: Tensors, plan: TangentPlan) -> tuple[Tensor, ...]:
    table = _table(x["x"].shape[0], x["x"].shape[1] // (3 * NUM_HEADS), x["x"])
    weights = x["q_weight"], x["k_weight"]
    shift, d_shift = x.get("shift"), d.get("shift")
    return qkv_norm_rope_jvp(
        x["x"], d["x"], NUM_HEADS, *weights, table, plan, shift_SE=shift, d_shift_SE=d_shift
    )


def _q(x: Tensors, plan: ChunkPlan) -> tuple[Tensor, ...]:
    heads = x["x"].unflatten(1, (NUM_HEADS, -1))
    return (qk_norm_rope(heads, x["q_weight"], x["q_bias"], _table(heads.shape[0], heads.shape[2], heads)),)


def _q_tangent(x: Tensors, d: Tensors, plan: TangentPlan) -> tuple[Tensor, ...]:
    heads, d_heads = (y["x"].unflatten(1, (NUM_HEADS, -1)) for y in (x, d))
    table = _table(heads.shape[0], heads.shape[2], heads)
    return (qk_norm_rope_jvp(heads, d_heads, x["q_weight"], table, plan),)


def _swiglu(x: Tensors, plan: ChunkPlan) -> tuple[Tensor, ...]:
    return (swiglu(*x["x"].chunk(2, dim=1)),)


def _packed_swiglu_tangent(x: Tensors, d: Tensors, plan: TangentPlan) -> tuple[Tensor, ...]:
    return (swiglu_packed_jvp(x["x"], d["x"], plan),)


def _swiglu_tangent(x: Tensors, d: Tensors, plan: TangentPlan) -> tuple[Tensor, ...]:
    (gate, up), (d_gate, d_up) = x["x"].chunk(2, dim=1), d["x"].chunk(2, dim=1)
    return (swiglu_jvp(gate, up, d_gate, d_up, plan),)


AFFINE = ("q_weight", "q_bias", "k_weight", "k_bias")
OPS = {
    "norm": Op("modulated_layer_norm_jvp", ("x", "shift", "scale"), (), 1, _norm, _norm_tangent),
    "residual and norm": Op(
        "modulated_layer_norm_jvp", ("x", "branch", "gate", "shift", "scale"), (), 1, _norm, _norm_tangent
    ),
    "residual": Op("gated_residual_jvp", ("x", "branch", "gate"), (), 1, _gated, _gated_tangent),
    "q, k, v with shift": Op("qk_norm_rope_jvp", ("x", "shift"), AFFINE, 3, _qkv, _qkv_tangent),
    "q, k, v": Op("qk_norm_rope_jvp", ("x",), AFFINE, 3, _qkv, _qkv_tangent),
    "q": Op("qk_norm_rope_jvp", ("x",), AFFINE[:2], 1, _q, _q_tangent),
    "swiglu, packed": Op("swiglu_jvp", ("x",), (), 2, _swiglu, _packed_swiglu_tangent),
    "swiglu": Op("swiglu_jvp", ("x",), (), 2, _swiglu, _swiglu_tangent),
}
LENGTHS = (3, 1, 0, 5, 2)
MOVING = {
    "no order": (3, 0, 2),
    "neighbours": (1, 2, 3),
    "one token": (1,),
    "all": (0, 1, 2, 3, 4),
    "none": (),
}


def _inputs(op: Op, moving: Iterable[int], width: int = 16) -> tuple[Tensors, Tensors]:
    """Values of the whole pack and weights; tangents of what moves."""
    moving = tuple(moving)
    rows = {False: sum(LENGTHS), True: sum(LENGTHS[i] for i in moving)}
    segments = {False: len(LENGTHS), True: len(moving)}

    def made(name: str, moves: bool) -> Tensor:
        count = (segments if name in PER_SEGMENT else rows)[moves]
        seed = 10 * op.moving.index(name) + moves
        return normal(count, op.parts * width, seed=seed)

    values = {name: made(name, False) for name in op.moving}
    values |= {name: normal(width // NUM_HEADS, seed=70 + i) for i, name in enumerate(op.weights)}
    return values, {name: made(name, True) for name in op.moving}


def _to(x: Tensors, *where: Any) -> Tensors:
    return {name: y.to(*where) for name, y in x.items()}


def _error(ours: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Largest over the outputs: largest deviation over the largest magnitude of the truth."""
    worst = 0.0
    for y, expected in zip(ours, truth, strict=True):
        assert y.shape == expected.shape and not y.requires_grad
        if y.numel():
            error = (y.cpu().double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
            # max() would drop a NaN.
            worst = float(error) if not error <= worst else worst
    return worst


def check(
    op: Op,
    values: Tensors,
    tangents: Tensors,
    moving: tuple[int, ...],
    device: torch.device,
    tolerance: float,
) -> tuple[Tensor, ...]:
    """The kernel on the inputs as they are against the twin on their float64 copies."""
    plan = TangentPlan.from_lengths(LENGTHS, moving, rows_per_chunk=2)
    with use_path("torch"):
        truth = op.tangent(_to(values, torch.float64), _to(tangents, torch.float64), plan)
    plan = TangentPlan.from_lengths(LENGTHS, moving, rows_per_chunk=2, device=device)
    with use_path("triton"):
        ours = op.tangent(_to(values, device), _to(tangents, device), plan)
    assert path_taken(op.name) == "triton"
    assert _error(ours, truth) <= tolerance
    return ours


@pytest.mark.parametrize("moving", MOVING.values(), ids=MOVING.keys())
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_kernels_equal_their_twins(op, moving, device):
    check(op, *_inputs(op, moving), moving, device, FLOAT32)


@pytest.mark.parametrize("moving", MOVING.values(), ids=MOVING.keys())
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_twins_are_forward_mode_of_their_op(op, moving):
    values, tangents = (_to(x, torch.float64) for x in _inputs(op, moving))
    plan = TangentPlan.from_lengths(LENGTHS, moving)
    at = {name: plan.segments if name in PER_SEGMENT else plan.rows for name in op.moving}
    spread = {name: torch.zeros_like(values[name]) for name in op.moving}
    for name, d in tangents.items():
        where = at[name]
        spread[name][where.long() if isinstance(where, Tensor) else where] = d
    weights = {name: values[name] for name in op.weights}
    chunks = ChunkPlan.from_lengths(LENGTHS)
    with use_path("torch"):
        truth = jvp(
            lambda *x: op.value({**dict(zip(op.moving, x, strict=True)), **weights}, chunks),
            tuple(values[name] for name in op.moving),
            tuple(spread[name] for name in op.moving),
        )[1]
        ours = op.tangent(values, tangents, plan)
    # A norm hands out x' itself where there is no branch.
    for y, expected in zip(ours, truth, strict=True):
        # float64 sums of at most 16 terms
        torch.testing.assert_close(y, plan.rows_of(expected), rtol=1e-11, atol=1e-12)


WIDTHS = {
    "norm": (1152, 1176, 37, 1),
    "residual and norm": (1152, 37),
    "residual": (1152, 37),
    "q, k, v with shift": (2 * 72, 2 * 120),
    "q": (2 * 72, 2 * 64, 2 * 4),
    "swiglu": (200, 1),
}


@pytest.mark.parametrize(("name", "width"), [(n, w) for n, widths in WIDTHS.items() for w in widths])
def test_widths_that_are_no_powers_of_two(name, width, device):
    check(OPS[name], *_inputs(OPS[name], (1, 4), width), (1, 4), device, FLOAT32)


def test_more_heads_than_a_program_takes(device):
    """Twelve heads of 64, by eight; the last group is half empty."""
    plan = TangentPlan.from_lengths((2,))
    x, d_x, weight = (normal(2, 12, 64, seed=s) for s in (0, 1, 2))
    with use_path("triton"):
        ours = qk_norm_rope_jvp(x.to(device), d_x.to(device), weight[0, 0].to(device), None, plan)
    truth = qk_norm_rope_jvp(x.double(), d_x.double(), weight[0, 0].double(), None, plan)
    assert _error([ours], [truth]) <= FLOAT32


@pytest.mark.parametrize("parts", [(False, True), (True, False)], ids=["rotation alone", "norm alone"])
@pytest.mark.parametrize("shifted", [True, False])
def test_parts_of_the_head_op(parts, shifted, device):
    """Without a norm the tangent is linear in d_qkv and reads no value."""
    has_norm, has_table = parts
    width, plan = 3 * NUM_HEADS * 8, TangentPlan.from_lengths(LENGTHS, (3, 0), device=device)
    weight = normal(8, seed=4) if has_norm else None
    qkv, d_qkv, shift, d_shift = (
        normal(n, width, seed=s) for s, n in enumerate((sum(LENGTHS), 8, len(LENGTHS), 2))
    )

    def run(path: str, *where: Any) -> tuple[Tensor, ...]:
        x, d_x, m, d_m = (y.to(*where) for y in (qkv, d_qkv, shift, d_shift))
        own = None if weight is None else weight.to(*where)
        table = _table(x.shape[0], 8, x) if has_table else None
        shifts = (m, d_m) if shifted else (None, None)
        on = TangentPlan.from_lengths(LENGTHS, (3, 0), device=x.device)
        with use_path(path):  # type: ignore[arg-type]
            return qkv_norm_rope_jvp(
                x, d_x, NUM_HEADS, own, own, table, on, shift_SE=shifts[0], d_shift_SE=shifts[1]
            )

    ours = run("triton", device)
    assert plan.num_moving_rows == ours[0].shape[0]
    assert _error(ours, run("torch", torch.float64)) <= FLOAT32


LAYOUTS = {
    "rows of a wider matrix": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_inputs_that_are_not_contiguous(op, layout, device):
    values, tangents = _inputs(op, (3, 0))
    values, tangents = (
        {name: x if x.ndim == 1 else layout(x) for name, x in y.items()} for y in (values, tangents)
    )
    assert not values["x"].is_contiguous() and not tangents["x"].is_contiguous()
    check(op, values, tangents, (3, 0), device, FLOAT32)


@pytest.mark.parametrize("stored", STORAGE, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_stored_precisions(op, stored, device):
    """16-bit activations; the residual stream, the modulation and the weights stay float32."""
    values, tangents = _inputs(op, (3, 0))
    wide = ("gate", "shift", "scale", *op.weights, *(("x",) if "branch" in op.moving else ()))
    values, tangents = (
        {name: x if name in wide else x.to(stored) for name, x in y.items()} for y in (values, tangents)
    )
    ours = check(op, values, tangents, (3, 0), device, STORAGE[stored])
    expected = torch.float32 if "branch" in op.moving else stored
    assert ours[0].dtype == expected
    assert ours[-1].dtype == (torch.float32 if op is OPS["residual"] else stored)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_no_image_sees_another(op, device):
    """NaN in the values of images that stand still, or in another image that moves, changes no bit."""
    moving = (3, 0)
    plan = TangentPlan.from_lengths(LENGTHS, moving, device=device, rows_per_chunk=2)
    values, tangents = (_to(x, device) for x in _inputs(op, moving))
    spoiled, d_spoiled = ({n: x.clone() for n, x in y.items()} for y in (values, tangents))
    for name in op.moving:
        if name in PER_SEGMENT:
            spoiled[name][1:] = float("nan")
            d_spoiled[name][0] = float("nan")
        else:
            spoiled[name][3:] = float("nan")
            d_spoiled[name][:5] = float("nan")
    with use_path("triton"):
        clean, dirty = op.tangent(values, tangents, plan), op.tangent(spoiled, d_spoiled, plan)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[5:], b[5:])
        assert b[:5].isnan().any()


def test_rows_beyond_two_to_the_31_elements(device, tmp_path: Path):
    """Values and tangents whose last row starts beyond 2^31 elements: an offset of 32 bits would wrap."""
    width, plan = 16, TangentPlan.from_lengths((1, 2), (1, 0), device=device)
    dense = normal(3, width, seed=0, dtype=torch.bfloat16).to(device)
    far = far_apart(dense, tmp_path)
    vector = normal(2, width, seed=1).to(device)
    weight = normal(width, seed=2).to(device)
    results = []
    for x in (far, dense):
        heads = x.unflatten(1, (1, width))
        with use_path("triton"):
            results.append(
                [
                    *modulated_layer_norm_jvp(x, x, x, x, vector, vector, vector, vector, vector, plan),
                    gated_residual_jvp(x, x, x, vector, vector, plan),
                    swiglu_jvp(x, x, x, x, plan),
                    qk_norm_rope_jvp(heads, heads, weight, None, plan),
                ]
            )
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_nothing_has_a_gradient_and_nothing_is_kept(device):
    plan = TangentPlan.from_lengths(LENGTHS, (3, 0), device=device)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    for op in OPS.values():
        values, tangents = (
            {n: x.to(device).requires_grad_() for n, x in y.items()} for y in _inputs(op, (3, 0))
        )
        for path in ("triton", "torch"):
            with use_path(path), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                after = [x.detach() for x in op.tangent(values, tangents, plan)]
            assert len(after) >= 1
    # A norm's x' of the test itself is taken with a graph; the ops add nothing to it.
    assert all(x.shape[0] == sum(LENGTHS) for x in kept)


def test_a_plan_says_where_values_lie():
    plan = TangentPlan.from_lengths(LENGTHS, (3, 0, 2), rows_per_chunk=4)
    assert plan.chunks.tolist() == [[0, 4, 0, 4, 3], [4, 1, 0, 8, 3], [5, 3, 1, 0, 0]]
    assert plan.segment_ids.tolist() == [0] * 5 + [1] * 3
    assert isinstance(plan.rows, Tensor) and plan.rows.tolist() == [4, 5, 6, 7, 8, 0, 1, 2]
    assert isinstance(plan.segments, Tensor) and plan.segments.tolist() == [3, 0, 2]
    rows, segments = torch.arange(11), torch.arange(5)
    assert plan.rows_of(rows).tolist() == plan.rows.tolist()
    assert plan.segments_of(segments).tolist() == [3, 0, 2]
    neighbours = TangentPlan.from_lengths(LENGTHS, (1, 2, 3))
    assert (neighbours.rows, neighbours.segments) == (slice(3, 9), slice(1, 4))


@pytest.mark.parametrize(
    ("lengths", "moving", "message"),
    [((2, 1), (2,), "moving: expected segments among 2"), ((2, -1), None, "lengths: expected at least 0")],
)
def test_plans_that_cannot_be_are_refused(lengths, moving, message):
    with pytest.raises(ValueError, match="tangent plan: " + message):
        TangentPlan.from_lengths(lengths, moving)


PLAN = TangentPlan.from_lengths((2, 1), (1,))
T, M, S, D_S = torch.zeros(3, 8), torch.zeros(1, 8), torch.zeros(2, 8), torch.zeros(1, 8)
H, D_H = torch.zeros(3, 2, 8), torch.zeros(1, 2, 8)
NONE = (None, None, None, None)
WRONG = {
    "values of another pack": (
        lambda: modulated_layer_norm_jvp(M, M, *NONE, S, D_S, D_S, PLAN),
        "plan: made for 3 rows, received 1",
    ),
    "tangents of the whole pack": (
        lambda: modulated_layer_norm_jvp(T, T, *NONE, S, D_S, D_S, PLAN),
        "plan: made for 1 rows that move, received 3",
    ),
    "a tangent of every segment": (
        lambda: modulated_layer_norm_jvp(T, M, *NONE, S, S, D_S, PLAN),
        r"d_shift: expected shape \[1, 8\], received \[2, 8\]",
    ),
    "branch without gate": (
        lambda: modulated_layer_norm_jvp(T, M, T, M, None, None, S, D_S, D_S, PLAN),
        "expected all or none",
    ),
    "integers": (
        lambda: modulated_layer_norm_jvp(T, M, *NONE, S, D_S.long(), D_S, PLAN),
        "d_shift: expected a floating-point tensor",
    ),
    "device": (
        lambda: gated_residual_jvp(M, T.to("meta"), M, S, D_S, PLAN),
        "branch: expected on cpu as d_x is",
    ),
    "branch": (lambda: gated_residual_jvp(M, M, M, S, D_S, PLAN), r"branch: expected shape \[3, 8\]"),
    "gate": (lambda: gated_residual_jvp(M, T, M, D_S, D_S, PLAN), r"gate: expected shape \[2, 8\]"),
    "up": (lambda: swiglu_jvp(T, M, M, M, PLAN), r"up: expected shape \[3, 8\]"),
    "dtypes": (lambda: swiglu_jvp(T, T, M, M.double(), PLAN), "d_up: expected torch.float32, received"),
    "odd columns": (lambda: swiglu_packed_jvp(T[:, :7], M[:, :7], PLAN), "gate_up: expected .* even number"),
    "rank": (lambda: qk_norm_rope_jvp(T, M, None, None, PLAN), r"x: expected \[tokens, heads, head_dim\]"),
    "heads": (
        lambda: qk_norm_rope_jvp(H, D_H[:, :1], None, None, PLAN),
        r"d_x: expected shape \[1, 2, 8\], received \[1, 1, 8\]",
    ),
    "weight": (lambda: qk_norm_rope_jvp(H, D_H, T[0, :7], None, PLAN), r"weight: expected shape \[8\]"),
    "table of what moves": (
        lambda: qk_norm_rope_jvp(H, D_H, None, _table(1, 8, T), PLAN),
        "table: made for 1 tokens and head_dim 8, received 3",
    ),
    "row width": (lambda: qkv_norm_rope_jvp(T, M, 2, None, None, None, PLAN), "qkv: expected .* 3 "),
    "one weight of two": (
        lambda: qkv_norm_rope_jvp(T.repeat(1, 3), M.repeat(1, 3), 1, T[0], None, None, PLAN),
        "q weight and k weight: expected both or neither",
    ),
    "shift without tangent": (
        lambda: qkv_norm_rope_jvp(
            T.repeat(1, 3), M.repeat(1, 3), 1, None, None, None, PLAN, shift_SE=S.repeat(1, 3)
        ),
        "shift and d_shift: expected both or neither",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_arguments_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match="_jvp: .*" + message):
        call()


def test_an_op_with_nothing_to_do_hands_out_its_tangent():
    assert qk_norm_rope_jvp(H, D_H, None, None, PLAN) is D_H


def test_auto_takes_the_twin_on_the_cpu():
    swiglu_jvp(T, T, M, M, PLAN)
    assert path_taken("swiglu_jvp") == "torch"
