"""Attention and its tangent: bound by arithmetic, so the figure is TFLOP/s.

T queries, S segments, W width: N heads of H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from tim_kernels.bench.case import CAPTION, Case, Function, Inputs, NotHere, Spec
from tim_kernels.varlen_attention import (
    AttentionPlan,
    AttentionTangentPlan,
    use_attention_backend,
    varlen_attention,
    varlen_attention_jvp,
    varlen_attention_jvp_reference,
    varlen_attention_with_lse,
)
from tim_kernels.varlen_attention.backends import BACKENDS
from tim_kernels.varlen_attention.dense import dense_logsumexp

FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""Matrix products of queries and keys; the backward takes the logits anew."""
SELF_TANGENT_PRODUCTS, CROSS_TANGENT_PRODUCTS = 5, 3


def attention_cases(width: int, head_dim: int) -> Iterator[Case]:
    num_heads, bf16 = width // head_dim, torch.bfloat16
    heads = partial(_heads, num_heads=num_heads)
    for form, axis in (("self", "T"), ("cross", "L")):
        keys = {name: Spec(width, bf16, axis) for name in ("k", "v")}

        def forward(x: Inputs, plan: AttentionPlan) -> tuple[Tensor]:
            return (varlen_attention(heads(x["q"]), heads(x["k"]), heads(x["v"]), plan).flatten(1),)

        def definition(x: Inputs, plan: AttentionPlan) -> tuple[Tensor]:
            with use_attention_backend("dense"):
                return forward(x, plan)

        yield Case(
            "varlen_attention",
            f"bfloat16, {form}, {num_heads} heads of {head_dim}",
            {"q": Spec(width, bf16), **keys},
            forward,
            definition,
            "T",
            # q and result, and k and v where there is one a token.   Their gradients and all that is read.
            (8 if form == "self" else 4) * width,
            (16 if form == "self" else 8) * width,
            libraries={name: _backend(name, forward) for name in BACKENDS if name != "dense"},
            plan=partial(_plan, form=form),
            flops=partial(_flops, width=width, form=form, products=FORWARD_PRODUCTS),
            backward_per_forward=BACKWARD_PRODUCTS / FORWARD_PRODUCTS,
        )

    for form, with_lse in (("self", True), ("self", False), ("cross", True)):
        still = partial(Spec, gradient=False)
        axis, moving_keys = ("T", ("d_k", "d_v")) if form == "self" else ("L", ())
        specs = {name: still(width, bf16) for name in ("q", "d_q", "out", *moving_keys)}
        specs |= {name: still(width, bf16, axis) for name in ("k", "v")}
        if with_lse:
            specs["lse"] = still(num_heads)

        def tangent(x: Inputs, plan: AttentionTangentPlan) -> tuple[Tensor]:
            d_k, d_v = (heads(x[n]) if n in x else None for n in ("d_k", "d_v"))
            q, k, v, d_q, out = (heads(x[name]) for name in ("q", "k", "v", "d_q", "out"))
            out = varlen_attention_jvp(q, k, v, d_q, d_k, d_v, out, x.get("lse"), plan)
            return (out.flatten(1),)

        def tangent_twin(x: Inputs, plan: AttentionTangentPlan) -> tuple[Tensor]:
            d_k, d_v = (heads(x[n]) if n in x else None for n in ("d_k", "d_v"))
            q, k, v, d_q = (heads(x[name]) for name in ("q", "k", "v", "d_q"))
            scale = head_dim**-0.5
            return (varlen_attention_jvp_reference(q, k, v, d_q, d_k, d_v, plan, scale=scale).flatten(1),)

        yield Case(
            "varlen_attention_jvp",
            f"bfloat16, {form}, {num_heads} heads of {head_dim}" + (", logsumexp" if with_lse else ""),
            specs,
            tangent,
            tangent_twin,
            "T",
            # q, dq, output and result; k, v, dk and dv where there is one a token.   And logsumexp.
            (16 if form == "self" else 8) * width + (4 * num_heads if with_lse else 0),
            None,
            plan=partial(_tangent_plan, form=form),
            prepare=partial(_forward_results, num_heads=num_heads),
            flops=partial(
                _flops,
                width=width,
                form=form,
                products=SELF_TANGENT_PRODUCTS if form == "self" else CROSS_TANGENT_PRODUCTS,
            ),
        )


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(1, (num_heads, -1))


def _keys(lengths: Sequence[int], form: str) -> Sequence[int]:
    return lengths if form == "self" else [CAPTION] * len(lengths)


def _plan(lengths: Sequence[int], device: torch.device, form: str) -> AttentionPlan:
    return AttentionPlan.from_lengths(lengths, _keys(lengths, form), device=device)


def _tangent_plan(lengths: Sequence[int], device: torch.device, form: str) -> AttentionTangentPlan:
    return AttentionTangentPlan.from_lengths(lengths, _keys(lengths, form), device=device)


def _flops(lengths: Sequence[int], width: int, form: str, products: int) -> int:
    pairs = sum(n * m for n, m in zip(lengths, _keys(lengths, form), strict=True))
    return 2 * products * pairs * width


def _backend(name: str, forward: Function) -> Function:
    def run(x: Inputs, plan: AttentionPlan) -> tuple[Tensor, ...]:
        try:
            with use_attention_backend(name):
                return forward(x, plan)
        except ValueError as error:
            raise NotHere(str(error)) from error

    return run


@torch.no_grad()
def _forward_results(x: Inputs, plan: AttentionTangentPlan, num_heads: int) -> Inputs:
    """The output and, where it is asked for, the logsumexp that a forward leaves behind."""
    q, k, v = (_heads(x[name], num_heads) for name in "qkv")
    pack = plan.moving
    out, lse = varlen_attention_with_lse(q, k, v, pack)
    found = {"out": out.flatten(1)}
    if "lse" in x:
        if lse is None:
            # One segment at a time: the logits of a whole pack may not fit.
            pieces = zip(q.split(pack.lengths_q), k.split(pack.lengths_k), strict=True)
            lse = torch.cat([_logsumexp(a, b) for a, b in pieces])
        found["lse"] = lse
    return found


def _logsumexp(q: Tensor, k: Tensor) -> Tensor:
    plan = AttentionPlan.from_lengths([q.shape[0]], [k.shape[0]], device=q.device)
    return dense_logsumexp(q, k, plan.exact_groups, q.shape[-1] ** -0.5)
