"""Every op traced whole by torch.compile, up to its launches: `python -m tests.kernels.traced`.

Prints the kernels that each op launches from the compiled graph. Needs no GPU: launches are counted and not
made; what Inductor then generates around them is not reached.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import Any

import torch
import torch.utils._triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.kernels.dry_run import Driver
from tim_kernels import dispatch, use_path
from tim_kernels.bench.cases import cases

LENGTHS = (3, 2)


def main() -> None:
    driver.set_active(Driver())  # type: ignore[arg-type]
    # CPU tensors stand for CUDA tensors, and Dynamo looks for kernels of Triton where it finds a GPU alone.
    dispatch.is_interpreting = lambda: True
    torch.utils._triton.has_triton = lambda: True
    launched: dict[str, list[str]] = defaultdict(list)
    case_name = ""

    def count(self: Any, *args: Any, **options: Any) -> None:
        launched[case_name].append(self.fn.__name__)

    JITFunction.run = count
    device = torch.device("cpu")
    for case in cases():
        if case.op == "varlen_attention":
            # No kernel of ours.
            continue
        torch.compiler.reset()
        case_name = case.name
        inputs, plan = case.inputs(LENGTHS, device, prepared=False), case.plan(LENGTHS, device)
        with use_path("triton"):
            outputs = torch.compile(case.ours, backend="aot_eager", fullgraph=True)(inputs, plan)
        leaves = [x for x in inputs.values() if x.requires_grad]
        if leaves:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])
    json.dump(launched, sys.stdout)


if __name__ == "__main__":
    main()
