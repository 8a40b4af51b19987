"""Lines and scalars that a disk refuses are kept, in order, and written when it takes them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.small_files import small_files
from tim_ds.trainer.board import Board
from tim_ds.trainer.line_file import LineFile


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_lines_that_a_full_disk_cuts_or_refuses_are_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lines"
    file, plain, room = LineFile(path), os.write, [15]

    def write(handle: int, content: Any) -> int:
        taken = bytes(content)[: room[0]]
        room[0] -= len(taken)
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(handle, taken)

    monkeypatch.setattr(os, "write", write)
    for n in range(5):
        file.add({"n": n})
    # The second line was cut off in the middle; a torn one would end what is read of the file.
    assert numbers(path) == [0] and file.held == 4
    monkeypatch.undo()
    file.add({"n": 5})
    assert numbers(path) == [0, 1, 2, 3, 4, 5] and file.held == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "No space left" in said[0] and "nothing is missing" in said[1]


def test_a_line_that_an_earlier_process_left_torn_takes_none_of_the_next_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"n": 0}\n{"n": 1')
    file = LineFile(path)
    file.add({"n": 2})
    file.close()
    assert path.read_text().splitlines() == ['{"n": 0}', '{"n": 1', '{"n": 2}']


def test_lines_that_only_the_flush_refuses_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    file = LineFile(path)
    file.add({"n": 0})
    file.write(flush=True)

    def refused(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refused)
    file.add({"n": 1})
    file.write(flush=True)
    monkeypatch.undo()
    # What the disk did with them is not known.
    path.write_bytes(path.read_bytes()[:-4])
    file.add({"n": 2})
    assert numbers(path) == [0, 1, 2]


def test_a_file_that_is_deleted_comes_back_with_all_its_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run" / "lines"
    path.parent.mkdir()
    file = LineFile(path)
    file.add({"n": 0})
    path.unlink()
    path.parent.rmdir()
    file.add({"n": 1})
    file.take_up()
    assert not path.exists() and file.held == 1
    path.parent.mkdir()
    file.take_up()
    file.write()
    assert numbers(path) == [0, 1]
    # One that somebody replaced is gone on with.
    other = tmp_path / "other"
    other.write_text('{"n": 7}\n')
    other.replace(path)
    file.add({"n": 2})
    assert numbers(path) == [7]
    file.take_up()
    file.close()
    assert numbers(path) == [7, 2]


def test_lines_that_are_lost_in_the_end_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = LineFile(tmp_path / "lines")
    (tmp_path / "lines").unlink()
    for n in range(3):
        file.add({"n": n})
    file.close()
    assert "3 lines are lost" in caplog.text


def test_scalars_that_a_disk_refused_are_on_the_board_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    traces: list[object] = []
    monkeypatch.setattr("threading.excepthook", traces.append)
    board = Board(tmp_path, None)
    board.scalar("loss", 1.0, 1)
    board.flush()
    with small_files(4096):
        for step in range(2, 200):
            board.scalar("loss", 1.0 / step, step)
        # In the middle of the file; and again, with the new one.
        board.flush()
        board.flush()
    board.flush()
    board.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == list(range(1, 200))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("tim_ds")]
    assert len(said) == 2 and "File too large" in said[0] and said[1].endswith("written again")
    assert traces == [], "the trace of TensorBoard's own thread is not printed besides"
