"""A CUDA device that computes nothing, on any machine: shapes, dtypes, devices and waits as on a real one.

Tensors of the device are fake (torch's `FakeTensorMode`), so that the largest packs take no memory; those of
the host are real, so that plans can be made. What a real device refuses, or waits for, is an error here:

- operations that mix tensors of the host with those of the device;
- questions to the device: `.item()`, a branch on a value, `nonzero`, a size that depends on data;
- copies in either direction that the host waits for.

Kernels of Triton are not run: `launches` holds what they were given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

# FakeTensorMode imports it anyway, and it must be there before `_make_subclass` is replaced.
import torch._dynamo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.kernels.launches import Launch
from tim_kernels.shipped import variants

DEVICE = torch.device("cuda:0")
STAGED_BYTES = 2**16
"""Up to so many bytes CUDA copies from pageable memory without waiting for the stream."""
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "_varlen_attn")


class HostWaits(AssertionError):
    """The host would wait for the device."""


class Product(NamedTuple):
    """A matrix product, or attention: dtype, longest and shortest axis of its operands."""

    dtype: torch.dtype
    longest: int
    shortest: int


@dataclass
class Seen:
    """What happened on the device."""

    launches: list[Launch] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    float64_elements: int = 0
    """Most elements of one float64 result."""
    waits: list[str] = field(default_factory=list)
    """Copies that the host waited for, where it may."""


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch, *, may_wait: bool = False) -> Iterator[Seen]:
    """Within the block `DEVICE` can be used as a CUDA device.

    Args:
        may_wait: copies that the host waits for are noted, not refused.
    """
    seen = Seen()
    make = Tensor._make_subclass

    def with_the_device_in_python(cls: Any, data: Tensor, requires_grad: bool = False, **options: Any) -> Any:
        # To autograd's engine, which asks the driver about every device that it meets, the tensor is one of
        # the device `meta`; to Python it is on the fake one.
        return make(cls, data, requires_grad, **{**options, "dispatch_device": False})

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "_make_subclass", staticmethod(with_the_device_in_python))
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "current_device", lambda: DEVICE.index)
        patch.setattr(FakeTensor, "is_cuda", property(lambda x: x.fake_device.type == "cuda"), raising=False)
        for kernel in {id(v.kernel): v.kernel for v in variants()}.values():
            patch.setattr(kernel, "run", _recorder(kernel, seen))
        with _Device(seen, may_wait):
            yield seen


def _recorder(kernel: Any, seen: Seen) -> Any:
    def run(*args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.launches.append(Launch.of(kernel, args, grid, options))

    return run


class _Device(TorchDispatchMode):
    def __init__(self, seen: Seen, may_wait: bool) -> None:
        super().__init__()
        self._seen, self._may_wait = seen, may_wait
        self._fake = FakeTensorMode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._pin_memory.default:
            return _marked_as_pinned(args[0].clone())
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "meta":
            # What the C++ side of an operation makes beside a tensor of ours.
            kwargs["device"] = target = DEVICE
        to_device = target is not None and torch.device(target).type == "cuda"
        if not to_device and not any(isinstance(x, FakeTensor) for x in given):
            return func(*args, **kwargs)
        reason = _reason_to_wait(func, args, kwargs, given)
        if reason is not None and not self._may_wait:
            raise HostWaits(reason)
        if reason is not None:
            self._seen.waits.append(reason)

        def faked(x: Any) -> Any:
            is_host = isinstance(x, Tensor) and not isinstance(x, FakeTensor)
            return self._fake.from_tensor(x) if is_host else x

        with self._fake:
            result = func(*tree_map(faked, args), **tree_map(faked, kwargs))
        self._record(func, given, result)
        return result

    def _record(self, func: Any, given: list[Tensor], result: Any) -> None:
        name = func.name().split("::")[1].split(".")[0]
        if name.startswith(_PRODUCTS):
            # Of attention, tokens and the width of a head; its logsumexp, in float32, comes last.
            operands = [x for x in given if x.is_floating_point()][:3]
            sides = [n for x in operands for n in (x.shape[0], x.shape[-1])]
            self._seen.products.append(Product(operands[0].dtype, max(sides), min(sides)))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.dtype == torch.float64:
                self._seen.float64_elements = max(self._seen.float64_elements, x.numel())


def _marked_as_pinned(x: Tensor) -> Tensor:
    x.is_pinned_here = True  # type: ignore[attr-defined]
    return x


def _reason_to_wait(func: Any, args: Any, kwargs: dict[str, Any], given: list[Tensor]) -> str | None:
    """What is copied between host and device in a way that returns only when it is done, or None."""
    if func in _INDEXING:
        of_host = any(not isinstance(x, FakeTensor) for x in given)
        return f"{func.name()}: an index of the host is copied to the device" if of_host else None
    if func is torch.ops.aten.copy_.default:
        target, source, *rest = args
        there, non_blocking = target.device, rest[0] if rest else kwargs.get("non_blocking", False)
    elif func is torch.ops.aten._to_copy.default:
        source, non_blocking = args[0], kwargs.get("non_blocking", False)
        there = torch.device(kwargs.get("device") or source.device)
    else:
        return None
    # One number of the host travels with the launch of a copy_.
    is_argument = func is torch.ops.aten.copy_.default and source.device.type == "cpu" and source.ndim == 0
    if source.device.type == there.type or is_argument:
        return None
    what = f"{source.dtype} {list(source.shape)} from {source.device.type} to {there.type}"
    if not non_blocking:
        return f"{what}: not non_blocking"
    num_bytes = source.numel() * source.element_size()
    if source.device.type == "cpu" and num_bytes > STAGED_BYTES and not hasattr(source, "is_pinned_here"):
        return f"{what}: {num_bytes} bytes of pageable memory"
    return None
