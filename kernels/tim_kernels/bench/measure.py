"""Parity first, then time: what is done for one row of the table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tim_kernels.bench.case import CAPTION, Case, Function, Inputs, NotHere
from tim_kernels.dispatch import use_path

MODES = ("forward", "backward", "full")
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9}
"""Of 16-bit results: largest deviation over largest magnitude, two roundings of it."""
CHECKED_TOKENS = 8192
"""Whole segments are compared, up to so many tokens: they are independent, and float64 is large."""


class ParityError(ValueError):
    """An implementation disagrees with the twin in float64; its times mean nothing."""


class Failed(RuntimeError):
    """An implementation that raised: a compiler that gave up, memory that did not suffice."""


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds."""

    p20: float
    p50: float
    p80: float


class Timer(Protocol):
    def __call__(self, run: Callable[[], object]) -> Quantiles: ...


HEAD_START_MS = 0.2
"""How long the device waits before every run, so that the host has handed it all of the run's launches."""


class CudaTimer:
    """Times with CUDA events; the second-level cache is overwritten before every run.

    What the host takes to launch is not counted, unless it exceeds HEAD_START_MS: the device is held back
    between the two events' queueing and the first of them.
    """

    def __init__(self, device: torch.device, *, warmup_ms: float = 50.0, measured_ms: float = 200.0) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device=device)
        # In cycles of its clock, kHz; builds of PyTorch that do not tell it meet about 2 GHz.
        self._head_start = int(HEAD_START_MS * getattr(properties, "clock_rate", 2_000_000))
        self._warmup_ms, self._measured_ms = warmup_ms, measured_ms

    def __call__(self, run: Callable[[], object]) -> Quantiles:
        run()
        once = max(min(self._times(run, 3)), 1e-3)
        self._times(run, max(3, int(self._warmup_ms / once)))
        times = torch.tensor(self._times(run, min(1000, max(20, int(self._measured_ms / once)))))
        return Quantiles(*torch.quantile(times, torch.tensor([0.2, 0.5, 0.8])).tolist())

    def _times(self, run: Callable[[], object], count: int) -> list[float]:
        pairs = []
        for _ in range(count):
            self._flush.zero_()
            torch.cuda._sleep(self._head_start)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


def ceilings(device: torch.device, timer: Timer, *, copied_bytes: int = 2**32, side: int = 8192) -> str:
    """What this device reaches at best: bandwidth of a large copy, and of a large bfloat16 product on random
    numbers, the TFLOP/s."""
    copied = timer(_copy(copied_bytes, device)).p50
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = timer(lambda: a @ b).p50
    bandwidth, arithmetic = copied_bytes / copied / 1e6, 2 * side**3 / product / 1e9
    return f"a copy moves {bandwidth:.0f} GB/s, a product of {side} x {side} makes {arithmetic:.0f} TFLOP/s"


@dataclass(frozen=True)
class Row:
    """One line of the results. Times in milliseconds; bandwidth by the byte model, in GB/s."""

    op: str
    label: str
    mix: str
    tokens: int
    mode: str
    candidate: str
    same_function: bool
    """False for a yardstick: it does a part of the work and is not checked."""
    p20: float
    p50: float
    p80: float
    model_bytes: int
    gb_per_s: float | None
    share_of_copy: float | None
    """Of the bandwidth of a copy of as many bytes, timed in the same run. None for a yardstick, and where
    arithmetic bounds the op."""
    peak_bytes: int | None
    """Allocated by a forward and backward beyond the inputs, in the rows of mode full; of a tangent by its
    forward."""
    parity_error: float | None
    tflop_per_s: float | None = None
    """Where arithmetic bounds the op."""

    @property
    def key(self) -> tuple[str, ...]:
        """What a row is about: a later measurement of the same replaces it."""
        return self.op, self.label, self.mix, str(self.tokens), self.mode, self.candidate

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def candidates(case: Case, *, compiled: bool) -> dict[str, tuple[Function, bool]]:
    """Name -> (function, whether it computes the same)."""
    found: dict[str, tuple[Function, bool]] = {"ours": (case.ours, True), "twin": (case.twin, True)}
    if compiled:
        # Static shapes: the best that compilation can do, and a compilation for each size.
        found["twin, compiled"] = (torch.compile(case.twin, dynamic=False), True)
    found |= {name: (f, True) for name, f in case.libraries.items()}
    return found | {name: (f, False) for name, f in case.yardsticks.items()}


def outputs_and_gradients(
    case: Case, function: Function, inputs: Inputs, cotangents: Sequence[Tensor], plan: Any
) -> dict[str, tuple[str | int, Tensor]]:
    """Name -> (leading axis, value) of every output and of the gradient of every input that takes one."""
    outputs = function(inputs, plan)
    leaves = {name: inputs[name] for name, spec in case.specs.items() if spec.gradient}
    gradients = torch.autograd.grad(outputs, list(leaves.values()), list(cotangents)) if leaves else ()
    found: dict[str, tuple[str | int, Tensor]] = {
        f"output {i}": (case.outputs_axis, y.detach()) for i, y in enumerate(outputs)
    }
    for name, gradient in zip(leaves, gradients, strict=True):
        found[f"gradient of {name}"] = (case.specs[name].axis, gradient)
    return found


def check(case: Case, function: Function, lengths: tuple[int, ...], device: torch.device) -> float:
    """Compare with the twin in float64, and return the largest error.

    Raises:
        ParityError: if an output or a gradient is beyond tolerance.
    """
    plan, inputs = case.plan(lengths, device), case.inputs(lengths, device)
    chosen = _chosen_segments(lengths)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    index: dict[str | int, Any] = defaultdict(
        lambda: slice(None),
        {
            "S": torch.tensor(chosen, device=device),
            "T": torch.cat([torch.arange(starts[s], starts[s + 1], device=device) for s in chosen]),
            "L": torch.cat([torch.arange(s * CAPTION, (s + 1) * CAPTION, device=device) for s in chosen]),
        },
    )
    rows = index[case.outputs_axis]
    # What is not compared gives no gradient, so that sums over the whole pack can be compared.
    cotangents = [
        torch.zeros_like(c).index_copy(0, rows, c[rows]) for c in cotangents_of(function, inputs, plan)
    ]
    ours = outputs_and_gradients(case, function, inputs, cotangents, plan)

    wide = {
        name: _wide(x.detach()[index[case.specs[name].axis]]).requires_grad_(x.requires_grad)
        for name, x in inputs.items()
    }
    wide_cotangents = [c[rows].double() for c in cotangents]
    chosen_plan = case.plan([lengths[s] for s in chosen], device)
    truth = outputs_and_gradients(case, case.twin, wide, wide_cotangents, chosen_plan)

    worst = 0.0
    for name, (axis, y) in ours.items():
        expected = truth[name][1]
        deviation = (y[index[axis]].double() - expected).abs().max()
        error = float(deviation / expected.abs().max().clamp_min(1e-30))
        # Not `error > tolerance`: a NaN must be refused too.
        tolerance = TOLERANCE.get(y.dtype, case.float32_tolerance)
        if not error <= tolerance:
            raise ParityError(f"{case.name}: {name}: error {error:.1e}, allowed {tolerance:.1e}")
        worst = max(worst, error)
    return worst


def rows(
    case: Case, mix: str, lengths: tuple[int, ...], device: torch.device, timer: Timer, *, compiled: bool
) -> Iterator[Row | ParityError | NotHere | Failed]:
    """Measure every candidate at one size. One that fails its check or raises yields the error and no row."""
    copies: dict[int, Quantiles] = {}
    for name, (function, same_function) in candidates(case, compiled=compiled).items():
        try:
            with use_path("triton" if name == "ours" else "torch"):
                error = check(case, function, lengths, device) if same_function else None
                yield from _timed(case, mix, lengths, device, timer, name, function, error, copies)
        except (ParityError, NotHere) as problem:
            yield problem
        # Compilers and libraries raise what they like; the others are to be measured all the same.
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            yield Failed(f"{case.name}: {name}: {type(error).__name__}: {first_line}")


def _timed(
    case: Case,
    mix: str,
    lengths: tuple[int, ...],
    device: torch.device,
    timer: Timer,
    name: str,
    function: Function,
    error: float | None,
    copies: dict[int, Quantiles],
) -> Iterator[Row]:
    plan, inputs = case.plan(lengths, device), case.inputs(lengths, device)
    cotangents = cotangents_of(function, inputs, plan)
    leaves = [x for x in inputs.values() if x.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        return function(inputs, plan)

    def full() -> object:
        return torch.autograd.grad(forward(), leaves, cotangents, allow_unused=True)

    def forward_without_graph() -> object:
        with torch.no_grad():
            return forward()

    runs: dict[str, Callable[[], object]] = {"forward": forward_without_graph}
    tokens = sum(lengths)
    model = {"forward": case.forward_bytes_per_token * tokens}
    flops = {"forward": 0.0 if case.flops is None else float(case.flops(lengths))}
    if case.backward_bytes_per_token is not None:
        peak = _peak_bytes(full, device)
        outputs = forward()
        runs["backward"] = lambda: torch.autograd.grad(
            outputs, leaves, cotangents, retain_graph=True, allow_unused=True
        )
        runs["full"] = full
        model["backward"] = case.backward_bytes_per_token * tokens
        model["full"] = model["forward"] + model["backward"]
        flops["backward"] = case.backward_per_forward * flops["forward"]
        flops["full"] = flops["forward"] + flops["backward"]
    else:
        peak = _peak_bytes(forward_without_graph, device)
    for mode, run in runs.items():
        taken = timer(run)
        if model[mode] not in copies:
            copies[model[mode]] = timer(_copy(model[mode], device))
        copy = copies[model[mode]]
        by_bytes = error is not None and case.flops is None
        yield Row(
            case.op,
            case.label,
            mix,
            tokens,
            mode,
            name,
            error is not None,
            taken.p20,
            taken.p50,
            taken.p80,
            model[mode],
            model[mode] / taken.p50 / 1e6 if by_bytes else None,
            copy.p50 / taken.p50 if by_bytes else None,
            peak if mode == list(runs)[-1] else None,
            error,
            flops[mode] / taken.p50 / 1e9 if error is not None and case.flops is not None else None,
        )


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _chosen_segments(lengths: tuple[int, ...]) -> list[int]:
    """The first, the last, and others in between while they fit."""
    chosen = {0, len(lengths) - 1}
    for s in range(len(lengths)):
        if sum(lengths[i] for i in chosen | {s}) <= CHECKED_TOKENS:
            chosen.add(s)
    return sorted(chosen)


def cotangents_of(function: Function, inputs: Inputs, plan: Any) -> list[Tensor]:
    with torch.no_grad():
        outputs = function(inputs, plan)
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs]


def _copy(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads half of the bytes and writes the other half."""
    source = torch.empty(max(1, num_bytes // 2), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before
