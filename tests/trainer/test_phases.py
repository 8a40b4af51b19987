from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainer.conftest import Groups
from tim_ds.trainer.metrics import read_metrics
from tim_ds.trainer.phases import PhaseClock, over_ranks


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> PhaseClock:
    """A clock that advances by one second each time it is read."""
    seconds = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(seconds)))
    return PhaseClock(torch.device("cpu"))


def test_a_second_inside_an_inner_phase_counts_once(clock: PhaseClock) -> None:
    with clock.phase("outer"), clock.phase("inner"):  # outer reads 0 and 3, inner 1 and 2
        pass
    with clock.phase("outer"):
        pass
    assert clock.take() == {"inner": 1.0, "outer": 3.0 - 1.0 + 1.0}
    assert clock.take() == {}


def test_only_calls_without_gradient_in_the_forward_are_the_derivative(clock: PhaseClock) -> None:
    network = nn.Linear(2, 2)
    clock.watch(network, "derivative", inside="forward")
    x = torch.ones(1, 2)
    with clock.phase("forward"):
        network(x)
        with torch.no_grad():
            network(x)
    with clock.phase("preview"), torch.no_grad():
        network(x)
    network(x)
    # forward: 0 to 3 with the derivative from 1 to 2; preview: 4 to 5.
    assert clock.take() == {"derivative": 1.0, "forward": 2.0, "preview": 1.0}


def test_an_error_inside_a_phase_closes_it(clock: PhaseClock) -> None:
    with pytest.raises(KeyError), clock.phase("forward"):
        raise KeyError
    with clock.phase("backward"):
        pass
    assert clock.take() == {"forward": 1.0, "backward": 1.0}


def test_ranks_are_reported_by_mean_and_slowest() -> None:
    assert over_ranks([{"forward": 1.0}, {"forward": 3.0, "save": 1.0}]) == {
        "forward": {"mean": 2.0, "max": 3.0},
        "save": {"mean": 0.5, "max": 1.0},
    }


@pytest.mark.parametrize(
    ("variant", "present", "absent"),
    [
        ("zero3", {"forward_and_derivative"}, {"forward", "derivative", "teacher"}),
        ("zero3_paired", {"forward_and_derivative"}, {"forward", "derivative"}),
        ("zero3_guided", {"forward_and_derivative", "teacher"}, {"forward", "derivative"}),
    ],
)
def test_a_run_names_the_phases_that_it_can_tell_apart(
    groups: Groups, variant: str, present: set[str], absent: set[str]
) -> None:
    for line in read_metrics(Path(groups.results(2, "train_every_stage")[0][variant])):
        phases = line["speed"]["phases"]
        assert present | {"data_wait", "backward", "optimizer"} <= set(phases)
        assert not absent & set(phases)
        assert all(0 < p["mean"] <= p["max"] for p in phases.values())
        # Nothing counts twice. The ranks' clocks begin at different moments, hence the room.
        assert sum(p["mean"] for p in phases.values()) < 1.2 * line["speed"]["seconds"]


@pytest.mark.gpu
def test_on_a_device_phases_are_those_of_its_stream_and_nothing_waits() -> None:
    device = torch.device("cuda")
    clock = PhaseClock(device)
    x = torch.randn(4096, 4096, device=device)
    for _ in range(2):  # the first warms up
        clock.take()
        torch.cuda.synchronize()
        start = time.perf_counter()
        with clock.phase("forward"):
            for _ in range(50):
                x = x @ x * 1e-2
        with clock.phase("backward"):
            x = x @ x * 1e-2
        issued = time.perf_counter() - start
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
        found = clock.take()
    assert issued < 0.5 * taken
    assert found["forward"] == pytest.approx(taken, rel=0.2)
    assert 0 < found["backward"] < 0.2 * found["forward"]
