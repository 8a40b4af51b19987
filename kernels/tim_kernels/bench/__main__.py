"""Command line of the benchmark; see `tim_kernels.bench`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

import torch

from tim_kernels import bench
from tim_kernels.bench import report, tune
from tim_kernels.bench.case import MIXES, NotHere, lengths_of
from tim_kernels.bench.cases import cases
from tim_kernels.bench.measure import CudaTimer, Row, ceilings, rows

TOKENS = (1024, 4096, 8192, 16384, 65536, 262144)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tim_kernels.bench",
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = sorted({case.op for case in cases()})
    parser.add_argument("--out", type=Path, help="store the results as JSON, and plots beside it")
    parser.add_argument(
        "--append",
        action="store_true",
        help="go on from the rows in --out; what is measured again is replaced",
    )
    parser.add_argument("--render", type=Path, help="draw the plots of stored results, and do nothing else")
    parser.add_argument("--ops", nargs="+", choices=known, default=known)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--mixes", nargs="+", choices=sorted(MIXES), default=sorted(MIXES))
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled twin")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing; --render does it later")
    parser.add_argument("--measured-ms", type=float, default=200.0, help="time spent on each figure")
    parser.add_argument("--seconds", type=float, help="begin no other op or size after so long")
    parser.add_argument(
        "--tune", action="store_true", help="time schedules (stages, warps, tiles), say which to change, end"
    )
    chosen = parser.parse_args(arguments)

    if chosen.render:
        where, stored = report.load(chosen.render)
        print(report.goals(stored), *report.plot(where, stored, chosen.render), sep="\n")
        return 0
    if chosen.append and not chosen.out:
        parser.error("--append needs --out")
    measured = [case for case in cases() if case.op in chosen.ops]
    deadline = None if chosen.seconds is None else time.monotonic() + chosen.seconds
    if not torch.cuda.is_available():
        print(report.without_gpu(measured))
        if chosen.out:
            print(f"\n{chosen.out} was not written: nothing was measured", file=sys.stderr)
            return 2
        return 0

    device = torch.device("cuda", torch.cuda.current_device())
    where, refused = report.environment(device), 0
    timer = CudaTimer(device, warmup_ms=chosen.measured_ms / 4, measured_ms=chosen.measured_ms)
    print(f"ceilings: {ceilings(device, timer)}", flush=True)
    if chosen.tune:
        return tune.main(device, timer, chosen.out, where, deadline=deadline)
    found: list[Row] = []
    if chosen.append and chosen.out.exists():
        found = report.earlier(chosen.out, where)
    print(", ".join(f"{key} {value}" for key, value in where.items()), report.header(), sep="\n\n")
    # Every op at the first size before any at the second: a run that is cut short has seen them all.
    plan = [(n, mix, case) for n in chosen.tokens for mix in chosen.mixes for case in measured]
    for done, (tokens, mix, case) in enumerate(plan):
        if deadline is not None and time.monotonic() > deadline:
            print(f"stopped after {chosen.seconds:g} s: {done} of {len(plan)} measured", file=sys.stderr)
            break
        torch.compiler.reset()
        new: list[Row] = []
        for row in rows(case, mix, lengths_of(mix, tokens), device, timer, compiled=not chosen.no_compile):
            if isinstance(row, Row):
                new.append(row)
                print(report.line(row), flush=True)
            elif isinstance(row, NotHere):
                print(f"left out: {mix}, {tokens} tokens: {row}", file=sys.stderr, flush=True)
            else:
                refused += 1
                print(f"refused: {mix}, {tokens} tokens: {row}", file=sys.stderr, flush=True)
        found = report.merged(found, new)
        if chosen.out:
            # After every size: a run that is killed keeps what it has measured.
            report.store(chosen.out, where, found)
    print("", report.goals(found), sep="\n")
    if chosen.out and not chosen.no_plots:
        print(*report.plot(where, found, chosen.out), sep="\n")
    return 1 if refused else 0


if __name__ == "__main__":
    # Whoever reads the table may leave (`... | head`); then this ends as any program of a pipe does.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
