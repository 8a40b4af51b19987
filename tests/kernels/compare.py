"""An op beside its twin: same inputs, same cotangents, the twin in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tim_kernels import use_path

Inputs = Mapping[str, Tensor | None]
Function = Callable[..., tuple[Tensor, ...]]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype)


def outputs_and_gradients(function: Function, inputs: Inputs, used: tuple[bool, ...]) -> dict[str, Tensor]:
    """Outputs, and the gradient of every input for a random cotangent on each `used` output.

    Inputs keep their memory layout. Gradients are named d_<input>.
    """
    leaves = {k: None if x is None else x.detach().requires_grad_() for k, x in inputs.items()}
    outputs = function(**leaves)
    results = {f"out{i}": y for i, y in enumerate(outputs)}
    cotangents = [
        normal(*y.shape, seed=100 + i).to(y.device, y.dtype) for i, y in enumerate(outputs) if used[i]
    ]
    chosen = [y for i, y in enumerate(outputs) if used[i]]
    present = {k: x for k, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(chosen, list(present.values()), cotangents, allow_unused=True)
    for name, x, gradient in zip(present, present.values(), gradients, strict=True):
        results[f"d_{name}"] = torch.zeros_like(x) if gradient is None else gradient
    return {name: y.detach() for name, y in results.items()}


def assert_kernel_equals_twin(
    function: Function, inputs: Inputs, device: torch.device, tolerance: float, used: tuple[bool, ...] = ()
) -> dict[str, Tensor]:
    """Kernel on `inputs` as they are against the twin on their float64 copies.

    The error of each output and gradient is its largest deviation over the largest magnitude of the truth.
    Returns the kernel's results.
    """
    wide = {k: None if x is None else x.to(torch.float64) for k, x in inputs.items()}
    used = used or (True,) * 8
    with use_path("torch"):
        truth = outputs_and_gradients(function, wide, used)
    moved = {k: None if x is None else x.to(device) for k, x in inputs.items()}
    with use_path("triton"):
        ours = outputs_and_gradients(function, moved, used)
    assert ours.keys() == truth.keys()
    for name, y in ours.items():
        assert y.shape == truth[name].shape, name
        if y.numel():
            error = (y.cpu().double() - truth[name]).abs().max() / truth[name].abs().max().clamp_min(1e-30)
            assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"
    return ours


def far_apart(dense: Tensor, folder: Path) -> Tensor:
    """The rows of `dense` (three, 16 bits) in memory so large that the last is beyond 2^31 elements.

    An offset that wraps in 32 bits falls into zeros before the rows. On the CPU the memory is a sparse file.
    """
    rows, width = dense.shape
    stride, lead = 2**30 + 64, 2**31
    size = lead + (rows - 1) * stride + width
    if dense.device.type == "cuda":
        memory = torch.zeros(size, dtype=dense.dtype, device=dense.device)
    else:
        memory = torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=dense.dtype)
    far = memory.as_strided((rows, width), (stride, 1), lead)
    assert (rows - 1) * far.stride(0) > 2**31
    far.copy_(dense)
    return far
