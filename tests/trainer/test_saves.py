"""A run goes on where a save cannot be written, says so, and saves again; only its last one must succeed."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import numpy as np
import pytest
import torch
from tqdm import tqdm

from tests.trainer.conftest import Groups
from tests.trainer.disks import BadDisk
from tests.trainer.test_checkpoint import Held, pieces
from tim_ds.errors import CheckpointError
from tim_ds.trainer import saves as saves_module
from tim_ds.trainer.checkpoint import find_checkpoints
from tim_ds.trainer.checkpoint_folder import CheckpointFolder
from tim_ds.trainer.events import Events, read_events
from tim_ds.trainer.loop import LossyStream, Progress
from tim_ds.trainer.metrics import read_metrics
from tim_ds.trainer.preview import Previews
from tim_ds.trainer.run_folder import FolderTakenError, RunFolder, held_by_this_run
from tim_ds.trainer.saves import Saves
from tim_ds.trainer.world import World


def saves_of(run: Path, **settings: Any) -> Saves:
    folder = RunFolder(run)
    return Saves(
        checkpoints=CheckpointFolder(run / "checkpoints", World(), keep=2),
        world=World(),
        pieces=pieces,
        own=lambda: {"sums": torch.ones(2)},
        describe=lambda progress: {"progress": {"step": progress.step}, "world_size": 1},
        save_snapshot=lambda progress: None,
        run_folder=folder,
        events=Events(run),
        **settings,
    )


def steps_in(run: Path) -> list[int]:
    return sorted(c.step for c in find_checkpoints(run / "checkpoints"))


def told(run: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in read_events(run)]


def save(saves: Saves, step: int, *, last: bool = False) -> str | None:
    problem = saves.save(Progress(step=step), last=last)
    # The loop looks after every step; here every look finds the write ended.
    saves._settle(wait=True)
    return problem


def test_a_failed_save_is_told_and_the_next_one_makes_up_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saves = saves_of(tmp_path)
    assert save(saves, 10) is None and (saves.saved_step, saves.failed) == (10, 0)
    # The first dies within the write, the second before it begins.
    for step, refused in ((20, 5), (30, 0)):
        with BadDisk(lambda n, at=refused: n >= at).mounted(), caplog.at_level(logging.ERROR):
            assert save(saves, step) is None
        assert caplog.records[-1].levelno == logging.ERROR
        assert f"step {step}: NOT SAVED" in caplog.text and "Saved up to step 10" in caplog.text
    assert (saves.saved_step, saves.failed) == (10, 2) and steps_in(tmp_path) == [10]
    assert save(saves, 40) is None and (saves.saved_step, saves.failed) == (40, 0)
    assert steps_in(tmp_path) == [10, 40]
    assert told(tmp_path) == [("save failed", 20), ("save failed", 30), ("saved again", 40)]


@pytest.mark.parametrize("passing", [True, False])
def test_the_last_save_is_tried_twice_and_its_failure_is_returned(tmp_path: Path, passing: bool) -> None:
    saves = saves_of(tmp_path)
    save(saves, 10)
    with BadDisk(lambda n: n == 3 or (n > 3 and not passing)).mounted():
        problem = save(saves, 20, last=True)
    if passing:
        assert problem is None and steps_in(tmp_path) == [10, 20]
        assert told(tmp_path) == [("save failed", 20), ("saved again", 20)]
    else:
        assert problem is not None and "Input/output error" in problem and steps_in(tmp_path) == [10]


def test_a_save_that_falls_due_while_one_is_written_is_left_out_unless_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves_module, "WITH_NEXT_S", 0.0)
    held, saves = Held(monkeypatch), saves_of(tmp_path, milestones=(30,))
    for step in (10, 20):
        assert saves.save(Progress(step=step), last=False) is None
    assert told(tmp_path) == [("save left out", 20)]
    (event,) = read_events(tmp_path)
    assert "the checkpoint of step 10 is still being written" in event["reason"]
    saves.look()
    assert saves.saved_step == 0
    # A milestone waits for the one before, as the last save does.
    plain = saves.checkpoints.settle

    def settle(**how: Any) -> Path | None:
        held.go.set()
        return plain(**how)

    monkeypatch.setattr(saves.checkpoints, "settle", settle)
    assert save(saves, 30) is None and saves.saved_step == 30 and steps_in(tmp_path) == [10, 30]


def test_a_snapshot_that_fails_is_told_and_the_run_goes_on(tmp_path: Path) -> None:
    def refused(progress: Progress) -> None:
        raise CheckpointError("no room")

    saves = saves_of(tmp_path)
    saves.save_snapshot = refused
    saves.snapshot(Progress(step=7))
    assert read_events(tmp_path)[0] | {"time": ""} == {
        "time": "",
        "event": "snapshot failed",
        "step": 7,
        "reason": "no room",
    }


def test_a_run_folder_that_is_deleted_is_made_again_with_its_settings_and_events(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saves = saves_of(run)
    assert saves.run_folder is not None and saves.events is not None
    saves.run_folder.write_settings("recipe.yaml", "name: x\n")
    saves.events.add("began", 0)
    save(saves, 10)
    shutil.rmtree(run)
    save(saves, 20)
    assert steps_in(run) == [20] and (run / "recipe.yaml").read_text() == "name: x\n"
    assert told(run) == [("began", 0)]
    with pytest.raises(FolderTakenError, match="another process is training there"):
        RunFolder(run)


def test_a_run_folder_that_another_process_has_taken_over_ends_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saves = saves_of(run)
    shutil.rmtree(run)
    other = RunFolder(run)
    with pytest.raises(FolderTakenError, match="another process is training there"):
        save(saves, 10)
    other.release()


def test_a_run_folder_is_not_made_again_beneath_a_disk_that_was_unmounted(tmp_path: Path) -> None:
    run = tmp_path / "mount" / "run"
    saves = saves_of(run)
    assert saves.run_folder is not None
    disk = saves.run_folder._disk
    shutil.rmtree(tmp_path / "mount")
    saves.run_folder._disk = disk + 1
    assert save(saves, 10) is None and saves.failed == 1
    assert not (tmp_path / "mount").exists()
    # Mounted again.
    saves.run_folder._disk = disk
    assert save(saves, 20) is None and steps_in(run) == [20]
    assert [reason for _, reason in told(run)] == [10, 20]


def test_the_same_folder_mounted_again_is_known_by_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    plain = os.fstat(folder._lock)
    # A network disk that comes back may have another device number.
    shown = os.stat_result([*plain[:2], plain.st_dev + 1, *plain[3:]])
    monkeypatch.setattr(os, "fstat", lambda _: shown)
    monkeypatch.setattr(folder, "_locked", lambda: os.open(os.devnull, os.O_RDONLY))
    folder._disk += 1
    folder.hold()
    assert folder._disk == tmp_path.stat().st_dev


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_trained_on_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    with held_by_this_run(tmp_path / "run", World()) as folder:
        assert folder is not None
        folder.hold()
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path / 'run'}: its file system keeps no locks") and "by nothing" in said


def test_a_full_disk_that_holds_the_log_of_the_run_is_no_reason_to_end_it() -> None:
    drawn = 0
    # Closing it fails, too.
    with suppress(OSError), Path("/dev/full").open("w", buffering=1) as full:
        with pytest.raises(OSError, match="No space left"):
            full.write("a line\n")
        bar = tqdm(total=2, file=cast(TextIO, LossyStream(full)), mininterval=0)
        bar.update()
        bar.close()
        drawn = bar.n
    assert drawn == 1
    # It is taken for the stream itself, by which tqdm knows a terminal.
    assert LossyStream(sys.stderr) in (sys.stdout, sys.stderr)


def test_a_preview_that_cannot_be_kept_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "previews").write_text("a file, where a folder should be")
    drawn = SimpleNamespace(pixels=[np.zeros((4, 4, 3), np.uint8)])
    preview = object.__new__(Previews)
    vars(preview).update(
        _config=SimpleNamespace(num_steps=(1,), prompts=("a cat",), seed=0),
        _folder=tmp_path / "previews",
        _world=World(),
        _log=None,
        _in_step=SimpleNamespace(attempt=lambda _: (drawn, None)),
    )
    preview(7)
    assert "step 7: the preview is not kept: " in caplog.text


def test_a_run_of_several_ranks_goes_on_past_failed_saves_and_loses_no_line(groups: Groups) -> None:
    for found in groups.results(2, "save_on_a_bad_disk"):
        folder = Path(found["folder"])
        # A rank's write of step 2 failed, those of 4 and 6 went well.
        assert "finished at step 6" in found["goes on"]
        assert steps_in(folder / "goes on") == [4, 6]
        lines = read_metrics(folder / "goes on")
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        # A line is written before the save of its step.
        assert [line["speed"]["failed_saves"] for line in lines] == [0, 0, 1, 1, 0, 0]
        assert [line["speed"]["unsaved_steps"] for line in lines] == [1, 2, 3, 4, 1, 2]
        # With the last one refused, what was trained is exported, and the error names both.
        message = found["last fails"]
        assert "trained up to step 6, but its last checkpoint is NOT SAVED" in message
        assert "the averaged weights of step 6 are in " in message and "after step 4" in message
        assert (folder / "last fails" / "export" / "export.json").exists()
        assert steps_in(folder / "last fails") == [2, 4]
        # Asked to stop, it does not say that it saved.
        message = found["stopped"]
        assert "stopped after step 4 (SIGTERM on rank " in message and "), and NOT SAVED: " in message
        assert found["left by the stopped"] == [2]
        assert "finished at step 6" in found["stopped, again"]
        assert told(folder / "stopped") == [
            ("began", 0),
            *[("save failed", 4)] * 2,
            ("failed", 4),
            ("continued", 2),
            ("finished", 6),
        ]
