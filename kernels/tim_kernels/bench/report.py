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
from tim_kernels.bench.cases import Case
from tim_kernels.bench.measure import MODES, Row


def without_gpu(cases: list[Case]) -> str:
    """What can be said without a GPU: resources of the compiled kernels, and bytes by shape. No times."""
    return "\n".join(
        [
            "No CUDA device here: nothing is timed. What is known without one:",
            "",
            aot.format_table(aot.read_record()),
            "",
            byte_table(cases),
        ]
    )


def byte_table(cases: list[Case]) -> str:
    lines = [
        "Bytes each op has to move for a token: every row tensor once, modulation and partial sums left out.",
        "",
        "| op | forward | backward |",
        "|---|---|---|",
    ]
    lines += [f"| {c.name} | {c.forward_bytes_per_token:,} | {c.backward_bytes_per_token:,} |" for c in cases]
    return "\n".join(lines)


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit: a result without them says nothing."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def header() -> str:
    return (
        "| op | mix | tokens | mode | candidate | p50 ms (p20, p80) | GB/s | of copy | peak MiB | parity |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )


def line(row: Row) -> str:
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
    parity = "part of the work" if row.parity_error is None else f"{row.parity_error:.1e}"
    speed = "" if row.gb_per_s is None else f"{row.gb_per_s:.0f}"
    share = "" if row.share_of_copy is None else f"{row.share_of_copy:.0%}"
    return (
        f"| {row.op}, {row.label} | {row.mix} | {row.tokens} | {row.mode} | {row.candidate} "
        f"| {row.p50:.4f} ({row.p20:.4f}, {row.p80:.4f}) | {speed} | {share} | {peak} | {parity} |"
    )


def store(path: Path, where: dict[str, Any], rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {"environment": where, "rows": [r.to_json() for r in rows]}
    path.write_text(json.dumps(stored, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    stored = json.loads(path.read_text())
    return stored["environment"], [Row(**r) for r in stored["rows"]]


def plot(where: dict[str, Any], rows: list[Row], beside: Path) -> list[Path]:
    """Draw one picture an op and label: share of copy bandwidth against tokens, a panel a mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for number, (op, label) in enumerate(sorted({(r.op, r.label) for r in rows})):
        figure, axes = plt.subplots(1, len(MODES), figsize=(13, 4), sharey=True, constrained_layout=True)
        chosen = [r for r in rows if (r.op, r.label) == (op, label)]
        for axis, mode in zip(axes, MODES, strict=True):
            shown = [r for r in chosen if r.mode == mode and r.share_of_copy is not None]
            for candidate, mix in sorted({(r.candidate, r.mix) for r in shown}):
                line_rows = sorted(
                    (r for r in shown if (r.candidate, r.mix) == (candidate, mix)), key=lambda r: r.tokens
                )
                axis.plot(
                    [r.tokens for r in line_rows],
                    [r.share_of_copy for r in line_rows],
                    marker="o",
                    markersize=3,
                    label=f"{candidate}, {mix}",
                )
            axis.set(title=mode, xscale="log", xlabel="tokens", ylim=(0, None))
            axis.axhline(1.0, color="0.7", linewidth=0.8)
        axes[0].set_ylabel("bandwidth, of a copy's")
        axes[0].legend(fontsize=7)
        figure.suptitle(f"{op}, {label} ({where['gpu']}, torch {where['torch']}, commit {where['commit']})")
        path = beside.with_name(f"{beside.stem}-{number}-{op}.png")
        figure.savefig(path, dpi=120)
        plt.close(figure)
        written.append(path)
    return written


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
