"""The tangent of the op: checks, choice of path.

T rows of the values, T' rows that move, H columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tim_kernels import dispatch
from tim_kernels.checks import check_device, check_floating, check_tangent_plan, unit_column_stride
from tim_kernels.swiglu.reference import swiglu_jvp_reference
from tim_kernels.tangent_plan import TangentPlan

NAME = "swiglu_jvp"


@torch.no_grad()
def swiglu_jvp(
    gate_TH: Tensor, up_TH: Tensor, d_gate_TH: Tensor, d_up_TH: Tensor, plan: TangentPlan | None = None
) -> Tensor:
    """Tangent of SiLU(gate) * up, in the dtype of the values.

    Shapes:
        gate, up: [T, H], of the whole pack.   d_gate, d_up, result: [T', H], of what moves. Row strides are
        free; columns that are apart cost a copy.
    Dtypes:
        gate and up: one of float32, bfloat16 or float16 (float64 on the twin); d_gate and d_up likewise.
        Arithmetic is float32.
    Args:
        plan: None where every row moves, in its place.
    Derivatives:
        none: the result has no gradient, and nothing is kept for a backward.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    tensors = {"gate": gate_TH, "up": up_TH, "d_gate": d_gate_TH, "d_up": d_up_TH}
    check_floating(NAME, tensors)
    check_device(NAME, tensors)
    if plan is not None:
        check_tangent_plan(NAME, plan, gate_TH, d_gate_TH)
    moving = gate_TH.shape[0] if plan is None else plan.num_moving_rows
    for name, x, rows in (
        ("up", up_TH, gate_TH.shape[0]),
        ("d_gate", d_gate_TH, moving),
        ("d_up", d_up_TH, moving),
    ):
        if x.ndim != 2 or tuple(x.shape) != (rows, gate_TH.shape[-1]):
            raise ValueError(
                f"{NAME}: {name}: expected shape [{rows}, {gate_TH.shape[-1]}], received {list(x.shape)}"
            )
    for name, first, second in (("up", gate_TH, up_TH), ("d_up", d_gate_TH, d_up_TH)):
        if first.dtype != second.dtype:
            raise ValueError(f"{NAME}: {name}: expected {first.dtype}, received {second.dtype}")
    if dispatch.choose(NAME, list(tensors.values())) == "torch":
        return swiglu_jvp_reference(gate_TH, up_TH, d_gate_TH, d_up_TH, plan)
    from tim_kernels.swiglu.jvp_kernel import launch_jvp

    rows = None if plan is None else plan.rows
    if isinstance(rows, slice):
        gate_TH, up_TH, rows = gate_TH[rows], up_TH[rows], None
    gate, up, d_gate, d_up = map(unit_column_stride, (gate_TH, up_TH, d_gate_TH, d_up_TH))
    return launch_jvp(gate, up, d_gate, d_up, rows)


def swiglu_packed_jvp(gate_up_TE: Tensor, d_gate_up_TE: Tensor, plan: TangentPlan | None = None) -> Tensor:
    """`swiglu_jvp` of the halves of packed tensors: [T, 2 H] and [T', 2 H] -> [T', H]."""
    for name, x in (("gate_up", gate_up_TE), ("d_gate_up", d_gate_up_TE)):
        if x.ndim != 2 or x.shape[1] % 2:
            raise ValueError(
                f"{NAME}: {name}: expected [rows, an even number of columns], received {list(x.shape)}"
            )
    (gate, up), (d_gate, d_up) = gate_up_TE.chunk(2, dim=1), d_gate_up_TE.chunk(2, dim=1)
    return swiglu_jvp(gate, up, d_gate, d_up, plan)
