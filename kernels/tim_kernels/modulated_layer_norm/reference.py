"""The definition, in plain PyTorch: any floating dtype, forward mode, vmap and compilation included.

T tokens, S segments, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tim_kernels.gated_residual.reference import gated_residual_jvp_reference, gated_residual_reference
from tim_kernels.tangent import modulated_layer_norm_tangent
from tim_kernels.tangent_plan import TangentPlan


def modulated_layer_norm_reference(
    x_TD: Tensor,
    branch_TD: Tensor | None,
    gate_SD: Tensor | None,
    shift_SD: Tensor,
    scale_SD: Tensor,
    segment_ids: Tensor,
    *,
    eps: float,
    h_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate[s] * branch;  h = LayerNorm(x') * (1 + scale[s]) + shift[s].

    Dtypes:
        arithmetic: float32, or float64 when x is. x' is rounded to the dtype of x before it is normalised.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    if branch_TD is not None and gate_SD is not None:
        x_TD = gated_residual_reference(x_TD, branch_TD, gate_SD, segment_ids)
    normal_TD = nnf.layer_norm(x_TD.to(wide), (x_TD.shape[-1],), eps=eps)
    factor_TD, shift_TD = (x.index_select(0, segment_ids) for x in (1 + scale_SD, shift_SD))
    return x_TD, (normal_TD * factor_TD + shift_TD).to(h_dtype)


def modulated_layer_norm_jvp_reference(
    x_TD: Tensor,
    d_x_TD: Tensor,
    branch_TD: Tensor | None,
    d_branch_TD: Tensor | None,
    gate_SD: Tensor | None,
    d_gate_SD: Tensor | None,
    scale_SD: Tensor,
    d_shift_SD: Tensor,
    d_scale_SD: Tensor,
    plan: TangentPlan,
    *,
    eps: float,
    h_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Tangents of (x', h); x is x'. d_x' is rounded to the dtype of d_x before the norm carries it."""
    if branch_TD is not None and d_branch_TD is not None and gate_SD is not None and d_gate_SD is not None:
        d_x_TD = gated_residual_jvp_reference(d_x_TD, branch_TD, d_branch_TD, gate_SD, d_gate_SD, plan)
    d_h_TD = modulated_layer_norm_tangent(
        plan.rows_of(x_TD),
        d_x_TD,
        plan.segments_of(scale_SD),
        d_shift_SD,
        d_scale_SD,
        plan.segment_ids,
        eps=eps,
        h_dtype=h_dtype,
    )
    return d_x_TD, d_h_TD
