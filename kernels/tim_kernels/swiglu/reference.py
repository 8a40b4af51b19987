"""The definition, in plain PyTorch: any floating dtype, forward mode, vmap and compilation included."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor

from tim_kernels.tangent import swiglu_tangent
from tim_kernels.tangent_plan import TangentPlan


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, in the dtype of the arguments (in 16 bits it rounds twice, the kernel once)."""
    return nnf.silu(gate) * up


def swiglu_jvp_reference(
    gate_TH: Tensor, up_TH: Tensor, d_gate_TH: Tensor, d_up_TH: Tensor, plan: TangentPlan | None
) -> Tensor:
    """The tangent, at the rows of the values that move."""
    if plan is not None:
        gate_TH, up_TH = plan.rows_of(gate_TH), plan.rows_of(up_TH)
    return swiglu_tangent(gate_TH, up_TH, d_gate_TH, d_up_TH)
