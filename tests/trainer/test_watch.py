"""A rank that hangs, dies or fails ends the job within the stated time, with its name."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.trainer.ranks import engine_file, free_port, start_rank
from tests.trainer.stopping import train_missing
from tim_ds.trainer.watch import LOST, _hung, is_communication

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


def test_the_rank_that_is_furthest_behind_is_named() -> None:
    def beat(step: int, entered: int) -> dict[str, object]:
        return {"place": [step, entered, "backward"], "line": "f.py:1 in f", "host": "a", "pid": 5}

    told = _hung({0: beat(7, 4), 1: beat(7, 3), 2: beat(7, 4), 3: beat(7, 3)}, 60)
    assert "the others wait for: rank 1 (" in told and "; rank 3 (" in told
    assert "rank 0" not in told and "rank 2" not in told
    assert "all in the same phase: rank 0" in _hung({0: beat(7, 4), 1: beat(7, 4)}, 60)
    assert is_communication(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert not is_communication(RuntimeError("CUDA out of memory"))
