"""The tangent of the op: checks, choice of path.

T rows of the pack, T' rows that move, S and S' segments, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tim_kernels import dispatch
from tim_kernels.checks import check_device, check_floating, check_shape, check_tangent_plan
from tim_kernels.gated_residual.reference import gated_residual_jvp_reference
from tim_kernels.tangent_plan import TangentPlan

NAME = "gated_residual_jvp"


@torch.no_grad()
def gated_residual_jvp(
    d_x_TD: Tensor,
    branch_TD: Tensor,
    d_branch_TD: Tensor,
    gate_SD: Tensor,
    d_gate_SD: Tensor,
    plan: TangentPlan,
) -> Tensor:
    """Tangent of x + gate[s] * branch: d_x + d_gate * branch + gate * d_branch, in the dtype of d_x.

    Shapes:
        branch: [T, D], gate: [S, D], of the whole pack.   d_x, d_branch, result: [T', D], d_gate: [S', D],
        of what moves. Row strides are free; columns that are apart cost a copy.
    Dtypes:
        each float32, bfloat16 or float16 (float64 on the twin); arithmetic is float32.
    Derivatives:
        none: the result has no gradient, and nothing is kept for a backward.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    if d_x_TD.ndim != 2 or d_x_TD.shape[1] == 0:
        raise ValueError(f"{NAME}: d_x: expected [rows that move, width], received {list(d_x_TD.shape)}")
    width = d_x_TD.shape[1]
    check_shape(NAME, "branch", branch_TD, (plan.num_rows, width))
    check_tangent_plan(NAME, plan, branch_TD, d_x_TD)
    check_shape(NAME, "d_branch", d_branch_TD, d_x_TD.shape)
    check_shape(NAME, "gate", gate_SD, (plan.num_segments, width))
    check_shape(NAME, "d_gate", d_gate_SD, (plan.num_moving_segments, width))
    tensors = {
        "d_x": d_x_TD, "branch": branch_TD, "d_branch": d_branch_TD, "gate": gate_SD, "d_gate": d_gate_SD
    }  # fmt: skip
    check_floating(NAME, tensors)
    check_device(NAME, tensors)
    if dispatch.choose(NAME, list(tensors.values())) == "triton":
        from tim_kernels.gated_residual.jvp_kernel import launch_jvp

        return launch_jvp(d_x_TD, branch_TD, d_branch_TD, gate_SD, d_gate_SD, plan)
    return gated_residual_jvp_reference(d_x_TD, branch_TD, d_branch_TD, gate_SD, d_gate_SD, plan)
