"""A rank that never starts ends the job within the stated time, with its name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.trainer.ranks import engine_file, free_port, start_rank
from tests.trainer.stopping import train_main
from tim_ds.trainer.meeting import connect, ranges
from tim_ds.trainer.watch import LOST

WITHIN_S = 1


def _start(run_dir: Path, engine: Path, shards: Path) -> None:
    sys.exit(train_main(run_dir, engine, shards, f"--start-within={WITHIN_S}"))


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ((0,), f"rank 1 of 2 did not start within {WITHIN_S} s (--start-within); there are 1 on "),
        ((1,), f"rank 0 did not start within {WITHIN_S} s: nobody answers at 127.0.0.1:"),
        ((0, 2), f"rank 1 of 3 did not start within {WITHIN_S} s (--start-within); there are 2 on "),
    ],
    ids=lambda value: f"{value} alone" if isinstance(value, tuple) else "",
)
def test_a_rank_that_does_not_start_is_named_by_all_that_did(
    tmp_path: Path, there: tuple[int, ...], message: str
) -> None:
    out, port = tmp_path / "out", free_port()
    out.mkdir()
    # Neither run folder nor shards are looked at before the ranks have met.
    arguments = (tmp_path / "run", engine_file(tmp_path, 1), tmp_path / "shards")
    size = max(2, *(rank + 1 for rank in there))
    ranks = {rank: start_rank(_start, arguments, rank, size, port, out) for rank in there}
    for rank, process in ranks.items():
        process.join(timeout=60)
        told = (out / f"output_{rank}.txt").read_text()
        assert process.exitcode == LOST, told
        assert f"error (rank {rank}): {message}" in told and "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_one_process_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert connect(0.0) is None


def test_ranks_that_follow_each_other_are_told_as_one_range() -> None:
    assert ranges([1]) == "1"
    assert ranges([0, 1, 2, 7, 9, 10]) == "0 to 2, 7, 9 to 10"
