"""The definition, in plain PyTorch: any floating dtype, forward mode, vmap and compilation included.

T tokens, S segments, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tim_kernels.tangent import gated_residual_tangent
from tim_kernels.tangent_plan import TangentPlan


def gated_residual_reference(x_TD: Tensor, branch_TD: Tensor, gate_SD: Tensor, segment_ids: Tensor) -> Tensor:
    """x + gate[s] * branch, in the dtype of x.

    Dtypes:
        arithmetic: float32, or float64 when x is.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    gated_TD = gate_SD.index_select(0, segment_ids) * branch_TD.to(wide)
    return (x_TD.to(wide) + gated_TD).to(x_TD.dtype)


def gated_residual_jvp_reference(
    d_x_TD: Tensor,
    branch_TD: Tensor,
    d_branch_TD: Tensor,
    gate_SD: Tensor,
    d_gate_SD: Tensor,
    plan: TangentPlan,
) -> Tensor:
    """The tangent, at the rows and segments of the values that move."""
    return gated_residual_tangent(
        d_x_TD,
        plan.rows_of(branch_TD),
        d_branch_TD,
        plan.segments_of(gate_SD),
        d_gate_SD,
        plan.segment_ids,
    )
