from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import Groups
from tim_ds.errors import CheckpointError
from tim_ds.trainer.checkpoint import MANIFEST, CheckpointFolder, Piece, find_checkpoints
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
        ({"format": 99}, "checkpoint format 99, expected 1"),
        ({"progress": {}}, "no readable manifest.json (KeyError: 'step')"),
        ({"files": {"rank_00000.safetensors": 7}}, "expected 7 bytes, received "),
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
