"""A rank that hangs, dies or fails ends the job within the stated time, with its name."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.ranks import engine_file, free_port, start_rank
from tests.trainer.stopping import train_missing
from tim_ds.trainer.watch import LOST, Watch, _hung, is_communication
from tim_ds.trainer.world import World

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


class _Vanished:
    """A store whose host answers once and then no more, its connection being open."""

    def __init__(self) -> None:
        self._silent = False

    def set_timeout(self, *_: object) -> None: ...

    def set(self, *_: object) -> None:
        if self._silent:
            threading.Event().wait()
        self._silent = True


def test_a_store_that_neither_answers_nor_refuses_ends_the_process_in_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two(World):
        def store(self, name: str) -> Any:
            return _Vanished()

        def barrier(self) -> None: ...

    monkeypatch.setenv("MASTER_ADDR", "node1")
    codes: list[int] = []
    ended = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    began = time.monotonic()
    Watch(Two(rank=1, size=2), hung_after=1000, dead_after=0.6, end=end).start()
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
    assert is_communication(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert not is_communication(RuntimeError("CUDA out of memory"))
