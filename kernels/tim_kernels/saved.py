"""Activation memory: what a piece of a network keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], object], *, apart_from: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps while `run` builds its graph; memory saved more than once counts once.

    Views count what they show, not the tensor they were cut from; views of different extent count separately.

    Args:
        run: a forward; what it returns is not looked at.
        apart_from: tensors that exist anyway, such as parameters; memory within them is not counted.
    """
    held = {_extent(x) for x in apart_from}
    saved: dict[tuple[int, int, tuple[int, ...]], Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        # Holding the tensor keeps its address from being given out again.
        saved[_extent(x)] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(x.numel() * x.element_size() for extent, x in saved.items() if extent not in held)


def _extent(x: Tensor) -> tuple[int, int, tuple[int, ...]]:
    # Strides tell the columns from the rows of one matrix; a transposed view of all of it is the same extent.
    steps = sorted((step, size) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    return x.data_ptr(), x.element_size(), tuple(n for pair in steps for n in pair)
