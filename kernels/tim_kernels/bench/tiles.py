"""Which tile of attention's tangent is fastest on this GPU: `python -m tim_kernels.bench --tune`.

Nothing is chosen at run time. The winner goes into `varlen_attention/jvp_kernel.py` by hand, with the table
that this prints beside it: no length may decide how a kernel is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tim_kernels.bench.attention import attention_cases
from tim_kernels.bench.case import Inputs, lengths_of
from tim_kernels.bench.measure import TOLERANCE, Timer

WIDTH, HEAD_DIM = 1152, 72
SIZES = (("mixed", 16384), ("uniform", 16384), ("small", 16384))
"""Packs that are timed: (mix, tokens)."""


@dataclass(frozen=True)
class Timed:
    """One tile at one size; `problem` says why it was not timed."""

    label: str
    mix: str
    tokens: int
    tile: tuple[int, ...]
    """Queries, keys, stages, warps."""
    p50: float | None
    tflop_per_s: float | None
    problem: str | None = None


def main(device: torch.device, timer: Timer, out: Path | None, where: dict[str, Any]) -> int:
    """Time every candidate and print the table; exit code 1 if one was refused."""
    found = list(timed(device, timer))
    print(", ".join(f"{key} {value}" for key, value in where.items()), table(found), sep="\n\n")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({"environment": where, "tiles": [asdict(x) for x in found]}, indent=1) + "\n"
        )
    return 1 if any(x.problem for x in found) else 0


def timed(
    device: torch.device, timer: Timer, *, width: int = WIDTH, head_dim: int = HEAD_DIM, sizes: Any = SIZES
) -> Iterator[Timed]:
    """Every candidate on every form of the tangent; one that disagrees with the first is not timed."""
    from tim_kernels.varlen_attention.jvp_kernel import CANDIDATES, Tile

    for case in attention_cases(width, head_dim):
        if case.op != "varlen_attention_jvp":
            continue
        for mix, tokens in sizes:
            lengths = lengths_of(mix, tokens)
            plan, inputs = case.plan(lengths, device), case.inputs(lengths, device)
            flops = 0 if case.flops is None else case.flops(lengths)
            expected = _launch(inputs, plan, head_dim, CANDIDATES[0])
            for tile in CANDIDATES:

                def run(tile: Tile = tile, inputs: Inputs = inputs, plan: Any = plan) -> Tensor:
                    return _launch(inputs, plan, head_dim, tile)

                name = (case.label, mix, tokens, tuple(tile))
                try:
                    deviation = (run().float() - expected.float()).abs().max() / expected.float().abs().max()
                    if not float(deviation) <= TOLERANCE[expected.dtype]:
                        yield Timed(*name, None, None, f"off by {float(deviation):.1e} from the first")
                        continue
                    taken = timer(run)
                # A tile that this GPU has no room for is a result too.
                except Exception as error:
                    yield Timed(*name, None, None, f"{type(error).__name__}: {str(error).splitlines()[:1]}")
                    continue
                yield Timed(*name, taken.p50, flops / taken.p50 / 1e9)


def table(found: list[Timed]) -> str:
    """Markdown: one row a tile, one column a form and size, and the fastest of each."""
    columns = list(dict.fromkeys((x.label, x.mix, x.tokens) for x in found))
    lines = [f"{n}: {label}, {mix}, {tokens} tokens" for n, (label, mix, tokens) in enumerate(columns, 1)]
    lines += ["", "| queries, keys, stages, warps | " + " | ".join(f"{n}" for n, _ in enumerate(columns, 1))]
    lines[-1] += " | geometric mean |"
    lines.append("|---" * (len(columns) + 2) + "|")
    by_tile: dict[tuple[int, ...], list[Timed]] = {}
    for x in found:
        by_tile.setdefault(x.tile, []).append(x)
    best = [max((x.tflop_per_s or 0.0) for x in found if _column(x) == c) for c in columns]
    means = {
        tile: torch.tensor([x.tflop_per_s or 0.0 for x in own]).log().mean().exp().item()
        for tile, own in by_tile.items()
    }
    for tile, own in by_tile.items():
        cells = []
        for x, top in zip(own, best, strict=True):
            speed = x.problem or f"{x.tflop_per_s:.0f}"
            cells.append(f"**{speed}**" if x.tflop_per_s == top else speed)
        lines.append(f"| {', '.join(map(str, tile))} | {' | '.join(cells)} | {means[tile]:.0f} |")
    fastest = max(means, key=lambda tile: means[tile])
    return "\n".join([*lines, "", f"TFLOP/s. Fastest over all: {', '.join(map(str, fastest))}."])


def _column(x: Timed) -> tuple[str, str, int]:
    return x.label, x.mix, x.tokens


def _launch(inputs: Inputs, plan: Any, head_dim: int, tile: Any) -> Tensor:
    from tim_kernels.varlen_attention.jvp_kernel import launch_jvp

    heads = {n: x.unflatten(1, (-1, head_dim)) for n, x in inputs.items() if n != "lse"}
    q, k, v, d_q, out = (heads[n] for n in ("q", "k", "v", "d_q", "out"))
    d_k, d_v, scale = heads.get("d_k"), heads.get("d_v"), head_dim**-0.5
    return launch_jvp(q, k, v, d_q, d_k, d_v, out, inputs.get("lse"), plan, scale, tile)
