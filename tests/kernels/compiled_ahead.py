"""Kernels compiled ahead, then launched: `python -m tests.kernels.compiled_ahead FOLDER`.

Prints how many compiled kernels Triton's cache in the folder holds after either. Needs no GPU, as
`tests/kernels/dry_run.py`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

LABELS = (
    "modulated_layer_norm_jvp/width 1152, stream fp32, h bf16, with residual",
    "qk_norm_rope/forward: q, 16 heads of 72, bf16",
)


def main(folder: Path) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    import torch
    from triton.runtime.driver import driver

    from tests.kernels.dry_run import Driver, _without_launch
    from tim_kernels import aot, dispatch, use_path
    from tim_kernels.bench.cases import cases
    from tim_kernels.schedule import use_stages
    from tim_kernels.shipped import variants

    counts = {}
    with use_stages(2):
        # Another schedule than today's, as most that are timed.
        chosen = [v for v in variants() if v.name in LABELS]
        for v in chosen:
            aot.fill_cache(v, 90)
        counts["ahead"] = len(list(folder.rglob("*.cubin")))
        driver.set_active(Driver())  # type: ignore[arg-type]  # what a launch without a device asks
        # CPU tensors stand for CUDA tensors.
        dispatch.is_interpreting = lambda: True  # type: ignore[assignment]  # it is cached, this is not
        for v in chosen:
            v.kernel.run = _without_launch(v.kernel.run)
        device, lengths = torch.device("cpu"), (3, 2)
        for case in cases():
            norm = case.op == "modulated_layer_norm_jvp" and "float32 stream, with residual" in case.label
            if norm or (case.op == "qk_norm_rope" and ", q, 16 heads" in case.label):
                with use_path("triton"), torch.no_grad():
                    case.ours(case.inputs(lengths, device), case.plan(lengths, device))
    counts["launched"] = len(list(folder.rglob("*.cubin")))
    json.dump(counts, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
