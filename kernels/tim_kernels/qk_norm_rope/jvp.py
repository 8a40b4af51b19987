"""The tangent of the op: checks, choice of path.

T rows of the pack, T' rows that move, N heads, H head width, E width of a packed row, S and S' segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tim_kernels import dispatch
from tim_kernels.checks import (
    check_device,
    check_floating,
    check_shape,
    check_tangent_plan,
    unit_column_stride,
)
from tim_kernels.qk_norm_rope.op import adjacent_heads
from tim_kernels.qk_norm_rope.reference import packed_norm_rope_jvp_reference, qk_norm_rope_jvp_reference
from tim_kernels.qk_norm_rope.table import RotaryTable
from tim_kernels.tangent_plan import TangentPlan

NAME = "qk_norm_rope_jvp"


@torch.no_grad()
def qk_norm_rope_jvp(
    x_TNH: Tensor,
    d_x_TNH: Tensor,
    weight_H: Tensor | None,
    table: RotaryTable | None,
    plan: TangentPlan,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Tangent of `qk_norm_rope` at x, the heads before their norm: [T', N, H] in the dtype of d_x.

    A bias does not change it. Without a norm and a table, it is d_x.

    Shapes:
        x: [T, N, H], of the whole pack, as is the table.   d_x: [T', N, H], of what moves. H is a multiple
        of 4. Token strides are free; heads that are not adjacent cost a copy.
    Dtypes:
        each float32, bfloat16 or float16 (float64 on the twin); arithmetic is float32.
    Derivatives:
        none: the result has no gradient, and nothing is kept for a backward.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    if x_TNH.ndim != 3:
        raise ValueError(f"{NAME}: x: expected [tokens, heads, head_dim], received {list(x_TNH.shape)}")
    _, num_heads, head_dim = x_TNH.shape
    check_shape(NAME, "d_x", d_x_TNH, (plan.num_moving_rows, num_heads, head_dim))
    weights = {"weight": weight_H}
    _check(x_TNH, d_x_TNH, weights, head_dim, table, None, None, plan)
    if weight_H is None and table is None:
        return d_x_TNH
    if dispatch.choose(NAME, _tensors(x_TNH, d_x_TNH, weights, table)) == "triton":
        (out,) = _launch(x_TNH, d_x_TNH, (weight_H,), table, None, None, plan, num_heads, False, eps)
        return out
    return qk_norm_rope_jvp_reference(x_TNH, d_x_TNH, weight_H, table, plan, eps=eps)


@torch.no_grad()
def qkv_norm_rope_jvp(
    qkv_TE: Tensor,
    d_qkv_TE: Tensor,
    num_heads: int,
    q_weight_H: Tensor | None,
    k_weight_H: Tensor | None,
    table: RotaryTable | None,
    plan: TangentPlan,
    *,
    shift_SE: Tensor | None = None,
    d_shift_SE: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tangents of (q, k, v) of `qkv_norm_rope` at the packed projection that it was given.

    Shapes:
        qkv: [T, 3 N H], shift: [S, 3 N H], of the whole pack, as is the table.   d_qkv: [T', 3 N H],
        d_shift: [S', 3 N H], of what moves.   d_q, d_k, d_v: [T', N, H].
    Dtypes:
        as `qk_norm_rope_jvp`; shifted values and tangents are not rounded before the norm.
    Returns:
        (d_q, d_k, d_v) in the dtype of d_qkv. Without a shift, d_v is a view of d_qkv.
    Derivatives:
        none: the results have no gradient, and nothing is kept for a backward.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or only one of a pair is given.
    """
    if qkv_TE.ndim != 2 or qkv_TE.shape[1] % (3 * num_heads):
        raise ValueError(
            f"{NAME}: qkv: expected [tokens, 3 * {num_heads} heads * head_dim], received {list(qkv_TE.shape)}"
        )
    if (q_weight_H is None) != (k_weight_H is None):
        raise ValueError(f"{NAME}: q weight and k weight: expected both or neither")
    if (shift_SE is None) != (d_shift_SE is None):
        raise ValueError(f"{NAME}: shift and d_shift: expected both or neither")
    head_dim = qkv_TE.shape[1] // (3 * num_heads)
    check_shape(NAME, "d_qkv", d_qkv_TE, (plan.num_moving_rows, qkv_TE.shape[1]))
    weights = {"q weight": q_weight_H, "k weight": k_weight_H}
    _check(qkv_TE, d_qkv_TE, weights, head_dim, table, shift_SE, d_shift_SE, plan)
    has_work = q_weight_H is not None or table is not None or shift_SE is not None
    tensors = [*_tensors(qkv_TE, d_qkv_TE, weights, table), shift_SE, d_shift_SE]
    pair = (q_weight_H, k_weight_H)
    if has_work and dispatch.choose(NAME, tensors) == "triton":
        d_q, d_k, d_v = _launch(
            qkv_TE, d_qkv_TE, pair, table, shift_SE, d_shift_SE, plan, num_heads, True, eps
        )
    else:
        d_q, d_k, d_v = packed_norm_rope_jvp_reference(
            qkv_TE, d_qkv_TE, num_heads, pair, table, shift_SE, d_shift_SE, plan, eps=eps
        )
    return d_q, d_k, d_v


def _launch(
    x: Tensor,
    d_x: Tensor,
    weights: tuple[Tensor | None, ...],
    table: RotaryTable | None,
    shift_SE: Tensor | None,
    d_shift_SE: Tensor | None,
    plan: TangentPlan,
    num_heads: int,
    has_plain: bool,
    eps: float,
) -> list[Tensor]:
    from tim_kernels.qk_norm_rope.jvp_kernel import launch_jvp
    from tim_kernels.qk_norm_rope.kernel import Layout

    head_dim = x.shape[-1] if x.ndim == 3 else x.shape[1] // (3 * num_heads)
    layout = Layout(num_heads, head_dim, len(weights), has_plain)
    d_rows = adjacent_heads(d_x)
    outputs = launch_jvp(
        d_rows,
        None if d_shift_SE is None else unit_column_stride(d_shift_SE),
        adjacent_heads(x),
        None if shift_SE is None else unit_column_stride(shift_SE),
        [w for w in weights if w is not None],
        table,
        plan,
        layout,
        eps,
    )
    if len(outputs) < layout.num_parts:
        plain = d_rows[:, layout.num_normed * layout.part_size :]
        outputs.append(plain.unflatten(-1, (num_heads, head_dim)))
    return outputs


def _tensors(
    x: Tensor, d_x: Tensor, weights: dict[str, Tensor | None], table: RotaryTable | None
) -> list[Tensor | None]:
    return [x, d_x, *weights.values(), None if table is None else table.cos]


def _check(
    x: Tensor,
    d_x: Tensor,
    weights: dict[str, Tensor | None],
    head_dim: int,
    table: RotaryTable | None,
    shift: Tensor | None,
    d_shift: Tensor | None,
    plan: TangentPlan,
) -> None:
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"{NAME}: head_dim: expected a multiple of 4, received {head_dim}")
    check_tangent_plan(NAME, plan, x, d_x)
    for name, weight in weights.items():
        if weight is not None:
            check_shape(NAME, name, weight, (head_dim,))
    if table is not None and (table.num_tokens, table.head_dim) != (x.shape[0], head_dim):
        raise ValueError(
            f"{NAME}: table: made for {table.num_tokens} tokens and head_dim {table.head_dim}, "
            f"received {x.shape[0]} tokens and head_dim {head_dim}"
        )
    for name, value, segments in (
        ("shift", shift, plan.num_segments),
        ("d_shift", d_shift, plan.num_moving_segments),
    ):
        if value is not None:
            check_shape(NAME, name, value, (segments, x.shape[1]))
    tensors = {"x": x, "d_x": d_x, **weights, "table": None if table is None else table.cos}
    tensors |= {"shift": shift, "d_shift": d_shift}
    check_floating(NAME, tensors)
    check_device(NAME, tensors)
