"""Tangents of the row ops, with every row moving.

T tokens, S segments, D width, H hidden columns of the MLP or width of a head, N heads, P grid positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from tim_kernels.bench.case import NUM_POSITIONS, Case, Inputs, Spec
from tim_kernels.gated_residual import gated_residual_jvp, gated_residual_jvp_reference
from tim_kernels.modulated_layer_norm import modulated_layer_norm_jvp, modulated_layer_norm_jvp_reference
from tim_kernels.qk_norm_rope import (
    RotaryTable,
    packed_norm_rope_jvp_reference,
    qk_norm_rope_jvp,
    qk_norm_rope_jvp_reference,
    qkv_norm_rope_jvp,
)
from tim_kernels.swiglu import swiglu_jvp_reference, swiglu_packed_jvp
from tim_kernels.tangent_plan import TangentPlan

BF16 = torch.bfloat16
_still = partial(Spec, gradient=False)


def tangent_cases(width: int, hidden: int, head_dim: int) -> Iterator[Case]:
    yield from _norms(width)
    yield _residual(width)
    yield from _heads(width, head_dim)
    yield _swiglu(hidden)


def _plan(lengths: Sequence[int], device: torch.device) -> TangentPlan:
    return TangentPlan.from_lengths(lengths, device=device)


def _norms(width: int) -> Iterator[Case]:
    segment = {name: _still(width, axis="S") for name in ("scale", "d_shift", "d_scale")}
    joined = {name: _still(width, BF16) for name in ("branch", "d_branch")}
    joined |= {name: _still(width, axis="S") for name in ("gate", "d_gate")}

    def arguments(x: Inputs) -> tuple[Tensor | None, ...]:
        names = ("x", "d_x", "branch", "d_branch", "gate", "d_gate", "scale", "d_shift", "d_scale")
        return tuple(x.get(name) for name in names)

    def results(x: Inputs, both: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return both if "branch" in x else both[1:]

    def ours(x: Inputs, plan: TangentPlan) -> tuple[Tensor, ...]:
        return results(x, modulated_layer_norm_jvp(*arguments(x), plan, h_dtype=BF16))  # type: ignore[arg-type]

    def twin(x: Inputs, plan: TangentPlan) -> tuple[Tensor, ...]:
        h_dtype = torch.float64 if x["x"].dtype == torch.float64 else BF16
        both = modulated_layer_norm_jvp_reference(*arguments(x), plan, eps=1e-6, h_dtype=h_dtype)  # type: ignore[arg-type]
        return results(x, both)

    for label, stream, extra, moved in (
        # x' 4, branch 2, d_x 4, d_branch 2, d_x' 4, d_h 2.
        ("float32 stream, with residual", torch.float32, joined, 18),
        # x 4, d_x 4, d_h 2.
        ("float32 stream, norm only", torch.float32, {}, 10),
        # 2 for each of the six.
        ("bfloat16 stream, with residual", BF16, joined, 12),
    ):
        yield Case(
            "modulated_layer_norm_jvp",
            f"{label}, width {width}",
            {"x": _still(width, stream), "d_x": _still(width, stream), **extra, **segment},
            ours,
            twin,
            "T",
            moved * width,
            None,
            plan=_plan,
        )


def _residual(width: int) -> Case:
    def arguments(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return x["d_x"], x["branch"], x["d_branch"], x["gate"], x["d_gate"]

    specs = {"d_x": _still(width), "branch": _still(width, BF16), "d_branch": _still(width, BF16)}
    return Case(
        "gated_residual_jvp",
        f"float32 stream, width {width}",
        specs | {name: _still(width, axis="S") for name in ("gate", "d_gate")},
        lambda x, plan: (gated_residual_jvp(*arguments(x), plan),),
        lambda x, plan: (gated_residual_jvp_reference(*arguments(x), plan),),
        "T",
        # d_x 4, branch 2, d_branch 2, result 4.
        12 * width,
        None,
        plan=_plan,
    )


def _heads(width: int, head_dim: int) -> Iterator[Case]:
    num_heads = width // head_dim
    shared = {name: _still(head_dim // 4, axis=NUM_POSITIONS) for name in ("cos", "sin")}
    shared |= {name: _still(None, torch.int32) for name in ("a", "b")}
    weights = {name: _still(None, axis=head_dim) for name in ("q weight", "k weight")}

    def table(x: Inputs) -> RotaryTable:
        return RotaryTable(x["cos"], x["sin"], x["a"], x["b"])

    def packed(x: Inputs, plan: TangentPlan) -> tuple[Tensor, ...]:
        pair, shifts = (x["q weight"], x["k weight"]), (x.get("shift"), x.get("d_shift"))
        d_q, d_k, d_v = qkv_norm_rope_jvp(
            x["x"], x["d_x"], num_heads, *pair, table(x), plan, shift_SE=shifts[0], d_shift_SE=shifts[1]
        )
        return d_q, d_k, d_v

    def packed_twin(x: Inputs, plan: TangentPlan) -> tuple[Tensor, ...]:
        pair, shifts = (x["q weight"], x["k weight"]), (x.get("shift"), x.get("d_shift"))
        return packed_norm_rope_jvp_reference(
            x["x"], x["d_x"], num_heads, pair, table(x), *shifts, plan, eps=1e-5
        )

    def heads(x: Inputs) -> tuple[Tensor, Tensor]:
        return x["x"].unflatten(1, (num_heads, -1)), x["d_x"].unflatten(1, (num_heads, -1))

    for label, shifts, moved in (
        # q and k 4, their tangents and v's 6, results 6.
        ("q, k, v with shift", {n: _still(3 * width, axis="S") for n in ("shift", "d_shift")}, 16),
        # q and k 4, their tangents 4, results 4.
        ("q, k, v", {}, 12),
    ):
        yield Case(
            "qk_norm_rope_jvp",
            f"bfloat16, {label}, {num_heads} heads of {head_dim}",
            {n: _still(3 * width, BF16) for n in ("x", "d_x")} | weights | shared | shifts,
            packed,
            packed_twin,
            "T",
            moved * width,
            None,
            plan=_plan,
        )
    yield Case(
        "qk_norm_rope_jvp",
        f"bfloat16, q, {num_heads} heads of {head_dim}",
        {n: _still(width, BF16) for n in ("x", "d_x")} | {"q weight": weights["q weight"]} | shared,
        lambda x, plan: (qk_norm_rope_jvp(*heads(x), x["q weight"], table(x), plan),),
        lambda x, plan: (qk_norm_rope_jvp_reference(*heads(x), x["q weight"], table(x), plan, eps=1e-5),),
        "T",
        # q 2, its tangent 2, result 2.
        6 * width,
        None,
        plan=_plan,
    )


def _swiglu(hidden: int) -> Case:
    def twin(x: Inputs, plan: TangentPlan) -> tuple[Tensor]:
        (gate, up), (d_gate, d_up) = x["gate_up"].chunk(2, 1), x["d_gate_up"].chunk(2, 1)
        return (swiglu_jvp_reference(gate, up, d_gate, d_up, plan),)

    return Case(
        "swiglu_jvp",
        f"bfloat16, packed, hidden {hidden}",
        {name: _still(2 * hidden, BF16) for name in ("gate_up", "d_gate_up")},
        lambda x, plan: (swiglu_packed_jvp(x["gate_up"], x["d_gate_up"], plan),),
        twin,
        "T",
        # gate and up 4, their tangents 4, result 2.
        10 * hidden,
        None,
        plan=_plan,
    )
