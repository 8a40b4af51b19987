"""Everything worth knowing about a GPU that this code has not run on, in the order of its worth.

    python launch/first_light.py --out runs/first_light           tests, trials, benchmarks, until time is up
    python launch/first_light.py --out runs/first_light --only tiles           one of them
    python launch/first_light.py --list                           what would run, and for how long

Each part is a process of its own with a limit of its own: one that fails, hangs or takes the device down does
not end the others. What is known is written after every part.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.command import command

ROOT = Path(__file__).parents[1]
SHOWN_LINES = 30
"""Last lines of a part's output that are printed; the log holds all."""
LEAST_SECONDS = 10.0
"""With less than that left no part is begun."""

_TRIALS = """
import logging, torch
from tim_kernels import prove_attention_backends
logging.basicConfig(level=logging.ERROR)
device = torch.device("cuda")
print(torch.cuda.get_device_name(device), "torch", torch.__version__)
for head_dim in (72, 64, 128):
    found = prove_attention_backends(device, torch.bfloat16, head_dim, everything=True)
    for name, refused in found.items():
        print(f"heads of {head_dim}: {name}: {refused or 'trusted'}", flush=True)
"""


@dataclass(frozen=True)
class Part:
    """One process.

    expected_s: what it should take on an H200 (a guess until it has run).   limit_s: when it is ended.
    leaves: files in the output folder, besides its part of log.txt.
    """

    name: str
    arguments: tuple[str, ...]
    expected_s: int
    limit_s: int
    leaves: str = ""


def parts(out: Path) -> list[Part]:
    """In order: first what says whether results can be trusted at all, then what is worth most."""
    tests = ("-m", "pytest", "-q", "--tb=short", "-m", "gpu")
    bench, kernels = ("-m", "tim_kernels.bench", "--no-plots"), str(out / "kernels.json")
    beside = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    return [
        Part("trials", ("-c", _TRIALS), 30, 120),
        Part("parity", (*tests, *beside, "tests/kernels", "-k", "not compiled_model"), 180, 420),
        Part(
            "kernels",
            (*bench, "--no-compile", "--tokens", "65536", "--mixes", "mixed", "--measured-ms", "80",
             "--seconds", "200", "--out", kernels),
            150, 260, "kernels.json",
        ),
        Part(
            "tiles",
            ("-m", "tim_kernels.bench", "--tune", "--measured-ms", "40", "--seconds", "140", "--out",
             str(out / "tiles.json")),
            90, 180, "tiles.json",
        ),
        Part(
            "step",
            ("-m", "tim_ds.trainer.bench", "launch/recipes/t2i_xl.yaml", "--seconds", "300", "--out",
             str(out / "step.json")),
            320, 400, "step.json",
        ),
        Part(
            "compiled",
            (*bench, "--append", "--tokens", "65536", "--mixes", "mixed", "--measured-ms", "80", "--seconds",
             "240", "--out", kernels),
            240, 320, "kernels.json",
        ),
        Part(
            "sizes",
            (*bench, "--append", "--no-compile", "--tokens", "8192", "262144", "1024", "--mixes", "small",
             "uniform", "--measured-ms", "50", "--seconds", "200", "--out", kernels),
            200, 260, "kernels.json",
        ),
        Part("compiled_models", (*tests, *beside, "tests/kernels", "-k", "compiled_model"), 200, 300),
        Part("training", (*tests, "tests/trainer", "tests/data_pipeline"), 120, 300),
        Part(
            "all_kernel_tests",
            ("-m", "pytest", "-q", "--tb=short", *beside, "-m", "not gpu and not multi_gpu and not slow",
             "tests/kernels"),
            240, 400,
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    part: Part
    seconds: float
    exit_code: int | None
    """None: it was ended, or not begun."""

    @property
    def verdict(self) -> str:
        if self.exit_code is None:
            return "ended at its limit" if self.seconds else "no time was left"
        return "passed" if self.exit_code == 0 else f"failed (exit code {self.exit_code})"


def run(chosen: Sequence[Part], out: Path, seconds: float) -> list[Outcome]:
    """Run the parts until time is up; log.txt and summary.md in `out` are whole after each."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for part in chosen:
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            outcomes.append(Outcome(part, 0.0, None))
        else:
            print(f"\n== {part.name}: about {part.expected_s} s of {left:.0f} s left", flush=True)
            outcomes.append(_run(part, out, min(float(part.limit_s), left)))
            print(f"== {part.name}: {outcomes[-1].verdict}, {outcomes[-1].seconds:.0f} s", flush=True)
        (out / "summary.md").write_text(summary(outcomes), encoding="utf-8")
    return outcomes


def _run(part: Part, out: Path, limit_s: float) -> Outcome:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }
    started, log = time.monotonic(), out / "log.txt"
    with log.open("ab") as file:
        file.write(f"\n== {part.name}: python {shlex.join(part.arguments)}\n".encode())
        file.flush()
        begin = file.tell()
        # A session of its own, so that what it starts ends with it.
        process = subprocess.Popen(
            [sys.executable, *part.arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        exit_code: int | None = None
        try:
            exit_code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    print(*lines[-SHOWN_LINES:], sep="\n", flush=True)
    return Outcome(part, time.monotonic() - started, exit_code)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Markdown: one row a part."""
    lines = ["| part | result | seconds | expected | leaves |", "|---|---|---|---|---|"]
    lines += [
        f"| {o.part.name} | {o.verdict} | {o.seconds:.0f} | {o.part.expected_s} | {o.part.leaves} |"
        for o in outcomes
    ]
    return "\n".join(lines) + "\n"


@command(OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a part failed or found no time; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [part.name for part in parts(Path("."))]
    parser.add_argument("--out", type=Path, default=Path("runs/first_light"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=1500.0, help="for everything")
    parser.add_argument("--only", nargs="+", choices=known, default=known, help="these parts, in their order")
    parser.add_argument("--list", action="store_true", help="print the parts, and do nothing else")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    chosen = [part for part in parts(out) if part.name in options.only]
    if options.list:
        for part in chosen:
            print(f"{part.name}: {part.expected_s} s, at most {part.limit_s} s: {part.leaves or 'log.txt'}")
        return 0
    # What is asked to end ends its part too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run", file=sys.stderr)
        return 2
    outcomes = run(chosen, out, options.seconds)
    print("", summary(outcomes), f"in {options.out}", sep="\n")
    return 0 if all(o.exit_code == 0 for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
