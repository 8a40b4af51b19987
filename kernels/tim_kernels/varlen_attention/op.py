"""The op: checks, choice of backend, segments without queries or keys.

T query tokens, L key tokens, N heads, H head width, S segments.

The choice, in this order: `use_attention_backend` (a context manager), the environment variable
TIM_ATTENTION_BACKEND, the plain-PyTorch definition where `use_path` or TIM_KERNELS ask for it, and else the
first of `backends.order` that is fit, installed and proven.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from tim_kernels import dispatch
from tim_kernels.checks import check_device, check_floating, check_shape
from tim_kernels.varlen_attention import proof
from tim_kernels.varlen_attention.backends import BACKENDS, HALF, SHORT_PACK, Attend, Situation, order
from tim_kernels.varlen_attention.plan import AttentionPlan

logger = logging.getLogger("tim_kernels")

NAME = "varlen_attention"
ENVIRONMENT_VARIABLE = "TIM_ATTENTION_BACKEND"

_forced: list[str] = []
_judged: dict[tuple[str, Situation], str | None] = {}
"""Why a backend was refused in a situation, None where it is trusted."""
_loaded: dict[str, Attend] = {}


def varlen_attention(
    q_TNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, plan: AttentionPlan, *, scale: float | None = None
) -> Tensor:
    """softmax(scale * q k) v within each segment: [T, N, H]. A segment without keys gives zeros.

    Shapes:
        q: [T, N, H].   k, v: [L, N, H]; strides are free but for the last.
    Dtypes:
        one for q, k and v, any floating; the GPU backends other than `dense` and `segments` take bfloat16 and
        float16.
    Args:
        scale: 1 / sqrt(H) when not given.
    Derivatives:
        backward for q, k and v. Forward mode on `dense` alone, under sdpa_kernel(SDPBackend.MATH).
    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or a backend that was asked for cannot run.
    """
    return _attend(q_TNH, k_LNH, v_LNH, plan, scale, with_lse=False)[0]


def varlen_attention_with_lse(
    q_TNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, plan: AttentionPlan, *, scale: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """Also log sum exp(scale * q k) of every query: float32 or wider [T, N], no gradient.

    None where the backend does not hand it out (`segments`, `cudnn`). A query without keys has -inf.
    """
    return _attend(q_TNH, k_LNH, v_LNH, plan, scale, with_lse=True)


@contextmanager
def use_attention_backend(name: str) -> Iterator[None]:
    """Force a backend within the block; an inner block wins. One that cannot run is an error, not a detour.

    Raises:
        ValueError: if there is no such backend.
    """
    _forced.append(_valid(name, "use_attention_backend"))
    try:
        yield
    finally:
        _forced.pop()


def prove_attention_backends(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, everything: bool = False
) -> dict[str, str | None]:
    """Try the backends now, so that no trial falls into the first step.

    Args:
        everything: try all of them, not only until every kind of pack has one.
    Returns:
        for each backend that was looked at, why it was refused, or None where it is trusted.
    """
    situation = Situation.of(device, dtype, head_dim)
    if everything:
        return {name: _refusal(name, situation) for name in BACKENDS}
    found = {}
    for is_short in (True, False):
        for is_uniform in (True, False):
            for name in order(situation.capability, is_short=is_short):
                if is_uniform or not BACKENDS[name].uniform_only:
                    found[name] = _refusal(name, situation)
                    if found[name] is None:
                        break
    return found


def _attend(
    q_TNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, plan: AttentionPlan, scale: float | None, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    _check(q_TNH, k_LNH, v_LNH, plan)
    if scale is None:
        scale = 1 / math.sqrt(q_TNH.shape[-1])
    if plan.filled is None:
        return _attend_filled(q_TNH, k_LNH, v_LNH, plan, scale, with_lse)
    filled = plan.filled
    q, k, v = q_TNH, k_LNH, v_LNH
    if filled.index_q is not None:
        q = q.index_select(0, filled.index_q)
    if filled.index_k is not None:
        k, v = k.index_select(0, filled.index_k), v.index_select(0, filled.index_k)
    out, lse = _attend_filled(q, k, v, filled.plan, scale, with_lse)
    if filled.index_q is not None:
        out = q_TNH.new_zeros(q_TNH.shape).index_copy(0, filled.index_q, out)
        if lse is not None:
            empty = lse.new_full(q_TNH.shape[:2], float("-inf"))
            lse = empty.index_copy(0, filled.index_q, lse)
    return out, lse


def _attend_filled(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Every segment has queries and keys; there may be no segment."""
    if not plan.lengths_q:
        # Sums of nothing, so that q, k and v all receive a gradient of zero.
        wide = torch.promote_types(q.dtype, torch.float32)
        return q + (k + v).sum(0), q.new_empty(q.shape[:2], dtype=wide) if with_lse else None
    name, reason = _choose(q, k, v, plan)
    dispatch.record(NAME, name, reason)
    return _load(name)(q, k, v, plan, scale, with_lse)


def _choose(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[str, str]:
    """The backend of one call, and why.

    Raises:
        ValueError: if a backend was asked for and cannot run.
    """
    has_tangent = any(forward_ad.unpack_dual(x).tangent is not None for x in (q, k, v))
    asked = _forced[-1] if _forced else os.environ.get(ENVIRONMENT_VARIABLE, "")
    if asked:
        _valid(asked, ENVIRONMENT_VARIABLE)
        obstacle = None
        if has_tangent and asked != "dense":
            obstacle = "a forward-mode derivative is being taken"
        elif BACKENDS[asked].uniform_only and not plan.is_uniform:
            obstacle = "the segments of the pack differ in length"
        elif asked != "dense":
            obstacle = _judgements().refusal_of(asked, str(q.device), q.dtype, q.shape[-1])
        if obstacle is not None:
            raise ValueError(f"{NAME}: the backend {asked} was asked for, but {obstacle}")
        return asked, "asked for"
    if dispatch.wanted(NAME) == "torch":
        return "dense", "asked for"
    if has_tangent:
        return "dense", "a forward-mode derivative is being taken"
    is_short = max(plan.max_q, plan.max_k) <= SHORT_PACK
    name = _judgements().first_trusted(str(q.device), q.dtype, q.shape[-1], is_short, plan.is_uniform)
    return name, f"first to be trusted at head_dim {q.shape[-1]}, {q.dtype}, {q.device.type}"


class _Judgements(NamedTuple):
    first_trusted: Callable[[str, torch.dtype, int, bool, bool], str]
    refusal_of: Callable[[str, str, torch.dtype, int], str | None]


def _judgements() -> _Judgements:
    if torch.compiler.is_compiling():
        # Imported by traced code alone: it imports torch's compiler, two seconds for a process without need.
        from tim_kernels.varlen_attention.constant import first_trusted, refusal_of

        return _Judgements(first_trusted, refusal_of)
    return _Judgements(_first_trusted, _refusal_of)


def _first_trusted(device: str, dtype: torch.dtype, head_dim: int, is_short: bool, is_uniform: bool) -> str:
    situation = Situation.of(torch.device(device), dtype, head_dim)
    reasons = []
    for name in order(situation.capability, is_short=is_short):
        if BACKENDS[name].uniform_only and not is_uniform:
            continue
        refused = _refusal(name, situation)
        if refused is None:
            return name
        reasons.append(f"{name}: {refused}")
    raise RuntimeError(f"{NAME}: no backend can be trusted at {situation}: {'; '.join(reasons)}")


def _refusal_of(name: str, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    return _refusal(name, Situation.of(torch.device(device), dtype, head_dim))


def _refusal(name: str, situation: Situation) -> str | None:
    """Why a backend is not taken in a situation, or None; judged once, and said once."""
    key = (name, situation)
    if key not in _judged:
        _judged[key] = refused = _judge(name, situation)
        if refused is not None:
            # What is not for this machine, or not installed, is no news.
            level = logging.WARNING if refused.startswith(UNPROVEN) else logging.INFO
            logger.log(level, "%s: %s is not used at %s: %s", NAME, name, situation, refused)
    return _judged[key]


UNPROVEN = "it failed its trial: "


def _judge(name: str, situation: Situation) -> str | None:
    backend = BACKENDS[name]
    obstacle = backend.obstacle(situation)
    if obstacle is not None:
        return obstacle
    try:
        attend = _load(name)
    except (ImportError, AttributeError, OSError) as error:
        return f"it is not installed: {error}"
    # In float32 only torch's own kernels are left, and what they round to is the user's choice (TF32). The
    # definition on the CPU is what all others are measured by.
    if situation.dtype not in HALF or (name == "dense" and situation.capability is None):
        return None
    failure = proof.refusal(backend, attend, situation)
    return None if failure is None else UNPROVEN + failure


def _load(name: str) -> Attend:
    if name not in _loaded:
        _loaded[name] = BACKENDS[name].load()
    return _loaded[name]


def _valid(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, received {name!r}")
    return name


def _check(q_TNH: Tensor, k_LNH: Tensor, v_LNH: Tensor, plan: AttentionPlan) -> None:
    tensors: dict[str, Tensor | None] = {"q": q_TNH, "k": k_LNH, "v": v_LNH}
    check_floating(NAME, tensors)
    for name, x, tokens in (("q", q_TNH, plan.num_queries), ("k", k_LNH, plan.num_keys)):
        if x.ndim != 3 or x.shape[0] != tokens or x.shape[1:] != q_TNH.shape[1:]:
            raise ValueError(
                f"{NAME}: {name}: expected [{tokens}, heads, head_dim] as in the plan and in q, "
                f"received {list(x.shape)}"
            )
        if x.dtype != q_TNH.dtype:
            raise ValueError(f"{NAME}: {name}: expected {q_TNH.dtype} as q, received {x.dtype}")
    check_shape(NAME, "v", v_LNH, k_LNH.shape)
    if v_LNH.dtype != q_TNH.dtype:
        raise ValueError(f"{NAME}: v: expected {q_TNH.dtype} as q, received {v_LNH.dtype}")
    check_device(NAME, {**tensors, "plan": plan.cu_seqlens_q})
