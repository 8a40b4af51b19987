"""A backend's output and gradients against float64, before it is trusted.

Kernels of attention have returned wrong gradients at unusual head widths without any error. A trial on a
small pack, at the head width and in the precision that will be used, is made once a process.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Thread

import torch
from torch import Tensor

from tim_kernels.varlen_attention.backends import Attend, Backend, Situation
from tim_kernels.varlen_attention.dense import dense_attention, dense_logsumexp
from tim_kernels.varlen_attention.plan import AttentionPlan

NUM_HEADS = 3
PACKS = (
    ((1, 130, 64, 77), (1, 130, 64, 77)),
    ((1, 130, 64, 77), (40, 1, 200, 65)),
)
"""(query lengths, key lengths): below, at and above the tiles of the kernels; self- and cross-attention."""
UNIFORM_PACKS = (((130, 130), (130, 130)), ((130, 130), (77, 77)))
SPOILED = 1
"""The segment that is filled with NaN, to see whether it is felt elsewhere."""
TOLERANCE_IN_EPS = 4
"""Relative error, in units of the precision's epsilon, of each output and gradient of a segment.

Rounding P, dS and the result gives less than 1: 0.6 at most seen with torch's CPU kernels at head widths 8 to
128 in both 16-bit precisions. A gradient that is wrong is off by its own size, 128 in bfloat16.
"""
LSE_TOLERANCE = 5e-3
"""Absolute, on a logarithm near 5, from 16-bit inputs and float32 sums."""


def refusal(backend: Backend, attend: Attend, situation: Situation) -> str | None:
    """Why the backend is not to be trusted in this situation, or None.

    The trial runs in a thread of its own: autocast, no_grad, hooks on saved tensors (activation checkpointing
    counts what is saved) and function transforms of the caller belong to the caller's thread.
    """
    found: list[str | None] = []

    def run() -> None:
        on_device = torch.cuda.device(situation.device) if situation.device.type == "cuda" else nullcontext()
        try:
            with on_device:
                found.append(_try(backend, attend, situation))
        # Whatever a foreign kernel raises, the next backend is to be tried.
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            found.append(f"it raised {type(error).__name__}: {first_line}")

    thread = Thread(target=run, name=f"attention-proof-{backend.name}")
    thread.start()
    thread.join()
    return found[0]


@dataclass(frozen=True)
class _Trial:
    """out, gradients of q, k and v for one cotangent, and logsumexp if it was handed out."""

    out: Tensor
    d_q: Tensor
    d_k: Tensor
    d_v: Tensor
    lse: Tensor | None


def _try(backend: Backend, attend: Attend, situation: Situation) -> str | None:
    scale = 1 / math.sqrt(situation.head_dim)
    for lengths_q, lengths_k in UNIFORM_PACKS if backend.uniform_only else PACKS:
        plan = AttentionPlan.from_lengths(lengths_q, lengths_k, device=situation.device)
        inputs = _inputs(plan, situation)
        truth = _run(_float64, tuple(x.double() for x in inputs), plan, scale)
        ours = _run(attend, inputs, plan, scale)
        what = f"queries {lengths_q}, keys {lengths_k}"
        wrong = _difference(ours, truth, plan, situation.dtype, skipped=None)
        if wrong is not None:
            return f"{wrong} ({what})"
        spoiled = _run(attend, _spoil(inputs, plan), plan, scale)
        wrong = _difference(spoiled, truth, plan, situation.dtype, skipped=SPOILED)
        if wrong is not None:
            return f"with NaN in segment {SPOILED}, {wrong} ({what})"
    return None


def _inputs(plan: AttentionPlan, situation: Situation) -> tuple[Tensor, ...]:
    """q, k, v and the cotangent; k and v are views of one packed projection, as in the network."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(situation.dtype).to(situation.device)

    heads = (NUM_HEADS, situation.head_dim)
    q, d_out = normal(plan.num_queries, *heads), normal(plan.num_queries, *heads)
    k, v = normal(plan.num_keys, 2, *heads).unbind(1)
    return q, k, v, d_out


def _run(attend: Attend, inputs: tuple[Tensor, ...], plan: AttentionPlan, scale: float) -> _Trial:
    q, k, v, d_out = inputs
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v, plan, scale, True)
    d_q, d_k, d_v = torch.autograd.grad(out, (q, k, v), d_out)
    return _Trial(out.detach(), d_q, d_k, d_v, lse)


def _float64(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    groups = plan.exact_groups
    return dense_attention(q, k, v, groups, scale), dense_logsumexp(q, k, groups, scale)


def _spoil(inputs: tuple[Tensor, ...], plan: AttentionPlan) -> tuple[Tensor, ...]:
    spoiled = []
    for x, lengths in zip(
        inputs, (plan.lengths_q, plan.lengths_k, plan.lengths_k, plan.lengths_q), strict=True
    ):
        start = sum(lengths[:SPOILED])
        x = x.clone()
        x[start : start + lengths[SPOILED]] = float("nan")
        spoiled.append(x)
    return tuple(spoiled)


def _difference(
    ours: _Trial, truth: _Trial, plan: AttentionPlan, dtype: torch.dtype, skipped: int | None
) -> str | None:
    limit = TOLERANCE_IN_EPS * torch.finfo(dtype).eps
    by_name = {
        "out": (ours.out, truth.out, plan.lengths_q),
        "dq": (ours.d_q, truth.d_q, plan.lengths_q),
        "dk": (ours.d_k, truth.d_k, plan.lengths_k),
        "dv": (ours.d_v, truth.d_v, plan.lengths_k),
    }
    for name, (mine, exact, lengths) in by_name.items():
        if mine.shape != exact.shape or mine.dtype != dtype:
            return f"{name} is {mine.dtype} {list(mine.shape)}, expected {dtype} {list(exact.shape)}"
        error = _relative_error(mine, exact, lengths, skipped)
        # Also when the error is NaN.
        if not error <= limit:
            return f"{name} is off by {error:.2g} of its size, limit {limit:.2g}"
    if ours.lse is not None and truth.lse is not None:
        if ours.lse.shape != truth.lse.shape:
            return f"logsumexp is {list(ours.lse.shape)}, expected {list(truth.lse.shape)}"
        kept = _rows(plan.lengths_q, skipped)
        error = float((ours.lse.double() - truth.lse)[kept].abs().max())
        if not error <= LSE_TOLERANCE:
            return f"logsumexp is off by {error:.2g}, limit {LSE_TOLERANCE:.2g}"
    return None


def _relative_error(mine: Tensor, exact: Tensor, lengths: tuple[int, ...], skipped: int | None) -> float:
    """Largest over the segments: root mean square of the error over that of the segment, or of all if larger.

    The second because the gradients of q and k are zero where a segment has one key.
    """
    size_of_all = exact.square().mean()
    worst = 0.0
    segments = zip(mine.double().split(lengths), exact.split(lengths), strict=True)
    for i, (a, b) in enumerate(segments):
        if i != skipped:
            size = torch.maximum(b.square().mean(), size_of_all)
            error = float(((a - b).square().mean() / size).sqrt())
            # max() would drop a NaN.
            worst = error if not error <= worst else worst
    return worst


def _rows(lengths: tuple[int, ...], skipped: int | None) -> list[int]:
    segment = [i for i, n in enumerate(lengths) for _ in range(n)]
    return [row for row, i in enumerate(segment) if i != skipped]
