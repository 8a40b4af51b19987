"""A rank that hangs, dies or fails ends the job within the stated time, with its name."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest

from tests.trainer.ranks import engine_file, free_port, start_rank
from tests.trainer.stopping import end_missing, start_missing, train_missing
from tim_ds.trainer.meeting import Connection
from tim_ds.trainer.watch import LOST, Watch, _hung, is_communication

MESSAGES = {
    "hangs": "the others wait for: rank {rank} (process",
    "dies": "no sign of life for 6 s: rank {rank} (process",
    "fails": "rank {rank} failed: ZeroDivisionError: one rank divided by zero",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_a_missing_rank_is_named_and_ends_the_job_in_time(tmp_path: Path, shards: Path, what: str) -> None:
    out, port, missing = tmp_path / "out", free_port(), 1
    out.mkdir()
    arguments = (what, missing, tmp_path / "run", engine_file(tmp_path, 3), shards)
    ranks = [start_rank(train_missing, arguments, rank, 2, port, out) for rank in range(2)]
    # Into the third step (30 s on a busy machine), then the limits of `LIMITS`.
    ranks[0].join(timeout=60)
    other = (out / "output_0.txt").read_text()
    assert ranks[0].exitcode == LOST, other
    assert MESSAGES[what].format(rank=missing) in other
    ranks[1].join(timeout=10)
    assert ranks[1].exitcode == {"hangs": LOST, "dies": -signal.SIGKILL, "fails": 1}[what]
    if what == "hangs":
        assert "after step 2" in other and "in hang" in other, "where it stands is told"
        assert "time.sleep(1000)" in (out / "output_1.txt").read_text(), "the stack of the rank itself"


@pytest.mark.parametrize("what", MESSAGES)
def test_a_rank_that_goes_missing_before_there_is_a_process_group_is_named(tmp_path: Path, what: str) -> None:
    """When all have met: the group itself would wait for half an hour, and name nobody."""
    out, port, missing = tmp_path / "out", free_port(), 1
    out.mkdir()
    arguments = (what, missing, tmp_path / "run", engine_file(tmp_path, 1), tmp_path / "shards")
    ranks = [start_rank(start_missing, arguments, rank, 2, port, out) for rank in range(2)]
    ranks[0].join(timeout=60)
    other = (out / "output_0.txt").read_text()
    assert ranks[0].exitcode == LOST, other
    if what == "hangs":
        assert "no rank has advanced for 8 s, all in the same phase: rank 0 (process" in other
        assert "last seen in process group after step 0" in other and "; rank 1 (process" in other
        assert "stopping.py" in other and "in hang" in other, "where it stands is told"
    else:
        assert MESSAGES[what].format(rank=missing) in other
    ranks[1].join(timeout=10)
    assert ranks[1].exitcode == {"hangs": LOST, "dies": -signal.SIGKILL, "fails": 1}[what]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["hangs", "dies"])
def test_a_rank_that_goes_missing_after_the_last_step_is_named(
    tmp_path: Path, shards: Path, what: str
) -> None:
    out, port, missing = tmp_path / "out", free_port(), 1
    out.mkdir()
    arguments = (what, missing, tmp_path / "run", engine_file(tmp_path, 1), shards)
    ranks = [start_rank(end_missing, arguments, rank, 2, port, out) for rank in range(2)]
    ranks[0].join(timeout=90)
    other = (out / "output_0.txt").read_text()
    assert ranks[0].exitcode == LOST, other
    assert MESSAGES[what].format(rank=missing) in other
    ranks[1].join(timeout=10)


@pytest.mark.slow
def test_when_rank_0_dies_the_others_say_so(tmp_path: Path, shards: Path) -> None:
    """It keeps the store that the ranks write to."""
    out, port = tmp_path / "out", free_port()
    out.mkdir()
    arguments = ("dies", 0, tmp_path / "run", engine_file(tmp_path, 1), shards)
    ranks = [start_rank(train_missing, arguments, rank, 2, port, out) for rank in range(2)]
    ranks[0].join(timeout=45)
    assert ranks[0].exitcode == -signal.SIGKILL
    ranks[1].join(timeout=20)
    other = (out / "output_1.txt").read_text()
    assert ranks[1].exitcode == LOST, other
    assert "error (rank 1): rank 0, or the launcher, has ended without a word" in other


class _Kept:
    """A store that is a dictionary; the connection that leads to it."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size = rank, 2
        self.values: dict[str, bytes] = {}

    def own_store(self, name: str) -> Any:
        return self

    def set_timeout(self, *_: object) -> None: ...

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def compare_set(self, key: str, _: str, value: str) -> None:
        self.values.setdefault(key, value.encode())

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]


class _Vanished(_Kept):
    """Its host answers once and then no more, the connection being open."""

    def set(self, key: str, value: str) -> None:
        if self.values:
            threading.Event().wait()
        super().set(key, value)


def watched(connection: _Kept, **limits: float) -> tuple[Watch, threading.Event, list[int]]:
    codes: list[int] = []
    ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    watch = Watch(**limits, end=end)  # type: ignore[arg-type]  # the limits are numbers
    watch.start(cast(Connection, connection))
    return watch, ended, codes


def test_who_gets_on_within_a_phase_is_not_taken_for_one_that_hangs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An evaluation of hours, captions without end, an export to a slow disk."""
    store = _Kept(0)
    watch, ended, codes = watched(store, hung_after=1.5, dead_after=1000)
    other = {"place": [0, 0, "start"], "moves": 0, "line": "f.py:1 in f", "host": "a", "pid": 5}
    # Nobody is judged before all are there.
    assert not ended.wait(1.8)
    store.set("beat/1", json.dumps(other))
    for _ in range(4):
        watch.moved()
        assert not ended.wait(0.45)
    # The other may as well.
    for moves in range(4):
        store.set("beat/1", json.dumps({**other, "moves": moves}))
        assert not ended.wait(0.45)
    assert ended.wait(20)
    assert codes == [LOST]
    assert "no rank has advanced for 1.5 s, all in the same phase: rank 0" in capsys.readouterr().err


def test_a_store_that_neither_answers_nor_refuses_ends_the_process_in_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node1")
    began = time.monotonic()
    _, ended, codes = watched(_Vanished(1), hung_after=1000, dead_after=0.6)
    assert ended.wait(20)
    assert time.monotonic() - began > 0.6
    assert codes == [LOST]
    said = capsys.readouterr().err
    assert (
        "error (rank 1): no sign of life for 0.6 s of the host of rank 0, or of the launcher (node1)" in said
    )


def test_the_rank_that_is_furthest_behind_is_named() -> None:
    def beat(step: int, entered: int) -> dict[str, object]:
        return {"place": [step, entered, "backward"], "line": "f.py:1 in f", "host": "a", "pid": 5}

    told = _hung({0: beat(7, 4), 1: beat(7, 3), 2: beat(7, 4), 3: beat(7, 3)}, 60)
    assert "the others wait for: rank 1 (" in told and "; rank 3 (" in told
    assert "rank 0" not in told and "rank 2" not in told
    assert "all in the same phase: rank 0" in _hung({0: beat(7, 4), 1: beat(7, 4)}, 60)
    # Where all are in one phase, the one that is elsewhere than most.
    told = _hung({0: beat(7, 4), 1: {**beat(7, 4), "line": "read.py:9 in read"}, 2: beat(7, 4)}, 60)
    assert "all in the same phase, the others at f.py:1 in f: rank 1 (" in told
    assert "rank 0" not in told and "rank 2" not in told
    assert is_communication(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert not is_communication(RuntimeError("CUDA out of memory"))
