from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import Groups
from tests.trainer.disks import BadDisk
from tim_ds.errors import CheckpointError
from tim_ds.trainer import checkpoint as checkpoint_module
from tim_ds.trainer import checkpoint_folder as folder_module
from tim_ds.trainer.checkpoint import FORMAT, MANIFEST, CheckpointGoneError, Piece, find_checkpoints
from tim_ds.trainer.checkpoint_folder import CheckpointFolder
from tim_ds.trainer.rank_file import check_rank_file, write_rank_file
from tim_ds.trainer.world import World

VALUES = torch.arange(12.0)


def pieces() -> Iterator[Piece]:
    yield Piece("master", "w", 0, VALUES[:5])
    yield Piece("master", "w", 5, VALUES[5:])


def keeper(folder: Path, *, keep: int = 2, milestones: tuple[int, ...] = ()) -> CheckpointFolder:
    return CheckpointFolder(folder, World(), keep=keep, milestones=milestones)


def save(folder: CheckpointFolder, step: int) -> Path:
    return folder.save(step, pieces(), {"sums": torch.ones(2)}, {"progress": {"step": step}, "world_size": 1})


@pytest.mark.parametrize(("start", "count"), [(0, 12), (3, 5), (5, 7), (11, 1), (4, 2)])
def test_any_run_of_elements_is_read_back_from_the_pieces_that_hold_it(
    tmp_path: Path, start: int, count: int
) -> None:
    save(keeper(tmp_path), 1)
    (checkpoint,) = find_checkpoints(tmp_path)
    target = torch.full((count,), torch.nan)
    checkpoint.fill("master", "w", start, target)
    assert torch.equal(target, VALUES[start : start + count])
    assert torch.equal(checkpoint.own(0)["sums"], torch.ones(2))
    assert checkpoint.own(1) == {}


def test_elements_that_no_file_holds_are_an_error(tmp_path: Path) -> None:
    save(keeper(tmp_path), 1)
    (checkpoint,) = find_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="ema of w: expected elements 0 to 12, received 0 of 12"):
        checkpoint.fill("ema", "w", 0, torch.empty(12))
    with pytest.raises(CheckpointError, match="expected elements 6 to 14, received 6 of 8"):
        checkpoint.fill("master", "w", 6, torch.empty(8))


def test_the_newest_few_and_the_milestones_are_kept(tmp_path: Path) -> None:
    folder = keeper(tmp_path, keep=2, milestones=(2, 3))
    for step in range(1, 7):
        save(folder, step)
        assert find_checkpoints(tmp_path)[0].step == step
    assert [c.step for c in find_checkpoints(tmp_path)] == [6, 5, 3, 2]
    assert (tmp_path / "latest").read_text() == "step_000000006\n"


@pytest.mark.parametrize("damage", ["file shortened", "file gone", "manifest torn", "manifest gone"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = keeper(tmp_path)
    save(folder, 1)
    newest = save(folder, 2)
    what, how = damage.split()
    path = newest / (MANIFEST if what == "manifest" else "rank_00000.safetensors")
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        found = folder.newest()
    assert found is not None and found.step == 1
    assert str(newest) in caplog.text
    # The run comes by that step again and writes it anew.
    save(folder, 2)
    assert [c.step for c in find_checkpoints(tmp_path)] == [2, 1]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_damage_inside_the_newest_checkpoint_goes_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = keeper(tmp_path)
    older = save(folder, 10)
    newest = save(folder, 25)
    flip_a_byte(newest / "rank_00000.safetensors")
    with caplog.at_level(logging.WARNING):
        found = folder.newest()
    assert found is not None and found.step == 10
    (record,) = caplog.records
    message = record.getMessage()
    assert f"{newest / 'rank_00000.safetensors'}: damaged: expected " in message
    assert f"goes back 15 steps, to {older}" in message
    # Kept for whoever wants to look, where nothing takes it for a checkpoint.
    assert (tmp_path / "damaged-step_000000025" / MANIFEST).exists() and not newest.exists()
    assert (tmp_path / "latest").read_text() == "step_000000010\n"
    caplog.clear()
    again = folder.newest()
    assert again is not None and again.step == 10 and not caplog.records


def test_a_strict_run_refuses_a_damaged_checkpoint_by_name(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, World(), keep=2, strict=True)
    save(folder, 10)
    newest = save(folder, 25)
    flip_a_byte(newest / "rank_00000.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="with checksum") as error:
            folder.newest()
        assert "train.checkpoint.strict refuses" in str(error.value) and "after step 10" in str(error.value)
    (newest / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"received no file.*strict refuses to pass over it"):
        folder.newest()


def test_damage_in_the_only_checkpoint_is_an_error_and_begins_nothing(tmp_path: Path) -> None:
    folder = keeper(tmp_path)
    newest = save(folder, 10)
    flip_a_byte(newest / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match="No older checkpoint is left"):
        folder.newest()
    assert newest.exists()


class Held:
    """A write that waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.go = threading.Event()
        self.under_way = 0
        plain = folder_module.write_rank_file

        def held(path: Path, tensors: Any) -> Any:
            self.under_way += 1
            assert self.under_way == 1, "two checkpoints are written at once"
            self.go.wait(30)
            self.under_way -= 1
            if error is not None:
                raise error
            return plain(path, tensors)

        monkeypatch.setattr(folder_module, "write_rank_file", held)


def start(folder: CheckpointFolder, step: int, values: torch.Tensor) -> None:
    folder.start(
        step, iter([Piece("master", "w", 0, values)]), {}, {"progress": {"step": step}, "world_size": 1}
    )


def test_a_save_returns_before_it_is_written_and_holds_the_values_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, folder, values = Held(monkeypatch), keeper(tmp_path), torch.arange(6.0)
    start(folder, 1, values)
    values.add_(100)
    folder.settle()
    assert find_checkpoints(tmp_path) == [] and (tmp_path / ".tmp-step_000000001").is_dir()
    # A second save waits for the first, and uses its memory again.
    first_memory = {key: value.data_ptr() for key, value in folder._host._buffers.items()}
    threading.Timer(0.2, held.go.set).start()
    start(folder, 2, values)
    assert [c.step for c in find_checkpoints(tmp_path)] == [1]
    folder.settle(wait=True)
    assert {key: value.data_ptr() for key, value in folder._host._buffers.items()} == first_memory
    found = {c.step: torch.empty(6) for c in find_checkpoints(tmp_path)}
    for checkpoint in find_checkpoints(tmp_path):
        checkpoint.fill("master", "w", 0, found[checkpoint.step])
    assert torch.equal(found[1], torch.arange(6.0)) and torch.equal(found[2], torch.arange(6.0) + 100)
    folder.settle()


def test_a_write_that_fails_is_told_at_the_next_step_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keeper(tmp_path)
    save(folder, 1)
    held = Held(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    start(folder, 2, VALUES)
    folder.settle()
    held.go.set()
    with pytest.raises(
        CheckpointError, match=r"step_000000002: the checkpoint cannot be written.*No space left"
    ):
        for _ in range(1000):
            folder.settle()
            time.sleep(0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000000001"]
    folder.settle(wait=True)


def test_whichever_call_of_a_save_the_disk_refuses_what_was_whole_stays_and_the_next_save_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Milestone 1, and of the others the newest two are kept: a save of step 4 makes 2 superfluous."""
    # Hundreds of them, and no power cut: that they are asked for is what counts here.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    template = tmp_path / "template"
    for step in (1, 2, 3):
        save(keeper(template, milestones=(1,)), step)

    def save_refused(fails: Callable[[int], bool]) -> tuple[list[str], str | None, set[int]]:
        place = tmp_path / "run"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template, place)
        folder, refusal, disk = keeper(place, milestones=(1,)), None, BadDisk(fails)
        with disk.mounted():
            try:
                save(folder, 4)
            except CheckpointError as error:
                refusal = str(error)
        # Every folder that is named as a checkpoint is one.
        found = find_checkpoints(place, strict=True)
        assert {c.path.name for c in found} == {path.name for path in place.glob("step_*")}
        for checkpoint in found:
            checkpoint.check()
        save(folder, 5)
        left = {"latest", "step_000000001", "step_000000005"}
        left.add("step_000000004" if 4 in {c.step for c in found} else "step_000000003")
        assert {path.name for path in place.iterdir()} == left
        return disk.calls, refusal, {c.step for c in found}

    calls, refusal, steps = save_refused(lambda _: False)
    assert refusal is None and steps == {1, 3, 4}
    complete = calls.index("rename")
    assert {"write", "fsync", "mkdir", "unlink"} <= set(calls[:complete]) and len(calls) > complete + 8
    for number in range(len(calls)):
        for fails in ((lambda n, at=number: n == at), (lambda n, at=number: n >= at)):
            _, refusal, steps = save_refused(fails)
            if number <= complete + 1:
                # Up to the flush of the folder that it was renamed in.
                assert refusal is not None and "cannot be written" in refusal and "Input/output" in refusal
                assert steps == ({1, 2, 3} if number <= complete else {1, 2, 3, 4})
            else:
                assert refusal is None and {1, 3, 4} <= steps


def test_what_an_interrupted_save_left_and_cannot_be_deleted_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(keeper(tmp_path), 1)
    leftover = tmp_path / ".tmp-step_000000002"
    leftover.mkdir()
    (tmp_path / ".tmp-latest").write_text("torn")
    with BadDisk(lambda _: True).mounted():
        found = keeper(tmp_path).newest()
    assert found is not None and found.step == 1
    assert f"{leftover}: left by an interrupted save, and cannot be deleted: " in caplog.text
    assert keeper(tmp_path).newest() is not None and not list(tmp_path.glob(".tmp-*"))


def test_a_save_whose_folder_is_deleted_while_another_rank_is_waited_for_ends(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, World(rank=0, size=2), keep=2)
    writing = folder_module._Writing(tmp_path / "step_1", tmp_path / ".tmp-step_1", 0, {})
    with pytest.raises(OSError, match=r"tmp-step_1: deleted while it was written"):
        folder._receipts(writing)


def test_checkpoints_that_a_run_replaces_while_they_are_listed_are_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = keeper(tmp_path, keep=1)
    save(folder, 1)
    plain, next_step = checkpoint_module.read_checkpoint, iter([2])

    def read(path: Path) -> Any:
        for step in next_step:
            save(folder, step)
        return plain(path)

    monkeypatch.setattr(checkpoint_module, "read_checkpoint", read)
    assert [c.step for c in find_checkpoints(tmp_path, strict=True)] == [2]
    assert not caplog.records


def test_a_checkpoint_that_is_deleted_while_it_is_read_says_so(tmp_path: Path) -> None:
    folder = keeper(tmp_path, keep=1)
    save(folder, 1)
    (found,) = find_checkpoints(tmp_path)
    (half_read,) = find_checkpoints(tmp_path)
    half_read.fill("master", "w", 0, torch.empty(5))
    save(folder, 2)
    for checkpoint in (found, half_read):
        for read in (checkpoint.check, lambda c=checkpoint: c.fill("master", "w", 0, torch.empty(12))):
            with pytest.raises(CheckpointGoneError, match="step_000000001: deleted while it was read"):
                read()


def test_an_error_of_the_run_lets_the_write_become_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, folder = Held(monkeypatch), keeper(tmp_path)
    start(folder, 1, VALUES)
    threading.Timer(0.2, held.go.set).start()
    folder.leave()
    assert [c.step for c in find_checkpoints(tmp_path)] == [1]


def test_the_file_of_a_rank_is_safetensors_of_every_kind_of_tensor(tmp_path: Path) -> None:
    tensors = {
        "master/w@0": torch.randn(1000),
        "own/empty": torch.empty(0),
        "own/number": torch.tensor(3.5, dtype=torch.float64),
        "own/counts": torch.arange(5),
        "own/flags": torch.tensor([True, False]),
    }
    record = write_rank_file(tmp_path / "file", tensors)
    check_rank_file(tmp_path / "file", record)
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    assert all(
        torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items()
    )


def test_leftovers_of_an_interrupted_save_are_removed(tmp_path: Path) -> None:
    folder = keeper(tmp_path)
    save(folder, 1)
    leftover = tmp_path / ".tmp-step_000000002"
    leftover.mkdir()
    (leftover / "rank_00000.safetensors").write_bytes(b"half")
    found = folder.newest()
    assert found is not None and found.step == 1
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, f"checkpoint format 99, expected {FORMAT}"),
        ({"progress": {}}, "no readable manifest.json (KeyError: 'step')"),
        ({"files": {"rank_00000.safetensors": {"bytes": 7, "crc32": "0"}}}, "expected 7 bytes, received "),
    ],
)
def test_a_run_whose_checkpoints_are_all_unreadable_does_not_begin_anew(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    for path in [save(keeper(tmp_path), step) / MANIFEST for step in (1, 2)]:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match="none of its checkpoints can be read") as error:
        keeper(tmp_path).newest()
    assert str(error.value).count(message) == 2


def test_a_folder_without_checkpoints_begins_a_run(tmp_path: Path) -> None:
    assert keeper(tmp_path).newest() is None and keeper(tmp_path / "none").newest() is None


@pytest.mark.parametrize("failure", ["half_written", "no_room", "no_manifest"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(groups: Groups, failure: str) -> None:
    causes = {"half_written": "File too large", "no_room": "the disk has 1,000 bytes left"}
    left = {"half_written": "half", "no_room": "no_room", "no_manifest": "no_manifest"}
    for found in groups.results(2, "fill_the_disk"):
        assert found["first"] is None and found["second"] is None
        message = found[failure]
        assert "the checkpoint cannot be written" in message and "bytes needed" in message
        assert causes.get(failure, "No space left on device") in message
        assert found[f"left_after_{left[failure]}"] == ["latest", "step_000000001"]
        assert found["newest"] == 5


def test_a_folder_of_another_run_is_refused_with_everything_that_differs(groups: Groups) -> None:
    for found in groups.results(2, "refuse_other_runs"):
        assert "model.depth: 2 in the checkpoint, 3 now" in found["model"]
        assert "objective.diffusion_share: 0.5 in the checkpoint, 0.25 now" in found["model"]
        assert "data: index" in found["data"] and "model." not in found["data"]
        assert "finished at step 2, nothing to do" in found["harmless"]
        # An error of all ranks, with exit code 2: none of them is missing.
        assert "data.text_encoder: old in the checkpoint, new now (there)" in found["encoders"]
        assert found["encoders"].endswith("(told by one)")
