"""The op: checks, choice of path, autograd.

T tokens, N heads, H head width, E width of a packed row, S segments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tim_kernels import dispatch
from tim_kernels.checks import (
    check_device,
    check_eps,
    check_floating,
    check_plan,
    check_shape,
    unit_column_stride,
)
from tim_kernels.chunks import ChunkPlan
from tim_kernels.qk_norm_rope.reference import packed_norm_rope_reference, qk_norm_rope_reference
from tim_kernels.qk_norm_rope.table import RotaryTable

if TYPE_CHECKING:
    from tim_kernels.qk_norm_rope.kernel import Layout

NAME = "qk_norm_rope"

Affine = tuple[Tensor, Tensor | None]
"""Weight [H] and bias [H] of a LayerNorm."""


def qk_norm_rope(
    x_TNH: Tensor,
    weight_H: Tensor | None,
    bias_H: Tensor | None,
    table: RotaryTable | None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm of every head with affine, then rotary positions; either may be absent.

    Shapes:
        x, result: [T, N, H], H a multiple of 4; the result is contiguous. The token stride of x is free;
        heads that are not adjacent cost a copy.
    Dtypes:
        x: float32, bfloat16 or float16 (float64 on the twin), as the result; weight and bias likewise.
        Arithmetic and the sums of the gradients are float32.
    Derivatives:
        backward for x, weight and bias, bitwise repeatable; forward mode through the twin. Saved: x.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    if x_TNH.ndim != 3:
        raise ValueError(f"{NAME}: x: expected [tokens, heads, head_dim], received {list(x_TNH.shape)}")
    check_eps(NAME, eps)
    _, num_heads, head_dim = x_TNH.shape
    norm = _affine(weight_H, bias_H)
    _check(x_TNH, (norm,), head_dim, table, None, None)
    if norm is None and table is None:
        return x_TNH
    if dispatch.choose(NAME, _tensors(x_TNH, (norm,), table, None)) == "triton":
        layout = _layout(num_heads, head_dim, 1, False)
        (out,) = _QkNormRope.apply(x_TNH, None, weight_H, bias_H, None, None, table, None, layout, eps)  # type: ignore[misc]
        return out
    return qk_norm_rope_reference(x_TNH, weight_H, bias_H, table, eps=eps)


def qkv_norm_rope(
    qkv_TE: Tensor,
    num_heads: int,
    q_norm: Affine | None,
    k_norm: Affine | None,
    table: RotaryTable | None,
    *,
    shift_SE: Tensor | None = None,
    plan: ChunkPlan | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of self-attention from one packed projection: shift, then q and k normalised and rotated.

    In one launch, and in one for the backward, which writes the gradient of the packed row in place of the
    concatenation that separate views would need.

    Shapes:
        qkv: [T, 3 N H], columns adjacent, q before k before v.   q, k, v: [T, N, H].
        shift: [S, 3 N H], added to the tokens of segment s; needs the plan, which else is not read.
    Dtypes:
        as `qk_norm_rope`; the shifted values are not rounded before the norm.
    Returns:
        (q, k, v). Without a shift, v is a view of qkv.
    Derivatives:
        as `qk_norm_rope`, for the shift too. Saved: qkv.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or only one of q and k has a norm.
    """
    q, k, v = _packed(qkv_TE, num_heads, (q_norm, k_norm), table, shift_SE, plan, eps)
    return q, k, v


def kv_norm_rope(
    kv_LE: Tensor,
    num_heads: int,
    k_norm: Affine | None,
    table: RotaryTable | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """k, v of cross-attention from one packed projection: k normalised (and rotated, if there is a table).

    Shapes:
        kv: [L, 2 N H], columns adjacent, k before v.   k, v: [L, N, H]; v is a view of kv.
    Dtypes, Derivatives, Raises:
        as `qkv_norm_rope`.
    """
    k, v = _packed(kv_LE, num_heads, (k_norm,), table, None, None, eps)
    return k, v


def _packed(
    packed_TE: Tensor,
    num_heads: int,
    norms: tuple[Affine | None, ...],
    table: RotaryTable | None,
    shift_SE: Tensor | None,
    plan: ChunkPlan | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """The normalised parts and a plain one after them."""
    check_eps(NAME, eps)
    num_parts = len(norms) + 1
    if packed_TE.ndim != 2 or packed_TE.shape[1] % (num_parts * num_heads):
        raise ValueError(
            f"{NAME}: packed row: expected [tokens, {num_parts} * {num_heads} heads * head_dim], "
            f"received {list(packed_TE.shape)}"
        )
    if len({norm is None for norm in norms}) > 1:
        raise ValueError(f"{NAME}: q_norm and k_norm: expected both or neither")
    head_dim = packed_TE.shape[1] // (num_parts * num_heads)
    _check(packed_TE, norms, head_dim, table, shift_SE, plan)
    has_work = norms[0] is not None or table is not None or shift_SE is not None
    if has_work and dispatch.choose(NAME, _tensors(packed_TE, norms, table, shift_SE)) == "triton":
        layout = _layout(num_heads, head_dim, len(norms), True)
        affine = [x for norm in norms for x in norm or (None, None)]
        affine += [None] * (4 - len(affine))
        return _QkNormRope.apply(packed_TE, shift_SE, *affine, table, plan, layout, eps)  # type: ignore[return-value]
    segment_ids = None if plan is None else plan.segment_ids
    return packed_norm_rope_reference(packed_TE, num_heads, norms, table, shift_SE, segment_ids, eps=eps)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift_SE: Tensor | None,
        first_weight: Tensor | None,
        first_bias: Tensor | None,
        second_weight: Tensor | None,
        second_bias: Tensor | None,
        table: RotaryTable | None,
        plan: ChunkPlan | None,
        layout: Layout,
        eps: float,
    ) -> tuple[Tensor, ...]:
        from tim_kernels.qk_norm_rope.kernel import launch_forward

        x_rows = adjacent_heads(x)
        shift_rows = None if shift_SE is None else unit_column_stride(shift_SE)
        affine = first_weight, first_bias, second_weight, second_bias
        outputs = launch_forward(x_rows, shift_rows, _norms(affine), table, plan, layout, eps)
        if len(outputs) < layout.num_parts:
            plain = x_rows[:, layout.num_normed * layout.part_size :]
            outputs.append(plain.unflatten(-1, (layout.num_heads, layout.head_dim)))
        ctx.table, ctx.plan, ctx.layout, ctx.eps = table, plan, layout, eps
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.shift_dtype = None if shift_SE is None else shift_SE.dtype
        # The rotation alone is linear: its backward needs no x.
        ctx.save_for_backward(None if first_weight is None else x_rows, shift_rows, *affine)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from tim_kernels.qk_norm_rope.kernel import launch_backward

        x_rows, shift_rows, *affine = ctx.saved_tensors
        d_x, sums, d_shift = launch_backward(
            [g.contiguous() for g in gradients],
            x_rows,
            shift_rows,
            _norms(affine),
            ctx.table,
            ctx.plan,
            ctx.layout,
            ctx.x_dtype,
            ctx.eps,
        )
        d_affine: list[Tensor | None] = [None] * 4
        if sums is not None:
            for i, parameter in enumerate(affine):
                if parameter is not None:
                    d_affine[i] = sums[i // 2, i % 2].to(parameter.dtype)
        if d_shift is not None:
            d_shift = d_shift.to(ctx.shift_dtype)
        return d_x.view(ctx.x_shape), d_shift, *d_affine, None, None, None, None


def _layout(num_heads: int, head_dim: int, num_normed: int, has_plain: bool) -> Layout:
    from tim_kernels.qk_norm_rope.kernel import Layout

    return Layout(num_heads, head_dim, num_normed, has_plain)


def adjacent_heads(x: Tensor) -> Tensor:
    """x itself when each row lies in one piece, whatever the stride between rows; else a copy."""
    in_one_piece = x.stride(-1) == 1 and (x.ndim == 2 or x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if in_one_piece else x.contiguous()


def _affine(weight_H: Tensor | None, bias_H: Tensor | None) -> Affine | None:
    if weight_H is None:
        if bias_H is not None:
            raise ValueError(f"{NAME}: bias: expected a weight with it")
        return None
    return weight_H, bias_H


def _norms(affine: Any) -> list[Affine]:
    first_weight, first_bias, second_weight, second_bias = affine
    pairs = (first_weight, first_bias), (second_weight, second_bias)
    return [pair for pair in pairs if pair[0] is not None]


def _tensors(
    x: Tensor, norms: tuple[Affine | None, ...], table: RotaryTable | None, shift: Tensor | None
) -> list[Tensor | None]:
    return [x, shift, None if table is None else table.cos, *(y for norm in norms for y in norm or ())]


def _check(
    x: Tensor,
    norms: tuple[Affine | None, ...],
    head_dim: int,
    table: RotaryTable | None,
    shift: Tensor | None,
    plan: ChunkPlan | None,
) -> None:
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"{NAME}: head_dim: expected a multiple of 4, received {head_dim}")
    tensors: dict[str, Tensor | None] = {"x": x}
    names = ("q", "k") if len(norms) == 2 else ("",)
    for name, norm in zip(names, norms, strict=True):
        for kind, value in zip(("weight", "bias"), norm or (), strict=False):
            full = f"{name} {kind}".strip()
            tensors[full] = value
            if value is not None:
                check_shape(NAME, full, value, (head_dim,))
    if table is not None:
        tensors["table"] = table.cos
        if (table.num_tokens, table.head_dim) != (x.shape[0], head_dim):
            raise ValueError(
                f"{NAME}: table: made for {table.num_tokens} tokens and head_dim {table.head_dim}, "
                f"received {x.shape[0]} tokens and head_dim {head_dim}"
            )
    if shift is not None:
        if plan is None:
            raise ValueError(f"{NAME}: plan: expected with a shift, received none")
        check_plan(NAME, plan, x)
        check_shape(NAME, "shift", shift, (plan.num_segments, x.shape[1]))
        tensors["shift"] = shift
    check_floating(NAME, tensors)
    check_device(NAME, tensors)
