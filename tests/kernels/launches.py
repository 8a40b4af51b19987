"""What the ops hand to Triton: every launch of a forward and backward at the shipped widths, recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tim_kernels import (
    AttentionTangentPlan,
    ChunkPlan,
    TangentPlan,
    TargetCoefficients,
    gated_residual,
    gated_residual_jvp,
    modulated_layer_norm,
    modulated_layer_norm_jvp,
    qk_norm_rope_jvp,
    qkv_norm_rope_jvp,
    swiglu,
    swiglu_jvp,
    swiglu_packed,
    swiglu_packed_jvp,
    transition_loss,
    use_path,
    varlen_attention_jvp,
)
from tim_kernels.qk_norm_rope import RotaryTable, kv_norm_rope, qk_norm_rope, qkv_norm_rope
from tim_kernels.shipped import LOSS_FORMS, Variant, variants

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


@dataclass(frozen=True)
class Launch:
    """tensors: the arguments in memory.  numbers: lengths, strides and the like.  constants: compile-time
    values, and None for absent tensors."""

    kernel: Any
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    grid: tuple[int, ...]

    @classmethod
    def of(cls, kernel: Any, args: Any, grid: Any, options: dict[str, Any]) -> Launch:
        """From what `kernel.run` is called with."""
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        tensors = {n: x for n, x in given.items() if isinstance(x, Tensor)}
        constants = {n: given[n] for n in kernel.arg_names if given[n] is None or n.isupper()}
        numbers = {n: given[n] for n in kernel.arg_names if n not in tensors and n not in constants}
        return cls(kernel, tensors, numbers, constants, options["num_warps"], tuple(grid))

    @property
    def types(self) -> dict[str, str]:
        return {name: TYPES[x.dtype] for name, x in self.tensors.items()}

    def is_of(self, variant: Variant) -> bool:
        """Whether the kernel that runs is the variant that was compiled."""
        return (
            variant.kernel is self.kernel
            and variant.constants == self.constants
            and variant.num_warps == self.num_warps
            and all(self.types[name] == kind for name, kind in variant.types.items() if kind[0] == "*")
        )


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Launches of the shipped kernels within the block. The kernels still run."""
    launches: list[Launch] = []

    def keep(kernel: Any, args: Any, grid: Any, options: dict[str, Any]) -> None:
        launches.append(Launch.of(kernel, args, grid, options))

    with _told(monkeypatch, keep, runs=True):
        yield launches


@contextmanager
def without_running(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Any]]:
    """The shipped kernels write nothing within the block: for what does not depend on their results. Which
    of them were launched; nothing that they were given is held."""
    launched: set[Any] = set()
    with _told(monkeypatch, lambda kernel, *_: launched.add(kernel), runs=False):
        yield launched


@contextmanager
def _told(monkeypatch: pytest.MonkeyPatch, tell: Callable[..., None], *, runs: bool) -> Iterator[None]:
    def spy(kernel: Any) -> Callable[..., Any]:
        run = kernel.run

        def spied(*args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            tell(kernel, args, grid, options)
            return run(*args, grid=grid, warmup=warmup, **options) if runs else None

        return spied

    with monkeypatch.context() as patch:
        for kernel in {id(v.kernel): v.kernel for v in variants()}.values():
            patch.setattr(kernel, "run", spy(kernel))
        yield


def record_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every op in its shipped forms, forward and backward, up to its kernels."""
    lengths = (3, 2)
    with without_running(monkeypatch), recorded(monkeypatch) as launches, use_path("triton"):
        _modulated_layer_norm(lengths, device)
        _gated_residual(lengths, device)
        _qk_norm_rope(lengths, device)
        _swiglu(sum(lengths), device)
        _transition_loss(lengths, device)
        _tangents(device)
        _attention_tangents(device)
    return launches


def _leaf(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device, requires_grad=True)


def _modulated_layer_norm(lengths: tuple[int, ...], device: torch.device) -> None:
    plan = ChunkPlan.from_lengths(lengths, device=device)
    rows, segments = sum(lengths), len(lengths)
    fp32, bf16 = torch.float32, torch.bfloat16
    for width, stream, stored, residual in (
        (1152, fp32, bf16, True),
        (1152, bf16, bf16, True),
        (1152, fp32, bf16, False),
        (1152, fp32, fp32, False),
        (768, fp32, bf16, True),
        (768, fp32, bf16, False),
        (768, fp32, fp32, False),
    ):
        gate, shift, scale = (_leaf(segments, width, dtype=fp32, device=device) for _ in range(3))
        x = _leaf(rows, width, dtype=stream, device=device)
        branch = _leaf(rows, width, dtype=stored, device=device) if residual else None
        x_new, h = modulated_layer_norm(
            x, branch, gate if residual else None, shift, scale, plan, h_dtype=stored
        )
        # The final layer's x' goes nowhere but into its norm.
        outputs = [h] if stored == fp32 else [x_new, h]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def _qk_norm_rope(lengths: tuple[int, ...], device: torch.device) -> None:
    plan = ChunkPlan.from_lengths(lengths, device=device)
    rows, bf16 = sum(lengths), torch.bfloat16
    position = torch.arange(rows, dtype=torch.int32, device=device)
    for num_heads, head_dim, with_shift in ((16, 72, True), (16, 72, False), (12, 64, True)):
        width = num_heads * head_dim
        q_norm, k_norm = (
            (
                _leaf(head_dim, dtype=torch.float32, device=device),
                _leaf(head_dim, dtype=torch.float32, device=device),
            )
            for _ in range(2)
        )
        table = RotaryTable.from_positions(position, position, rows, head_dim)
        shift = _leaf(len(lengths), 3 * width, dtype=torch.float32, device=device) if with_shift else None
        qkv = _leaf(rows, 3 * width, dtype=bf16, device=device)
        outputs = qkv_norm_rope(qkv, num_heads, q_norm, k_norm, table, shift_SE=shift, plan=plan)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        if head_dim == 72 and with_shift:
            q = _leaf(rows, num_heads, head_dim, dtype=bf16, device=device)
            qk_norm_rope(q, *q_norm, table).backward(torch.ones_like(q))
            outputs = kv_norm_rope(_leaf(rows, 2 * width, dtype=bf16, device=device), num_heads, k_norm)
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


def _swiglu(rows: int, device: torch.device) -> None:
    for width in (3072, 2048):
        packed = _leaf(rows, 2 * width, dtype=torch.bfloat16, device=device)
        swiglu_packed(packed).backward(torch.ones(rows, width, dtype=torch.bfloat16, device=device))
    for width, dtype in (
        (4608, torch.bfloat16),
        (256, torch.float32),
        (384, torch.float32),
        (576, torch.float32),
        (864, torch.float32),
    ):
        gate, up = (_leaf(rows, width, dtype=dtype, device=device) for _ in range(2))
        swiglu(gate, up).backward(torch.ones_like(gate))


def _transition_loss(lengths: tuple[int, ...], device: torch.device) -> None:
    coefficients = TargetCoefficients(*(torch.ones(len(lengths), device=device) for _ in range(5)))
    plan = ChunkPlan.from_lengths(lengths, device=device)
    for width, cell, guided, directional in LOSS_FORMS:
        F, x, z, dF_dt = (_leaf(sum(lengths), width, dtype=torch.float32, device=device) for _ in range(4))
        for slope in (dF_dt, None):
            denoising_S, directional_S = transition_loss(
                F,
                x,
                z,
                slope,
                coefficients,
                plan,
                latent_channels=cell,
                diffusion_target_TC=x if guided else None,
                directional=directional,
            )
            (denoising_S + directional_S if directional else denoising_S).sum().backward()


def _gated_residual(lengths: tuple[int, ...], device: torch.device) -> None:
    plan = ChunkPlan.from_lengths(lengths, device=device)
    for width in (1152, 768):
        x = _leaf(sum(lengths), width, dtype=torch.float32, device=device)
        branch = _leaf(sum(lengths), width, dtype=torch.bfloat16, device=device)
        gate = _leaf(len(lengths), width, dtype=torch.float32, device=device)
        gated_residual(x, branch, gate, plan).backward(torch.ones_like(x))


def _tangents(device: torch.device) -> None:
    """Of the rows of the second and the first segment, and, for swiglu, of neighbours too."""
    fp32, bf16 = torch.float32, torch.bfloat16
    plan = TangentPlan.from_lengths((1, 2), (1, 0), device=device)
    neighbours = TangentPlan.from_lengths((1, 2), (1,), device=device)

    def matrix(rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.ones(rows, width, dtype=dtype, device=device)

    for width, stream, stored, residual in (
        (1152, fp32, bf16, True),
        (1152, bf16, bf16, True),
        (1152, fp32, bf16, False),
        (1152, fp32, fp32, False),
        (768, fp32, bf16, True),
    ):
        x, branch = matrix(3, width, stream), matrix(3, width, stored)
        vector = matrix(2, width, fp32)
        joined = (branch, branch, vector, vector) if residual else (None, None, None, None)
        modulated_layer_norm_jvp(x, x, *joined, vector, vector, vector, plan, h_dtype=stored)
    x, branch, vector = matrix(3, 1152, fp32), matrix(3, 1152, bf16), matrix(2, 1152, fp32)
    gated_residual_jvp(x, branch, branch, vector, vector, plan)
    packed = matrix(3, 2 * 3072, bf16)
    swiglu_packed_jvp(packed, packed, plan)
    swiglu_packed_jvp(packed, packed[:2], neighbours)
    for width in (384, 576, 864):
        x = matrix(3, width, fp32)
        swiglu_jvp(x, x, x, x, plan)
        if width != 864:
            swiglu_jvp(x, x, x, x)
    position = torch.arange(3, dtype=torch.int32, device=device)
    for num_heads, head_dim, with_shift in ((16, 72, True), (16, 72, False), (12, 64, True)):
        table = RotaryTable.from_positions(position, position, 3, head_dim)
        qkv, weight = matrix(3, 3 * num_heads * head_dim, bf16), torch.ones(head_dim, device=device)
        shift = matrix(2, 3 * num_heads * head_dim, fp32) if with_shift else None
        qkv_norm_rope_jvp(qkv, qkv, num_heads, weight, weight, table, plan, shift_SE=shift, d_shift_SE=shift)
        if head_dim == 72 and with_shift:
            q = matrix(3, num_heads * head_dim, bf16).unflatten(1, (num_heads, head_dim))
            qk_norm_rope_jvp(q, q, weight, table, plan)


def _attention_tangents(device: torch.device) -> None:
    plan = AttentionTangentPlan.from_lengths((1, 2), (1, 2), device=device)
    for num_heads, head_dim, forms in ((16, 72, (True, False)), (12, 64, (True,))):
        x = torch.ones(3, num_heads, head_dim, dtype=torch.bfloat16, device=device)
        lse = torch.ones(3, num_heads, device=device)
        for with_lse in forms:
            for d_keys in (x, None):
                varlen_attention_jvp(x, x, x, x, d_keys, d_keys, x, lse if with_lse else None, plan)
