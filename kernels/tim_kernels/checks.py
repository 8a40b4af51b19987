"""Argument checks shared by the ops. Every message names the op and the argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tim_kernels.chunks import ChunkPlan
from tim_kernels.tangent_plan import TangentPlan


def check_shape(op: str, name: str, x: Tensor, expected: Sequence[int]) -> None:
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{op}: {name}: expected shape {list(expected)}, received {list(x.shape)}")


def check_floating(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{op}: {name}: expected a floating-point tensor, received {x.dtype}")


def check_device(op: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raises ValueError unless all tensors are on the device of the first."""
    present = {name: x for name, x in tensors.items() if x is not None}
    first, *others = present
    for name in others:
        if present[name].device != present[first].device:
            raise ValueError(
                f"{op}: {name}: expected on {present[first].device} as {first} is, "
                f"received on {present[name].device}"
            )


def check_plan(op: str, plan: ChunkPlan, rows_of: Tensor) -> None:
    """Raises ValueError unless the plan describes `rows_of` and lies on its device."""
    if plan.num_rows != rows_of.shape[0]:
        raise ValueError(f"{op}: plan: made for {plan.num_rows} rows, received {rows_of.shape[0]}")
    if plan.chunks.device != rows_of.device:
        raise ValueError(
            f"{op}: plan: expected on {rows_of.device}, received on {plan.chunks.device}; move it with .to()"
        )


def check_tangent_plan(op: str, plan: TangentPlan, values: Tensor | None, tangents: Tensor) -> None:
    """Raises ValueError unless the plan describes the rows of the values and of the tangents."""
    if values is not None and plan.num_rows != values.shape[0]:
        raise ValueError(f"{op}: plan: made for {plan.num_rows} rows, received {values.shape[0]}")
    if plan.num_moving_rows != tangents.shape[0]:
        raise ValueError(
            f"{op}: plan: made for {plan.num_moving_rows} rows that move, received {tangents.shape[0]}"
        )
    if plan.chunks.device != tangents.device:
        raise ValueError(f"{op}: plan: expected on {tangents.device}, received on {plan.chunks.device}")


def check_eps(op: str, eps: float) -> None:
    """Raises ValueError unless it keeps lanes that hold nothing, whose variance is 0, from dividing by 0."""
    if not eps > 0:
        raise ValueError(f"{op}: eps: expected above 0, received {eps}")


def unit_column_stride(x: Tensor) -> Tensor:
    """x itself when its columns are adjacent in memory, whatever its row stride; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
