"""Every op through Triton's real launcher for sm_90, up to the launch: `python -m tests.kernels.dry_run`.

Prints, for each kernel, how many compilations the first pack asked for and how many all packs did. Needs no
GPU: a stand-in for the driver names the target, and kernels are compiled but not run.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tim_kernels import dispatch, use_path
from tim_kernels.bench.cases import cases
from tim_kernels.shipped import variants

PACKS = ((3, 2), (1,), (16,), (64, 64, 64), (1, 0, 4, 1), (1000, 24), (17, 4096))
"""No two have their number of tokens, of segments and of chunks in common."""


class Driver:
    """Names the target, and runs nothing."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    driver.set_active(Driver())  # type: ignore[arg-type]
    # CPU tensors stand for CUDA tensors.
    dispatch.is_interpreting = lambda: True
    compilations: Counter[str] = Counter()

    def count(**details: Any) -> None:
        compilations[f"{details['fn'].module}.{details['fn'].name}"] += 1

    knobs.runtime.jit_cache_hook = count
    for kernel in {id(v.kernel): v.kernel for v in variants()}.values():
        kernel.run = _without_launch(kernel.run)

    first: dict[str, int] = {}
    for lengths in PACKS:
        for case in cases():
            if case.op == "varlen_attention":
                # No kernel of ours.
                continue
            device = torch.device("cpu")
            inputs = case.inputs(lengths, device, prepared=False)
            with use_path("triton"):
                outputs = case.ours(inputs, case.plan(lengths, device))
            leaves = [x for x in inputs.values() if x.requires_grad]
            if leaves:
                torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
        first = first or dict(compilations)
    json.dump({"first": first, "all": compilations}, sys.stdout)


def _without_launch(run: Any) -> Any:
    return lambda *args, grid, warmup, **options: run(*args, grid=grid, warmup=True, **options)


if __name__ == "__main__":
    main()
