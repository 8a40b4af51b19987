"""Which path an op takes: its Triton kernel or its plain-PyTorch twin.

The choice per op is, in this order: `use_path` (a context manager), the environment variable TIM_KERNELS,
`auto`. TIM_KERNELS holds one path for all ops ("torch"), choices by op ("swiglu=torch"), or both
("torch,swiglu=triton").

auto: Triton where it can run (CUDA tensors of supported dtypes, no forward-mode derivative), else the twin.
triton: the kernel, or an error saying why it cannot run. On CPU tensors it needs Triton's interpreter.
torch: the twin.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Literal, cast, get_args

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

logger = logging.getLogger("tim_kernels")

Path = Literal["auto", "triton", "torch"]
PATHS: tuple[str, ...] = get_args(Path)
ENVIRONMENT_VARIABLE = "TIM_KERNELS"
OPS = (
    "gated_residual",
    "gated_residual_jvp",
    "modulated_layer_norm",
    "modulated_layer_norm_jvp",
    "qk_norm_rope",
    "qk_norm_rope_jvp",
    "swiglu",
    "swiglu_jvp",
    "transition_loss",
    "varlen_attention",
    "varlen_attention_jvp",
)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALL = "*"
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None

_forced: dict[str, Path] = {}
_taken: dict[str, str] = {}
_logged: set[tuple[str, str, str]] = set()


@contextmanager
def use_path(path: Path, op: str | None = None) -> Iterator[None]:
    """Force the path of one op, or of all, within the block. An inner block wins, op by op.

    Raises:
        ValueError: if there is no such path or op.
    """
    where = "use_path"
    key = _ALL if op is None else _valid_op(op, where)
    before = dict(_forced)
    if op is None:
        _forced.clear()
    _forced[key] = _valid(path, where)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def path_taken(op: str) -> str | None:
    """Path of the op's latest call, "triton" or "torch" (attention: a backend); None before the first."""
    return _taken.get(op)


def choose(
    op: str, tensors: Sequence[Tensor | None], obstacle: str | None = None
) -> Literal["triton", "torch"]:
    """Decide the path of one call, remember it, and log it when it is new.

    Args:
        obstacle: why the op has no kernel for these shapes, if it has none.
    Raises:
        ValueError: if Triton is forced and cannot run on these tensors.
    """
    present = [x for x in tensors if x is not None]
    asked = wanted(op)
    obstacle = None if asked == "torch" else obstacle or _obstacle(present, asked)
    if asked == "triton" and obstacle is not None:
        raise ValueError(f"{op}: the Triton path was asked for, but {obstacle}; use auto or torch")
    path = "triton" if asked != "torch" and obstacle is None else "torch"
    record(op, path, "asked for" if asked == path else (obstacle or "available"))
    return path


def record(op: str, path: str, reason: str) -> None:
    """Remember the path of the op's latest call; log it when it is new."""
    _taken[op] = path
    # A log call would break the graph of a compiled model.
    if (op, path, reason) not in _logged and not torch.compiler.is_compiling():
        _logged.add((op, path, reason))
        logger.info("%s: %s (%s)", op, path, reason)


def wanted(op: str) -> Path:
    """The choice that is in force for one op."""
    for key in (op, _ALL):
        if key in _forced:
            return _forced[key]
    return _from_environment(op)


def triton_is_installed() -> bool:
    return _TRITON_IS_INSTALLED


@cache
def is_interpreting() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1: kernels then run on the CPU, in Python."""
    if not triton_is_installed():
        return False
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    # Setting the variable after the import would leave the language's own functions compiled.
    return isinstance(tl.sum, InterpretedFunction)


def _from_environment(op: str) -> Path:
    chosen: Path = "auto"
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.rpartition("=")
        where = f"{ENVIRONMENT_VARIABLE}={text}"
        path = _valid(value, where)
        if key in ("", op) or _valid_op(key, where) == op:
            chosen = path
    return chosen


def _valid_op(op: str, where: str) -> str:
    if op not in OPS:
        raise ValueError(f"{where}: expected one of the ops {', '.join(OPS)}, received {op!r}")
    return op


def _valid(path: str, where: str) -> Path:
    if path not in PATHS:
        raise ValueError(f"{where}: expected one of {', '.join(PATHS)}, received {path!r}")
    return cast(Path, path)


def _obstacle(tensors: list[Tensor], wanted: Path) -> str | None:
    """Why the kernel does not run on these tensors, or None."""
    if not triton_is_installed():
        return "Triton is not installed"
    for x in tensors:
        if x.is_floating_point() and x.dtype not in KERNEL_DTYPES:
            return f"it has no kernel for {x.dtype}"
        # The interpreter is for proofs, a thousand times slower than the twin: it runs where it is asked for.
        if not x.is_cuda and (wanted == "auto" or not is_interpreting()):
            return f"a tensor is on {x.device}"
        if forward_ad.unpack_dual(x).tangent is not None:
            return "a forward-mode derivative is being taken"
    return None
