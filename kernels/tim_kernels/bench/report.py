"""Results as text, JSON and plots."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from tim_kernels import aot
from tim_kernels.bench.case import Case
from tim_kernels.bench.measure import MODES, Row


def without_gpu(cases: list[Case]) -> str:
    """What can be said without a GPU: resources of the compiled kernels, and bytes by shape. No times."""
    if aot.RECORD.exists():
        resources = aot.format_table(aot.read_record())
    else:
        resources = "An installed copy has no record of the compiled kernels: `python -m tim_kernels.aot`."
    known = "No CUDA device here: nothing is timed. What is known without one:"
    return "\n\n".join([known, resources, byte_table(cases)])


def byte_table(cases: list[Case]) -> str:
    lines = [
        "Bytes each op has to move for a token: every row tensor once, modulation and partial sums left out.",
        "",
        "| op | forward | backward |",
        "|---|---|---|",
    ]
    for case in cases:
        backward = case.backward_bytes_per_token
        lines.append(
            f"| {case.name} | {case.forward_bytes_per_token:,} "
            f"| {'' if backward is None else f'{backward:,}'} |"
        )
    return "\n".join(lines)


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit: a result without them says nothing."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware = {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    else:
        hardware = {"gpu": None, "cpu": platform.machine(), "threads": torch.get_num_threads()}
    return {
        **hardware,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def header() -> str:
    return (
        "| op | mix | tokens | mode | candidate | p50 ms (p20, p80) | GB/s | of copy | TFLOP/s "
        "| peak MiB | parity |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )


def line(row: Row) -> str:
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
    parity = "part of the work" if row.parity_error is None else f"{row.parity_error:.1e}"
    speed = "" if row.gb_per_s is None else f"{row.gb_per_s:.0f}"
    share = "" if row.share_of_copy is None else f"{row.share_of_copy:.0%}"
    arithmetic = "" if row.tflop_per_s is None else f"{row.tflop_per_s:.0f}"
    return (
        f"| {row.op}, {row.label} | {row.mix} | {row.tokens} | {row.mode} | {row.candidate} "
        f"| {row.p50:.4f} ({row.p20:.4f}, {row.p80:.4f}) | {speed} | {share} "
        f"| {arithmetic} | {peak} | {parity} |"
    )


def store(path: Path, where: dict[str, Any], rows: list[Row]) -> None:
    """Written aside and renamed, so that an interrupted run leaves the rows stored before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"environment": where, "rows": [r.to_json() for r in rows]}
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(stored, indent=1) + "\n")
    aside.replace(path)


def earlier(path: Path, where: dict[str, Any]) -> list[Row]:
    """Rows of an earlier run, to go on from.

    Raises:
        ValueError: if they were measured on another device, with other versions or of another commit.
    """
    before, rows = load(path)
    other = [key for key in where if key != "date" and before.get(key) != where[key]]
    if other:
        what = ", ".join(f"{key} {before.get(key)}, here {where[key]}" for key in other)
        raise ValueError(f"{path}: measured elsewhere: {what}; store to another file")
    return rows


def merged(before: list[Row], new: list[Row]) -> list[Row]:
    """All rows; of two about the same the new one."""
    return list({row.key: row for row in [*before, *new]}.values())


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    stored = json.loads(path.read_text())
    return stored["environment"], [Row(**r) for r in stored["rows"]]


GOALS = (
    ("modulated_layer_norm", "forward", 0.90),
    ("modulated_layer_norm", "backward", 0.85),
    ("qk_norm_rope", "forward", 0.85),
    ("qk_norm_rope", "backward", 0.85),
    ("swiglu", "forward", 0.90),
    ("swiglu", "backward", 0.90),
    ("modulated_layer_norm_jvp", "forward", 0.90),
    ("qk_norm_rope_jvp", "forward", 0.85),
    ("swiglu_jvp", "forward", 0.90),
)
"""Op, mode, least share of copy bandwidth from LARGE tokens on; for the H200, set before any measurement."""
LARGE = 65536


def goals(rows: list[Row]) -> str:
    """What was aimed at beside the worst that was measured."""
    lines = ["| goal | worst | reached |", "|---|---|---|"]
    ours = [r for r in rows if r.candidate == "ours"]
    for op, mode, least in GOALS:
        large = [r for r in ours if (r.op, r.mode) == (op, mode) and r.tokens >= LARGE]
        shares = [(r.share_of_copy, r) for r in large if r.share_of_copy is not None]
        if shares:
            share, row = min(shares, key=lambda pair: pair[0])
            where = f"{share:.0%} ({row.label}, {row.mix}, {row.tokens} tokens)"
            lines.append(f"| {op} {mode}: {least:.0%} of copy | {where} | {_yes(share >= least)} |")
    compiled = {(*r.key[:-1],): r for r in rows if r.candidate == "twin, compiled"}
    for op in sorted({r.op for r in ours}):
        pairs = [(compiled[r.key[:-1]].p50 / r.p50, r) for r in ours if r.op == op and r.key[:-1] in compiled]
        if pairs:
            speed, row = min(pairs, key=lambda pair: pair[0])
            where = f"{speed:.2f} times as fast ({row.mode}, {row.label}, {row.mix}, {row.tokens} tokens)"
            lines.append(f"| {op}: not slower than torch.compile | {where} | {_yes(speed >= 1)} |")
    return "\n".join(lines)


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def plot(where: dict[str, Any], rows: list[Row], beside: Path) -> list[Path]:
    """Draw one picture an op and label: share of copy bandwidth, or TFLOP/s, by tokens; a panel a mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def height(row: Row) -> float | None:
        return row.share_of_copy if row.tflop_per_s is None else row.tflop_per_s

    written = []
    for number, (op, label) in enumerate(sorted({(r.op, r.label) for r in rows})):
        chosen = [r for r in rows if (r.op, r.label) == (op, label) and height(r) is not None]
        modes = [m for m in MODES if any(r.mode == m for r in chosen)]
        if not modes:
            continue
        figure, panels = plt.subplots(
            1,
            len(modes),
            figsize=(1 + 4 * len(modes), 4),
            sharey=True,
            squeeze=False,
            constrained_layout=True,
        )
        axes = panels[0]
        for axis, mode in zip(axes, modes, strict=True):
            shown = [r for r in chosen if r.mode == mode]
            for candidate, mix in sorted({(r.candidate, r.mix) for r in shown}):
                line_rows = sorted(
                    (r for r in shown if (r.candidate, r.mix) == (candidate, mix)), key=lambda r: r.tokens
                )
                axis.plot(
                    [r.tokens for r in line_rows],
                    [height(r) or 0.0 for r in line_rows],
                    marker="o",
                    markersize=3,
                    label=f"{candidate}, {mix}",
                )
            axis.set(title=mode, xscale="log", xlabel="tokens", ylim=(0, None))
            if chosen[0].tflop_per_s is None:
                axis.axhline(1.0, color="0.7", linewidth=0.8)
        axes[0].set_ylabel("bandwidth, of a copy's" if chosen[0].tflop_per_s is None else "TFLOP/s")
        axes[0].legend(fontsize=7)
        figure.suptitle(f"{op}, {label} ({where['gpu']}, torch {where['torch']}, commit {where['commit']})")
        path = beside.with_name(f"{beside.stem}-{number}-{op}.png")
        figure.savefig(path, dpi=120)
        plt.close(figure)
        written.append(path)
    return written


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _commit() -> str:
    """Of the repository that holds this file; `unknown` for an installed package."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip()
