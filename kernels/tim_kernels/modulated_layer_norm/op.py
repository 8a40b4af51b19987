"""The op: checks, choice of path, autograd.

T tokens, S segments, D width, K chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tim_kernels import dispatch
from tim_kernels.checks import check_device, check_floating, check_plan, check_shape
from tim_kernels.chunks import ChunkPlan
from tim_kernels.modulated_layer_norm.reference import modulated_layer_norm_reference

NAME = "modulated_layer_norm"


def modulated_layer_norm(
    x_TD: Tensor,
    branch_TD: Tensor | None,
    gate_SD: Tensor | None,
    shift_SD: Tensor,
    scale_SD: Tensor,
    plan: ChunkPlan,
    *,
    eps: float = 1e-6,
    h_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the previous branch through its gate, normalise, modulate.

    x' = x + gate[s] * branch;  h = LayerNorm(x') * (1 + scale[s]) + shift[s]; the norm without affine.

    Shapes:
        x, branch, x', h: [T, D].   gate, shift, scale: [S, D]. Row strides are free; columns that are not
        adjacent cost a copy. Widths and row strides divisible by 16 give 128-bit loads.
    Dtypes:
        x, branch, h: float32, bfloat16 or float16 (float64 on the twin); gate, shift, scale likewise.
        Arithmetic and the sums of the gradients are float32.
    Args:
        h_dtype: dtype of h; x's when not given.
    Returns:
        (x', h); x' in the dtype of x. Without a branch, x' is x.
    Derivatives:
        backward for all five tensors, bitwise repeatable; forward mode through the twin.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    h_dtype = x_TD.dtype if h_dtype is None else h_dtype
    _check(x_TD, branch_TD, gate_SD, shift_SD, scale_SD, plan)
    if dispatch.choose(NAME, (x_TD, branch_TD, gate_SD, shift_SD, scale_SD)) == "triton":
        return _ModulatedLayerNorm.apply(x_TD, branch_TD, gate_SD, shift_SD, scale_SD, plan, eps, h_dtype)  # type: ignore[return-value]
    return modulated_layer_norm_reference(
        x_TD, branch_TD, gate_SD, shift_SD, scale_SD, plan.segment_ids, eps=eps, h_dtype=h_dtype
    )


class _ModulatedLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        branch_TD: Tensor | None,
        gate_SD: Tensor | None,
        shift_SD: Tensor,
        scale_SD: Tensor,
        plan: ChunkPlan,
        eps: float,
        h_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        from tim_kernels.modulated_layer_norm.kernel import launch_forward

        x_new, h, statistics = launch_forward(
            x_TD, branch_TD, gate_SD, shift_SD, scale_SD, plan, eps, h_dtype
        )
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.h_dtype, ctx.shift_dtype = plan, h_dtype, shift_SD.dtype
        ctx.save_for_backward(x_new, branch_TD, gate_SD, scale_SD, statistics)
        return x_new, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        from tim_kernels.modulated_layer_norm.kernel import launch_backward

        d_x_new, d_h = gradients
        x_new, branch_TD, gate_SD, scale_SD, statistics = ctx.saved_tensors
        if d_h is None:
            d_h = torch.zeros(x_new.shape, dtype=ctx.h_dtype, device=x_new.device)
        d_x, d_branch, sums = launch_backward(
            d_h, d_x_new, x_new, branch_TD, gate_SD, scale_SD, statistics, ctx.plan
        )
        d_gate = None if gate_SD is None else sums[:, 2].to(gate_SD.dtype)
        d_shift, d_scale = sums[:, 0].to(ctx.shift_dtype), sums[:, 1].to(scale_SD.dtype)
        return d_x, d_branch, d_gate, d_shift, d_scale, None, None, None


def _check(
    x_TD: Tensor,
    branch_TD: Tensor | None,
    gate_SD: Tensor | None,
    shift_SD: Tensor,
    scale_SD: Tensor,
    plan: ChunkPlan,
) -> None:
    if (branch_TD is None) != (gate_SD is None):
        raise ValueError(f"{NAME}: branch and gate: expected both or neither")
    if x_TD.ndim != 2 or x_TD.shape[1] == 0:
        raise ValueError(f"{NAME}: x: expected [tokens, width], received {list(x_TD.shape)}")
    check_plan(NAME, plan, x_TD)
    if branch_TD is not None:
        check_shape(NAME, "branch", branch_TD, x_TD.shape)
    modulation = {"gate": gate_SD, "shift": shift_SD, "scale": scale_SD}
    for name, value in modulation.items():
        if value is not None:
            check_shape(NAME, name, value, (plan.num_segments, x_TD.shape[1]))
    tensors = {"x": x_TD, "branch": branch_TD, **modulation}
    check_floating(NAME, tensors)
    check_device(NAME, tensors)
