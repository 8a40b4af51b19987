"""What is measured is right, is measured in turn, and what fails costs nobody else a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.bench.recipes import TEXT, recipe, work
from tim_ds.trainer.bench.contenders import Checked, Contender, Field, build_field
from tim_ds.trainer.bench.measure import LEAST_REPETITIONS, Budget, Refusal, Row, measure, work_of
from tim_ds.trainer.flops import step_flops

CPU = torch.device("cpu")
WANTED: Any = [("ours", "flow matching"), ("ours", "dde"), ("ours", "paired"), ("baseline", "dde")]


class Wrong:
    """A contender with a fault."""

    def __init__(self, right: Contender, fault: str) -> None:
        self.implementation: Any = right.implementation
        self.objective: Any = right.objective
        self._right, self._fault = right, fault
        self._steps = 0

    def check(self, work: Any) -> Checked:
        if self._fault == "no memory to compare":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nand much more")
        found = self._right.check(work)
        if self._fault == "loss":
            return Checked(found.denoising * torch.tensor([1.0] * 7 + [1.02]), found.gradient)
        if self._fault == "gradient":
            name = max(found.gradient, key=lambda name: float(found.gradient[name].norm()))
            return Checked(found.denoising, {**found.gradient, name: found.gradient[name] * 1.05})
        if self._fault == "lost gradient":
            return Checked(found.denoising, dict(list(found.gradient.items())[1:]))
        if self._fault == "nan":
            return Checked(found.denoising * torch.nan, found.gradient)
        return found

    def prepare(self, work: Any) -> Callable[[], Tensor]:
        step = self._right.prepare(work)

        def wrong() -> Tensor:
            self._steps += 1
            if self._fault == "no memory to step":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if self._fault == "crash":
                raise RuntimeError("no such kernel")
            if self._fault == "timed":
                return step() * 1.1
            if self._fault == "later" and self._steps > 3:
                return step() * torch.nan
            return step()

        return wrong


class FakeClock:
    """Every step takes so many milliseconds, and the wall's clock goes with it."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds, self.seconds = milliseconds, 0.0
        self.calls: list[Callable[[], Tensor]] = []

    def __call__(self, step: Callable[[], Tensor]) -> tuple[float, Tensor]:
        self.calls.append(step)
        self.seconds += 1e-3 * self.milliseconds
        return self.milliseconds, step()

    def now(self) -> float:
        return self.seconds


@pytest.fixture(scope="module")
def settings() -> Any:
    # The smallest that has all kinds of parameters: what is tested here is not the network.
    return recipe(TEXT, "model.depth=1", "model.encoder_depth=1", "model.hidden_size=16")


@pytest.fixture(scope="module")
def field(settings: Any) -> Field:
    return build_field(settings, CPU, engine="plain", wanted=WANTED)


def with_fault(field: Field, at: int, fault: str) -> Field:
    contenders: list[Contender] = list(field.contenders)
    contenders[at] = Wrong(contenders[at], fault)
    return Field(tuple(contenders), field.reference, field.engine, field.parameters)


def run(settings: Any, field: Field, clock: FakeClock, seconds: float = 1e6, **options: Any) -> Any:
    budget = options.pop("budget", None) or Budget(seconds, options.pop("repetitions", 4), clock.now)
    left = options.pop("sizes_left", 1)
    return measure("64", work(settings), field, settings, budget, clock, sizes_left=left, **options)


def test_rows_say_what_was_measured(settings: Any, field: Field) -> None:
    everything, clock = work(settings), FakeClock(2.0)
    rows = run(settings, field, clock)
    assert [(row.implementation, row.objective) for row in rows] == WANTED
    for row, contender in zip(rows, field.contenders, strict=True):
        assert (row.size, row.images, row.tokens) == ("64", 8, 40)
        assert (row.p20, row.p50, row.p80, row.repetitions) == (2.0, 2.0, 2.0, 4)
        assert row.images_per_s == pytest.approx(8 / 2e-3)
        assert row.peak_bytes is None and row.mfu is None and row.allocator_retries == 0
        own = work_of(contender, everything)
        assert row.timed_error < 1e-5 and (own.transition == ()) == (row.objective == "flow matching")
    flow, dde, paired, baseline = rows
    expected = step_flops(
        settings.model, settings.objective, everything.shape, transition=everything.transition
    )
    assert dde.model_flops == baseline.model_flops == expected.model
    assert flow.model_flops < paired.model_flops < dde.model_flops
    assert 0 < dde.loss_error < 1e-3 and 0 < dde.gradient_error < 1e-3
    assert baseline.loss_error is None and baseline.paths == {}
    assert paired.paths["swiglu_jvp"] == "torch" and "swiglu_jvp" not in flow.paths


def test_contenders_are_timed_in_turn(settings: Any, field: Field) -> None:
    clock = FakeClock(1.0)
    run(settings, field, clock, repetitions=5)
    warm, timed = clock.calls[: 2 * len(WANTED)], clock.calls[2 * len(WANTED) :]
    assert warm[::2] == warm[1::2]
    assert timed == 5 * warm[::2]


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("loss", "parity", "loss in float32 is"),
        ("gradient", "parity", "gradient in float32 is"),
        ("lost gradient", "parity", "gradient in float32 is nan"),
        ("nan", "parity", "loss in float32 is nan"),
        ("timed", "parity", "the loss of a timed step is 1.0e-01 off float32"),
        ("later", "parity", "the loss of a timed step is not finite"),
        ("no memory to compare", "out of memory", "CUDA out of memory. Tried to allocate 1 GiB."),
        ("no memory to step", "out of memory", "CUDA out of memory"),
        ("crash", "error", "RuntimeError: no such kernel"),
    ],
)
def test_what_fails_gets_no_row_and_the_others_go_on(
    settings: Any, field: Field, fault: str, kind: str, message: str
) -> None:
    said: list[str] = []
    found = run(settings, with_fault(field, 1, fault), FakeClock(1.0), repetitions=3, say=said.append)
    rows = [one for one in found if isinstance(one, Row)]
    (refused,) = (one for one in found if isinstance(one, Refusal))
    assert [(row.implementation, row.objective) for row in rows] == [WANTED[0], *WANTED[2:]]
    assert all(row.repetitions == 3 for row in rows)
    assert refused.key == ("64", "ours", "dde") and refused.kind == kind
    assert refused.message.startswith(message) and "\n" not in refused.message
    assert f"64, {refused}" in said and any(text.startswith("64, ours, paired: ready after") for text in said)
    assert all(p.grad is None for p in field.parameters)


def test_where_time_is_short_what_was_prepared_is_measured_and_the_rest_named(
    settings: Any, field: Field
) -> None:
    # A step takes 10 s, so preparing takes 20 s; three repetitions of two contenders take 60 s.
    clock = FakeClock(1e4)
    found = run(settings, field, clock, seconds=75.0, repetitions=20)
    rows = [one for one in found if isinstance(one, Row)]
    refused = [one for one in found if isinstance(one, Refusal)]
    assert [(row.implementation, row.objective) for row in rows] == WANTED[:2]
    assert [row.repetitions for row in rows] == [LEAST_REPETITIONS] * 2
    assert [one.kind for one in refused] == ["no time", "no time"]
    assert "35 s left" in refused[0].message and "60 s for 3 repetitions" in refused[0].message


def test_a_size_leaves_time_for_those_after_it(settings: Any, field: Field) -> None:
    # 8 warm-ups of 1 s; of the other 60 s a third: there are two sizes, and preparations to come.
    clock = FakeClock(1e3)
    rows = run(settings, field, clock, seconds=68.0, repetitions=1000, sizes_left=2)
    assert [row.repetitions for row in rows] == [6] * 4


def test_what_preparing_took_is_expected_of_the_next_size(settings: Any, field: Field) -> None:
    clock = FakeClock(1e3)
    budget = Budget(100.0, 3, clock.now)
    run(settings, field, clock, budget=budget)
    # Two batches of one size each.
    assert budget.spent == {pair: 1.0 for pair in WANTED}
    clock.seconds += budget.left - 1.5
    refused = run(settings, field, clock, budget=budget)
    assert all(isinstance(one, Refusal) and one.kind == "no time" for one in refused)
    assert "expected: 2 s to prepare it" in refused[0].message
