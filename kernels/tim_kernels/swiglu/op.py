"""The op: checks, choice of path, autograd.

T rows (any number of leading axes), H columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tim_kernels import dispatch
from tim_kernels.checks import check_device, check_floating, check_shape, unit_column_stride
from tim_kernels.swiglu.reference import swiglu_reference

NAME = "swiglu"


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up.

    Shapes:
        gate, up, result: [..., H]. Row strides of matrices are free; columns that are apart cost a copy.
    Dtypes:
        one for all: float32, bfloat16 or float16 (float64 on the twin); arithmetic is float32.
    Derivatives:
        backward for both, keeping gate and up alone; forward mode through the twin.
    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    check_floating(NAME, {"gate": gate, "up": up})
    check_shape(NAME, "up", up, gate.shape)
    check_device(NAME, {"gate": gate, "up": up})
    if gate.dtype != up.dtype:
        raise ValueError(f"{NAME}: up: expected {gate.dtype} as gate is, received {up.dtype}")
    if dispatch.choose(NAME, (gate, up)) == "torch":
        return swiglu_reference(gate, up)
    return _SwiGLU.apply(_matrix(gate), _matrix(up)).reshape(gate.shape)  # type: ignore[union-attr]


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """SiLU of the first half of the columns times the second: [..., 2 H] -> [..., H].

    As `swiglu`; the gradient is written as one tensor, where two halves would be joined by a copy.
    """
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(
            f"{NAME}: gate_up: expected an even number of columns, received {list(gate_up.shape)}"
        )
    check_floating(NAME, {"gate_up": gate_up})
    if dispatch.choose(NAME, (gate_up,)) == "torch":
        return swiglu_reference(*gate_up.chunk(2, dim=-1))
    out = _PackedSwiGLU.apply(_matrix(gate_up))
    return out.reshape(*gate_up.shape[:-1], gate_up.shape[-1] // 2)  # type: ignore[union-attr]


def _matrix(x: Tensor) -> Tensor:
    return unit_column_stride(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TH: Tensor, up_TH: Tensor) -> Tensor:
        from tim_kernels.swiglu.kernel import launch_forward

        ctx.save_for_backward(gate_TH, up_TH)
        return launch_forward(gate_TH, up_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        from tim_kernels.swiglu.kernel import launch_backward

        gate_TH, up_TH = ctx.saved_tensors
        d_gate, d_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate_TH, up_TH))
        launch_backward(unit_column_stride(gradients[0]), gate_TH, up_TH, d_gate, d_up)
        return d_gate, d_up


class _PackedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        from tim_kernels.swiglu.kernel import launch_forward

        ctx.save_for_backward(gate_up)
        return launch_forward(*gate_up.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        from tim_kernels.swiglu.kernel import launch_backward

        (gate_up,) = ctx.saved_tensors
        d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        launch_backward(
            unit_column_stride(gradients[0]), *gate_up.chunk(2, dim=-1), *d_gate_up.chunk(2, dim=-1)
        )
        return d_gate_up
