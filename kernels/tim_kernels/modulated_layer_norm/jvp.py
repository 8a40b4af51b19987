"""The tangent of the op: checks, choice of path.

T rows of the pack, T' rows that move, S and S' segments, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tim_kernels import dispatch
from tim_kernels.checks import check_device, check_floating, check_shape, check_tangent_plan
from tim_kernels.modulated_layer_norm.reference import modulated_layer_norm_jvp_reference
from tim_kernels.tangent_plan import TangentPlan

NAME = "modulated_layer_norm_jvp"


@torch.no_grad()
def modulated_layer_norm_jvp(
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
    eps: float = 1e-6,
    h_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Tangents of (x', h) of `modulated_layer_norm`, from the x' that it returned.

    d_x' = d_x + d_gate[s] branch + gate[s] d_branch;  d_h = d(LayerNorm(x') (1 + scale[s]) + shift[s]).

    Shapes:
        x (which is x'), branch: [T, D], gate, scale: [S, D], of the whole pack.   d_x, d_branch, results:
        [T', D], d_gate, d_shift, d_scale: [S', D], of what moves. Row strides are free; columns that are
        apart cost a copy.
    Dtypes:
        each float32, bfloat16 or float16 (float64 on the twin); arithmetic is float32.
    Args:
        branch, d_branch, gate, d_gate: None together where no branch was added.
        h_dtype: dtype of d_h; d_x's when not given.
    Returns:
        (d_x', d_h); d_x' in the dtype of d_x. Without a branch, d_x' is d_x.
    Derivatives:
        none: the results have no gradient, and nothing is kept for a backward.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    optional = {"branch": branch_TD, "d_branch": d_branch_TD, "gate": gate_SD, "d_gate": d_gate_SD}
    if len({x is None for x in optional.values()}) > 1:
        raise ValueError(f"{NAME}: {', '.join(optional)}: expected all or none")
    if x_TD.ndim != 2 or x_TD.shape[1] == 0:
        raise ValueError(f"{NAME}: x: expected [tokens, width], received {list(x_TD.shape)}")
    width = x_TD.shape[1]
    check_tangent_plan(NAME, plan, x_TD, d_x_TD)
    value_segments, moving_segments = (plan.num_segments, width), (plan.num_moving_segments, width)
    moving_rows = (plan.num_moving_rows, width)
    expected = {"d_x": moving_rows, "branch": x_TD.shape, "d_branch": moving_rows, "gate": value_segments}
    expected |= {"d_gate": moving_segments, "scale": value_segments}
    expected |= {"d_shift": moving_segments, "d_scale": moving_segments}
    tensors = {"x": x_TD, "d_x": d_x_TD, **optional}
    tensors |= {"scale": scale_SD, "d_shift": d_shift_SD, "d_scale": d_scale_SD}
    for name, shape in expected.items():
        x = tensors[name]
        if x is not None:
            check_shape(NAME, name, x, shape)
    check_floating(NAME, tensors)
    check_device(NAME, tensors)
    h_dtype = d_x_TD.dtype if h_dtype is None else h_dtype
    arguments = x_TD, d_x_TD, branch_TD, d_branch_TD, gate_SD, d_gate_SD, scale_SD, d_shift_SD, d_scale_SD
    if dispatch.choose(NAME, arguments) == "triton":
        from tim_kernels.modulated_layer_norm.jvp_kernel import launch_jvp

        return launch_jvp(*arguments, plan, eps, h_dtype)
    return modulated_layer_norm_jvp_reference(*arguments, plan, eps=eps, h_dtype=h_dtype)
