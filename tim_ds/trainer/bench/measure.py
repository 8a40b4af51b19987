"""Agreement first, then time: what is done for one size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tim_ds.config.recipe import Recipe
from tim_ds.errors import TimError
from tim_ds.model import ops
from tim_ds.model.memory import reset_peak
from tim_ds.trainer.bench.contenders import (
    OURS,
    Checked,
    Contender,
    Field,
    Implementation,
    Objective,
    clear,
    objective_of,
)
from tim_ds.trainer.bench.work import Work
from tim_ds.trainer.flops import peak_flops, step_flops

FLOAT32_TOLERANCE: dict[Objective, float] = {"flow matching": 1e-3, "dde": 5e-3, "paired": 5e-3}
"""Of the loss of each image and of the whole gradient, relative, in float32. A central difference at 0.005
divides the rounding of F by 0.01, and is off from the derivative itself by a term of second order. On a CPU,
at the XL network's width and 8 blocks, gradients are 7e-7 and 5e-5 off."""
TIMED_TOLERANCE = {"fp32": 2e-3, "bf16_autocast": 5e-2}
"""Of the squared error of the images with r = t in the timed steps against float32: rounding of F. At 28
blocks of width 128, on a CPU, bfloat16 is 7e-4 off in ours and 3e-3 in the baseline. Where r < t a difference
in bfloat16 is mostly rounding, by measurement, and says nothing about correctness."""

STATE_BYTES = 12
"""Of a parameter between two steps: itself and AdamW's two averages, float32."""

WARM_UPS = 2
LEAST_REPETITIONS = 3

Clock = Callable[[Callable[[], Tensor]], tuple[float, Tensor]]
"""Runs a step: (milliseconds, what the step returned)."""


class ParityError(TimError):
    """A contender disagrees with the baseline; its times mean nothing."""


@dataclass(frozen=True)
class Row:
    """One contender at one size. Times in milliseconds."""

    size: str
    implementation: Implementation
    objective: Objective
    images: int
    tokens: int
    p20: float
    p50: float
    p80: float
    repetitions: int
    peak_bytes: int | None
    """Most that a step allocated beyond what was there before it, and weights and optimiser, which all share,
    once (STATE_BYTES a parameter). None on a CPU."""
    model_flops: int
    """Of a step, without what is computed twice: the same for every implementation of an objective."""
    executed_flops: int
    """With what ours computes twice."""
    mfu: float | None
    """Of the data sheet's peak; None where it is not known."""
    loss_error: float | None
    gradient_error: float | None
    """In float32 against the baseline, relative; None for what shares the baseline's own code."""
    timed_error: float
    """Of the timed steps against float32, on the images with r = t."""
    prepare_s: float
    """Comparison, compilation and warm-up, by the clock on the wall."""
    paths: dict[str, str]
    """Which kernel every operation took, ours alone."""
    allocator_retries: int
    """How often memory was given back and asked for again while timing: above 0, times are too long."""

    @property
    def images_per_s(self) -> float:
        return 1e3 * self.images / self.p50

    @property
    def key(self) -> tuple[str, str, str]:
        """What a row is about: a later measurement of the same replaces it."""
        return self.size, self.implementation, self.objective

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


RefusalKind = Literal["parity", "out of memory", "no time", "error"]


@dataclass(frozen=True)
class Refusal:
    """Why there is no row."""

    size: str
    implementation: Implementation
    objective: Objective
    kind: RefusalKind
    message: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.size, self.implementation, self.objective

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.implementation}, {self.objective}: {self.kind}: {self.message}"


@dataclass(eq=False)
class Budget:
    """Time for the whole run, by the clock on the wall."""

    seconds: float
    repetitions: int
    """At most, of each contender and size."""
    now: Callable[[], float] = time.monotonic
    spent: dict[tuple[str, str], float] = field(default_factory=dict)
    """What preparing each contender took at the size before, for one batch."""

    def __post_init__(self) -> None:
        self._end = self.now() + self.seconds

    @property
    def left(self) -> float:
        return self._end - self.now()


@dataclass(eq=False)
class _Ready:
    contender: Contender
    step: Callable[[], Tensor]
    peak_bytes: int | None
    loss_error: float | None
    gradient_error: float | None
    warm_ms: float
    """Of the last warm-up."""
    timed_error: float
    prepare_s: float = 0.0
    retries: int = 0
    times: list[float] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)


def measure(
    size: str,
    work: Work,
    field: Field,
    recipe: Recipe,
    budget: Budget,
    clock: Clock,
    *,
    sizes_left: int,
    say: Callable[[str], None] = lambda _: None,
) -> list[Row | Refusal]:
    """Every contender at one size. What fails is a refusal; the others go on.

    Args:
        sizes_left: sizes that the remaining time is for, this one included.
        say: is told what became of each contender, as soon as it is known.
    """
    race = _Race(size, work, field, recipe, budget, clock, say)
    for contender in field.contenders:
        race.prepare(contender)
    # Every size gets its share of what is left, counting preparations to come as another share.
    race.run(until=budget.left - budget.left / (sizes_left + 1))
    return [*race.refusals, *race.rows()]


class _Race:
    """The contenders at one size: prepared one after the other, then timed in turn."""

    def __init__(
        self,
        size: str,
        work: Work,
        field: Field,
        recipe: Recipe,
        budget: Budget,
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        self._size = size
        self._work = work
        self._field = field
        self._recipe = recipe
        self._budget = budget
        self._clock = clock
        self._say = say
        self._device = work.batches[0].x.device
        self._num_parameters = sum(p.numel() for p in field.parameters)
        self._comparison = _Comparison(work, field, recipe)
        self._ready: list[_Ready] = []
        self.refusals: list[Refusal] = []

    def prepare(self, contender: Contender) -> None:
        """Compare it in float32 and warm it up, if the time allows."""
        name, budget, batches = _name(contender), self._budget, len(self._work.batches)
        preparing = batches * budget.spent.get(name, 0.0)
        others = LEAST_REPETITIONS * 1e-3 * sum(one.warm_ms for one in self._ready)
        if budget.left <= preparing + others:
            message = (
                f"{budget.left:.0f} s left, expected: {preparing:.0f} s to prepare it, {others:.0f} s for "
                f"{LEAST_REPETITIONS} repetitions of the others"
            )
            self._refuse(contender, "no time", message)
            return
        start = budget.now()
        try:
            ready = _prepare(contender, self._work, self._comparison, self._clock, self._num_parameters)
        # A contender that fails for whatever reason must not cost the others their measurement.
        except Exception as error:
            self._fail(contender, error)
            return
        self._ready.append(ready)
        ready.prepare_s = budget.now() - start
        budget.spent[name] = ready.prepare_s / batches
        self._say(
            f"{self._size}, {', '.join(name)}: ready after {ready.prepare_s:.1f} s, {budget.left:.0f} s left"
        )

    def run(self, *, until: float) -> None:
        """Time what is prepared, at least LEAST_REPETITIONS times each, and on while more than `until`
        seconds are left.

        In turn, so that a clock that drifts or a busy machine meets all of them.
        """
        for number in range(max(LEAST_REPETITIONS, self._budget.repetitions)):
            if not self._ready or (number >= LEAST_REPETITIONS and self._budget.left < until):
                break
            for one in list(self._ready):
                self._time(one)

    def _time(self, one: _Ready) -> None:
        retries = _retries(self._device)
        try:
            taken, denoising = self._clock(one.step)
            one.timed_error = max(one.timed_error, self._comparison.timed_error(one.contender, denoising))
        except Exception as error:
            self._ready.remove(one)
            self._fail(one.contender, error)
            return
        one.times.append(taken)
        one.retries += _retries(self._device) - retries

    def rows(self) -> list[Row]:
        return [_row(self._size, self._work, one, self._recipe, self._device) for one in self._ready]

    def _fail(self, contender: Contender, error: Exception) -> None:
        # Its traceback would keep tensors alive.
        error.__traceback__ = None
        text = str(error).splitlines()[0] if str(error) else ""
        if isinstance(error, ParityError):
            self._refuse(contender, "parity", text)
        elif isinstance(error, torch.OutOfMemoryError):
            self._refuse(contender, "out of memory", text)
        else:
            self._refuse(contender, "error", f"{type(error).__name__}: {text}")
        clear(self._field.parameters, self._device)

    def _refuse(self, contender: Contender, kind: RefusalKind, message: str) -> None:
        self.refusals.append(Refusal(self._size, *_name(contender), kind, message))
        self._say(f"{self._size}, {self.refusals[-1]}")


def _name(contender: Contender) -> tuple[Implementation, Objective]:
    return contender.implementation, contender.objective


def cuda_clock(device: torch.device) -> Clock:
    """Times on the stream of the device, which has nothing to do when a step begins."""

    def clock(step: Callable[[], Tensor]) -> tuple[float, Tensor]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        result = step()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end), result

    return clock


def cpu_clock(step: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Processor time."""
    start = time.process_time()
    result = step()
    return 1e3 * (time.process_time() - start), result


class _Comparison:
    """What the contenders are held to: the baseline in float32, on a few images."""

    def __init__(self, work: Work, field: Field, recipe: Recipe) -> None:
        self._sample = work.sample()
        self._reference = field.reference
        self._known: dict[bool, Checked] = {}
        self._tolerance = TIMED_TOLERANCE[recipe.train.precision]
        self._places = work.places_of_sample()

    def errors(self, contender: Contender) -> tuple[float, float]:
        """Of loss and gradient in float32.

        Raises:
            ParityError: beyond tolerance.
        """
        expected = self._expected(contender)
        received = contender.check(work_of(contender, self._sample))
        loss = _largest(received.denoising, expected.denoising)
        gradient = _distance(received.gradient, expected.gradient)
        allowed = FLOAT32_TOLERANCE[contender.objective]
        # Not `error > allowed`: a NaN must be refused too.
        for what, error in (("loss", loss), ("gradient", gradient)):
            if not error <= allowed:
                raise ParityError(f"{what} in float32 is {error:.1e} off the baseline, allowed {allowed:.1e}")
        return loss, gradient

    def timed_error(self, contender: Contender, denoising: Tensor) -> float:
        """Of the squared errors that a timed step returned, against float32.

        Raises:
            ParityError: beyond tolerance, or if an image's is not finite.
        """
        if not bool(denoising.isfinite().all()):
            raise ParityError("the loss of a timed step is not finite")
        sample = work_of(contender, self._sample)
        still = torch.tensor(sample.is_diffusion, device=denoising.device)
        error = _largest(denoising[self._places][still], self._expected(contender).denoising[still])
        if not error <= self._tolerance:
            raise ParityError(
                f"the loss of a timed step is {error:.1e} off float32 where r = t, allowed "
                f"{self._tolerance:.1e}"
            )
        return error

    def _expected(self, contender: Contender) -> Checked:
        is_still = contender.objective == "flow matching"
        if is_still not in self._known:
            known = self._reference.check(work_of(contender, self._sample))
            # On the host: a step that is timed finds the device's memory as a run would.
            self._known[is_still] = Checked(
                known.denoising, {name: g.cpu() for name, g in known.gradient.items()}
            )
        return self._known[is_still]


def work_of(contender: Contender, work: Work) -> Work:
    """The images as the objective of a contender trains them."""
    return work.still() if contender.objective == "flow matching" else work


def _prepare(
    contender: Contender, work: Work, comparison: _Comparison, clock: Clock, num_parameters: int
) -> _Ready:
    device = work.batches[0].x.device
    # The baseline is the reference, and its compiled form would be compiled once more for float32.
    is_ours = contender.implementation in OURS
    loss_error, gradient_error = comparison.errors(contender) if is_ours else (None, None)
    step = contender.prepare(work_of(contender, work))
    timed_error, warm_ms, before = 0.0, 0.0, 0
    for _ in range(WARM_UPS):
        # Peak and time of the last warm-up: the first compiles, and tries kernels.
        reset_peak(device)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        warm_ms, denoising = clock(step)
        timed_error = max(timed_error, comparison.timed_error(contender, denoising))
    peak = None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before + STATE_BYTES * num_parameters
    paths = {}
    if is_ours:
        carries = contender.objective == "paired"
        paths = {op: path for op, path in ops.paths_taken().items() if carries or not op.endswith("_jvp")}
    return _Ready(
        contender, step, peak, loss_error, gradient_error, warm_ms, timed_error=timed_error, paths=paths
    )


def _row(size: str, work: Work, one: _Ready, recipe: Recipe, device: torch.device) -> Row:
    objective = objective_of(one.contender.objective, recipe.objective)
    own = work_of(one.contender, work)
    flops = step_flops(
        recipe.model,
        objective,
        own.shape,
        transition=own.transition,
        checkpointing=recipe.train.activation_checkpointing,
    )
    p20, p50, p80 = torch.quantile(
        torch.tensor(one.times, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    ).tolist()
    peak = None
    if device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name(device), recipe.train.precision)
    return Row(
        size=size,
        implementation=one.contender.implementation,
        objective=one.contender.objective,
        images=own.num_images,
        tokens=own.num_tokens,
        p20=p20,
        p50=p50,
        p80=p80,
        repetitions=len(one.times),
        peak_bytes=one.peak_bytes,
        model_flops=flops.model,
        executed_flops=flops.executed,
        mfu=None if peak is None else flops.model / (1e-3 * p50) / peak,
        loss_error=one.loss_error,
        gradient_error=one.gradient_error,
        timed_error=one.timed_error,
        prepare_s=one.prepare_s,
        paths=one.paths,
        allocator_retries=one.retries,
    )


def _largest(received: Tensor, expected: Tensor) -> float:
    """Largest relative deviation."""
    return float(((received.double() - expected.double()).abs() / expected.double().abs()).max())


def _distance(received: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of two gradients, relative, in the 2-norm; not a number if they are of different parameters."""
    if set(received) != set(expected):
        return math.nan
    square = whole = torch.zeros((), dtype=torch.float64)
    for name, gradient in received.items():
        reference = expected[name].to(gradient.device)
        square = square + (gradient - reference).double().square().sum()
        whole = whole + reference.double().square().sum()
    return math.sqrt(float(square / whole))


def _retries(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))
