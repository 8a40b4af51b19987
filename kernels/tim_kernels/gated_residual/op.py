"""The op: checks, choice of path, autograd.

T tokens, S segments, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tim_kernels import dispatch
from tim_kernels.checks import check_device, check_floating, check_plan, check_shape
from tim_kernels.chunks import ChunkPlan
from tim_kernels.gated_residual.reference import gated_residual_reference

NAME = "gated_residual"


def gated_residual(x_TD: Tensor, branch_TD: Tensor, gate_SD: Tensor, plan: ChunkPlan) -> Tensor:
    """x + gate[s] * branch, in the dtype of the residual stream x.

    For the end of a network or of a piece that is checkpointed; where a norm follows, `modulated_layer_norm`
    takes the residual along.

    Shapes:
        x, branch, result: [T, D].   gate: [S, D]. Row strides are free; columns that are apart cost a copy.
    Dtypes:
        each float32, bfloat16 or float16 (float64 on the twin); arithmetic and the sums for the gate float32.
    Derivatives:
        backward for all three, bitwise repeatable, keeping the branch; forward mode through the twin.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    _check(x_TD, branch_TD, gate_SD, plan)
    if dispatch.choose(NAME, (x_TD, branch_TD, gate_SD)) == "triton":
        return _GatedResidual.apply(x_TD, branch_TD, gate_SD, plan)  # type: ignore[return-value]
    return gated_residual_reference(x_TD, branch_TD, gate_SD, plan.segment_ids)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, branch_TD: Tensor, gate_SD: Tensor, plan: ChunkPlan) -> Tensor:
        from tim_kernels.gated_residual.kernel import launch_forward

        ctx.plan = plan
        ctx.save_for_backward(branch_TD, gate_SD)
        return launch_forward(x_TD, branch_TD, gate_SD, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from tim_kernels.gated_residual.kernel import launch_backward

        branch_TD, gate_SD = ctx.saved_tensors
        d_branch, d_gate = launch_backward(gradients[0], branch_TD, gate_SD, ctx.plan)
        return gradients[0], d_branch, d_gate.to(gate_SD.dtype), None


def _check(x_TD: Tensor, branch_TD: Tensor, gate_SD: Tensor, plan: ChunkPlan) -> None:
    if x_TD.ndim != 2 or x_TD.shape[1] == 0:
        raise ValueError(f"{NAME}: x: expected [tokens, width], received {list(x_TD.shape)}")
    check_plan(NAME, plan, x_TD)
    check_shape(NAME, "branch", branch_TD, x_TD.shape)
    check_shape(NAME, "gate", gate_SD, (plan.num_segments, x_TD.shape[1]))
    tensors = {"x": x_TD, "branch": branch_TD, "gate": gate_SD}
    check_floating(NAME, tensors)
    check_device(NAME, tensors)
