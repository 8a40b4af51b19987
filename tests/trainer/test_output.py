"""What a run prints does not end it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tim_ds.trainer.output import outlasting_readers

PRINTS = """
import logging, sys
from tqdm import tqdm
from tim_ds.trainer.output import outlasting_readers

def main():
    with outlasting_readers():
        print("begun", flush=True)
        print("begun", file=sys.stderr, flush=True)
        sys.stdin.readline()
        for step in tqdm(range(100), mininterval=0):
            print("x" * 10_000, "\\u00e4")
        print("error: this is read by nobody", file=sys.stderr)
        return 75

sys.exit(main())
"""


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_program_whose_reader_has_ended_goes_on_to_its_own_exit_code(options: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, *options, "-c", PRINTS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    assert process.stdout.readline() == b"begun\n" and process.stderr.readline() == b"begun\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"go on\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 75


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_program_whose_terminal_has_gone_goes_on_to_its_own_exit_code(options: list[str]) -> None:
    # Of a run that a shell no longer minds (`disown`): writes to a terminal that was closed fail otherwise
    # than those to a pipe.
    ours, theirs = os.openpty()
    command = [sys.executable, *options, "-c", PRINTS]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    assert process.stdin
    said = b""
    while said.count(b"begun") < 2:
        said += os.read(ours, 100)
    os.close(ours)
    process.stdin.write(b"go on\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 75


def test_what_is_read_arrives_whole(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as real:
        # Pytest has put its own in the place of Python's.
        monkeypatch.setattr(sys, "stdout", real)
        monkeypatch.setattr(sys, "__stdout__", real)
        with outlasting_readers():
            assert sys.stdout is not real
            print("x" * 100_000, "ä")
        assert sys.stdout is real
    assert capfd.readouterr().out == "x" * 100_000 + " ä\n"


def test_other_streams_stay(capsys: pytest.CaptureFixture[str]) -> None:
    stream = sys.stdout
    with outlasting_readers():
        assert sys.stdout is stream
        print("said")
    assert capsys.readouterr().out == "said\n"
