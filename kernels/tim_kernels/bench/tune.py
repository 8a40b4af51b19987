"""Which schedules are fastest on this GPU: `python -m tim_kernels.bench --tune`.

Each kernel of `schedule.CANDIDATES` runs under each of its schedules, at the forms that a step launches most,
and is compared with what it computes under today's. Nothing is chosen at run time: what this prints last says
which entry of `SCHEDULES` to change to what, or to keep it. Stages alone change no bit of a result; where
they do, the row says so, and the pipeline is not to be trusted.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tim_kernels.bench.case import Case, Inputs, lengths_of
from tim_kernels.bench.cases import cases
from tim_kernels.bench.measure import TOLERANCE, Timer, cotangents_of, outputs_and_gradients
from tim_kernels.dispatch import use_path
from tim_kernels.schedule import CANDIDATES, RUN, SCHEDULES, Schedule, use_schedule

SIZES = (("mixed", 65536),)
ATTENTION_SIZES = (("mixed", 16384), ("uniform", 16384), ("small", 16384))
"""Packs that are timed: (mix, tokens); where memory binds, the size of the goals."""
LEFT_OUT = ("norm only", "bfloat16 stream", ", k, v, ")
"""Forms that are launched seldom beside the others of their op."""
AHEAD_SECONDS = 60.0
"""Longest time spent on compiling before the first figure is taken."""
LEAST_GAIN = 0.02
"""Of time, for which an entry is changed; also no less than today's schedule differs from itself."""
FORMS = (
    *("width 1152, stream fp32, h bf16, with residual", "width 1152, stream fp32, branch bf16"),
    *("q, k, v with shift, 16 heads of 72", " q, 16 heads of 72"),
    *("self, 16 heads of 72", "cross, 16 heads of 72, bf16, with logsumexp"),
)
"""In the labels of `shipped.py`: what is timed, and hence worth compiling beforehand."""


@dataclass(frozen=True)
class Timed:
    """One schedule at one size; `problem` says why it was not timed."""

    kernel: str
    label: str
    mix: str
    tokens: int
    schedule: tuple[int, ...]
    p50: float | None
    tflop_per_s: float | None = None
    problem: str | None = None
    remark: str | None = None

    @property
    def column(self) -> tuple[str, str, int]:
        return self.label, self.mix, self.tokens


@dataclass(frozen=True)
class Verdict:
    """What the times of one kernel say. Gain and spread: shares of the time under today's schedule."""

    kernel: str
    today: Schedule
    fastest: Schedule
    gain: float
    spread: float
    """By how much today's schedule, timed first and last, differs from itself."""

    @property
    def is_change(self) -> bool:
        return self.fastest != self.today and self.gain > max(LEAST_GAIN, self.spread)

    def __str__(self) -> str:
        entry = f'SCHEDULES["{self.kernel}"]'
        if self.is_change:
            return (
                f"change {entry} from {self.today} to {self.fastest}: {self.gain:.1%} less time, "
                f"spread {self.spread:.1%}"
            )
        found = "fastest of all"
        if self.fastest != self.today:
            found = f"{self.fastest} takes {self.gain:.1%} less time, not beyond doubt"
        return f"keep {entry} at {self.today}: {found}, spread {self.spread:.1%}"


def main(
    device: torch.device,
    timer: Timer,
    out: Path | None,
    where: dict[str, Any],
    *,
    deadline: float | None = None,
) -> int:
    """Time every candidate and say what to change; exit code 1 if one was refused or gave other bits."""
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    begin, capability = time.monotonic(), torch.cuda.get_device_capability(device)
    compile_ahead(10 * capability[0] + capability[1])
    print(f"compiled beforehand in {time.monotonic() - begin:.0f} s", flush=True)
    found: list[Timed] = []
    verdicts: list[Verdict] = []
    left_out = []
    for kernel in CANDIDATES:
        own = []
        for case, mode, mix, tokens in columns(kernel, cases()):
            if deadline is not None and time.monotonic() > deadline:
                left_out.append(f"{kernel}: {case.label}, {mix}, {tokens} tokens")
                continue
            own += timed(kernel, case, mode, mix, lengths_of(mix, tokens), device, timer)
        if not own:
            continue
        found += own
        verdicts.append(verdict(kernel, own))
        print("", f"## {kernel}", "", table(own), "", verdicts[-1], sep="\n", flush=True)
        if out is not None:
            # After every kernel: a run that is killed keeps what it has measured.
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(stored(where, found, verdicts), indent=1) + "\n")
    print("", "In kernels/tim_kernels/schedule.py:", *verdicts, sep="\n")
    wrong = [x for x in found if x.problem or x.remark]
    for x in wrong:
        print(f"{x.kernel}, {x.label}, {x.mix}, {x.schedule}: {x.problem or x.remark}")
    for text in left_out:
        print(f"no time was left for {text}")
    return 1 if wrong else 0


def stored(where: dict[str, Any], found: Sequence[Timed], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The results file."""
    return {
        "environment": where,
        "verdicts": [
            {"kernel": v.kernel, "today": v.today._asdict(), "fastest": v.fastest._asdict(), "gain": v.gain}
            | {"spread": v.spread, "change": v.is_change, "text": str(v)}
            for v in verdicts
        ],
        "timed": [asdict(x) for x in found],
    }


def compile_ahead(architecture: int) -> None:
    """Fill Triton's cache on all cores: one process would compile for minutes between the times it takes."""
    from tim_kernels.shipped import candidates, variants

    chosen = [
        (i, architecture)
        for i, v in enumerate([*variants(), *candidates()])
        if v.kernel_name in CANDIDATES and any(form in f" {v.label}" for form in FORMS)
    ]
    workers = min(len(chosen), len(os.sched_getaffinity(0)))
    # New processes: one that is forked from a user of CUDA may not use it.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    # What is not ready by then is compiled where it is launched.
    wait([pool.submit(_compile, x) for x in chosen], timeout=AHEAD_SECONDS)
    pool.shutdown(wait=False, cancel_futures=True)


def _compile(chosen: tuple[int, int]) -> None:
    from tim_kernels import aot
    from tim_kernels.shipped import candidates, variants

    index, architecture = chosen
    try:
        aot.fill_cache([*variants(), *candidates()][index], architecture)
    # It is named where it is launched.
    except Exception:
        return


def columns(kernel: str, known: Sequence[Case]) -> Iterator[tuple[Case, str, str, int]]:
    """(case, forward or backward, mix, tokens) at which a kernel is timed."""
    for case in known:
        if any(form in case.label for form in LEFT_OUT) or case.op == "varlen_attention":
            continue
        for mode in ("forward",) if case.backward_bytes_per_token is None else ("forward", "backward"):
            name = case.op if case.backward_bytes_per_token is None else f"{case.op} {mode}"
            # How many rows a program takes concerns all that go along rows.
            if name == kernel or (kernel == RUN and name in CANDIDATES and case.flops is None):
                for mix, tokens in ATTENTION_SIZES if case.flops is not None else SIZES:
                    yield case, mode, mix, tokens


def timed(
    kernel: str,
    case: Case,
    mode: str,
    mix: str,
    lengths: tuple[int, ...],
    device: torch.device,
    timer: Timer,
) -> Iterator[Timed]:
    """Every schedule at one size, today's first and last. One that disagrees with today's is not timed."""
    inputs, today = case.inputs(lengths, device), SCHEDULES[kernel]
    cotangents = cotangents_of(case.ours, inputs, case.plan(lengths, device))
    expected: dict[str, Tensor] = {}
    for schedule in (today, *(x for x in CANDIDATES[kernel] if x != today), today):
        name = (kernel, f"{case.label}, {mode}", mix, sum(lengths), tuple(schedule))
        with use_schedule(kernel, schedule), use_path("triton"):
            try:
                # A chunk's rows are decided when the plan is made.
                plan = case.plan(lengths, device)
                run = _run_of(case, mode, inputs, cotangents, plan)
                results = {
                    name: y
                    for name, (_, y) in outputs_and_gradients(
                        case, case.ours, inputs, cotangents, plan
                    ).items()
                }
                expected = expected or results
                off = _deviation(results, expected, case)
                if off is not None:
                    yield Timed(*name, None, problem=f"off by {off:.1e} from today's")
                    continue
                remark = None
                if _differ_in_stages_alone(schedule, today):
                    others = [key for key, y in results.items() if not torch.equal(y, expected[key])]
                    remark = f"other bits than today's: {', '.join(others)}" if others else None
                taken = timer(run).p50
            # A schedule that this GPU has no room for is a result too.
            except Exception as error:
                first_line = str(error).strip().partition("\n")[0]
                yield Timed(*name, None, problem=f"{type(error).__name__}: {first_line}")
                continue
        flops = None if case.flops is None else case.flops(lengths) / taken / 1e9
        yield Timed(*name, taken, flops, remark=remark)


def _run_of(
    case: Case, mode: str, inputs: Inputs, cotangents: Sequence[Tensor], plan: Any
) -> Callable[[], object]:
    if mode == "backward":
        outputs = case.ours(inputs, plan)
        leaves = [x for x in inputs.values() if x.requires_grad]
        return lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)

    def forward() -> object:
        with torch.no_grad():
            return case.ours(inputs, plan)

    return forward


def _deviation(results: dict[str, Tensor], expected: dict[str, Tensor], case: Case) -> float | None:
    """The largest over the results, in units of their magnitude, if it is beyond what rounding explains."""
    worst = None
    for name, y in results.items():
        truth = expected[name].float()
        error = float((y.float() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))
        # Not `error > tolerance`: a NaN must be refused too.
        if not error <= TOLERANCE.get(y.dtype, case.float32_tolerance):
            worst = error if worst is None or not error <= worst else worst
    return worst


def _differ_in_stages_alone(a: Schedule, b: Schedule) -> bool:
    return a != b and "stages" in a._fields and a._replace(stages=0) == b._replace(stages=0)


def verdict(kernel: str, found: Sequence[Timed]) -> Verdict:
    """From the geometric mean over the columns in which a schedule was timed; it must have been in all."""
    today = SCHEDULES[kernel]
    all_columns = list(dict.fromkeys(x.column for x in found))
    of_today = {
        c: [x.p50 for x in found if x.column == c and x.schedule == tuple(today) and x.p50 is not None]
        for c in all_columns
    }
    logs: dict[Schedule, list[float]] = {}
    for schedule in CANDIDATES[kernel]:
        logs[schedule] = [
            math.log(x.p50 / (sum(of_today[x.column]) / len(of_today[x.column])))
            for x in found
            if x.schedule == tuple(schedule) and x.p50 is not None and of_today[x.column]
        ]
    means = {
        schedule: sum(own) / len(own)
        for schedule, own in logs.items()
        if own and len(own) >= len(all_columns)
    }
    means[today] = 0.0
    fastest = min(means, key=lambda schedule: means[schedule])
    spread = max((max(times) / min(times) - 1 for times in of_today.values() if times), default=0.0)
    return Verdict(kernel, today, fastest, 1 - math.exp(means[fastest]), spread)


def table(found: Sequence[Timed]) -> str:
    """Markdown, of one kernel: a row a schedule, a column a form and size, the fastest of each in bold."""
    all_columns = list(dict.fromkeys(x.column for x in found))
    lines = [f"{n}: {label}, {mix}, {tokens} tokens" for n, (label, mix, tokens) in enumerate(all_columns, 1)]
    fields = ", ".join(SCHEDULES[found[0].kernel]._fields)
    lines += ["", f"| {fields} | {' | '.join(f'{n}' for n, _ in enumerate(all_columns, 1))} |"]
    lines.append("|---" * (len(all_columns) + 1) + "|")
    best = [min((x.p50 or math.inf for x in found if x.column == c), default=math.inf) for c in all_columns]
    rows: list[list[Timed]] = []
    for c in all_columns:
        for i, x in enumerate(x for x in found if x.column == c):
            if i == len(rows):
                rows.append([])
            rows[i].append(x)
    for row in rows:
        cells = []
        for x, least in zip(row, best, strict=False):
            speed = x.problem or f"{1e3 * (x.p50 or 0):.1f} us"
            speed += f", {x.tflop_per_s:.0f} TFLOP/s" if x.tflop_per_s else ""
            speed += f" ({x.remark})" if x.remark else ""
            cells.append(f"**{speed}**" if x.p50 == least else speed)
        lines.append(f"| {', '.join(map(str, row[0].schedule))} | {' | '.join(cells)} |")
    return "\n".join(lines)
