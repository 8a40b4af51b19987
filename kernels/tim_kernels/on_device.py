"""Triton launches on the current device and its stream, whichever device the tensors are on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def on_own_device(launch: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Makes the device of the first argument, a tensor, the current one while `launch` runs.

    For forwards and tangents. Autograd runs a backward on the device and the stream of its forward, and
    compiled code enters the device by itself.
    """

    @functools.wraps(launch)
    def launched(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first: Any = args[0]
        if (
            torch.compiler.is_compiling()
            or not first.is_cuda
            or first.device.index == torch.cuda.current_device()
        ):
            return launch(*args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(*args, **kwargs)

    return launched
