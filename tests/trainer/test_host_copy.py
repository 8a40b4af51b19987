"""The memory that a save copies into: made beside the steps, waited for, done without where there is none."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.conftest import Groups
from tests.trainer.test_checkpoint import Held, start
from tim_ds.trainer import host_copy as host_copy_module
from tim_ds.trainer.checkpoint import Piece, find_checkpoints
from tim_ds.trainer.checkpoint_folder import CheckpointFolder
from tim_ds.trainer.host_copy import (
    SLAB_BYTES,
    HostCopy,
    HostNeed,
    Place,
    Room,
    _left_by_groups,
    _slabs,
    layout_of,
)
from tim_ds.trainer.world import World

CPU = torch.device("cpu")


def prepared(folder: Path, values: torch.Tensor) -> CheckpointFolder:
    keeper = CheckpointFolder(folder, World(), keep=2)
    keeper.prepare(iter([Piece("master", "w", 0, values)]), {})
    return keeper


def stored(folder: Path, step: int) -> torch.Tensor:
    (checkpoint,) = [c for c in find_checkpoints(folder) if c.step == step]
    target = torch.empty(6)
    checkpoint.fill("master", "w", 0, target)
    return target


def test_a_first_save_copies_into_the_memory_that_was_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.arange(6.0)
    keeper = prepared(tmp_path, values)
    keeper._host.wait()
    made = keeper._host._buffers["master/w@0"].data_ptr()
    monkeypatch.setattr(
        HostCopy, "_slab", lambda self, size, locked: pytest.fail("memory is made within the save")
    )
    for step in (1, 2):
        start(keeper, step, values)
        values.add_(1)
        keeper.settle(wait=True)
        assert keeper._host._buffers["master/w@0"].data_ptr() == made
    assert torch.equal(stored(tmp_path, 1), torch.arange(6.0))
    assert torch.equal(stored(tmp_path, 2), torch.arange(6.0) + 1)


def test_a_save_that_comes_early_waits_for_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, makers = threading.Event(), []
    plain = HostCopy._slab

    def slow(self: HostCopy, size: int, *, locked: bool) -> torch.Tensor:
        makers.append(threading.current_thread().name)
        go.wait(30)
        return plain(self, size, locked=locked)

    monkeypatch.setattr(HostCopy, "_slab", slow)
    values = torch.arange(6.0)
    keeper = prepared(tmp_path, values)
    threading.Timer(0.2, go.set).start()
    assert not go.is_set()
    start(keeper, 1, values)
    assert go.is_set() and makers == ["host memory"], "made once, by the thread"
    values.add_(100)
    keeper.settle(wait=True)
    assert torch.equal(stored(tmp_path, 1), torch.arange(6.0))


def test_other_tensors_than_were_prepared_for_get_memory_of_their_own(tmp_path: Path) -> None:
    keeper = prepared(tmp_path, torch.arange(4.0))
    values = torch.arange(6.0)
    start(keeper, 1, values)
    values.add_(100)
    keeper.settle(wait=True)
    assert torch.equal(stored(tmp_path, 1), torch.arange(6.0))
    assert keeper._host._buffers.keys() == {"master/w@0"}, "what was there before is not kept"


@pytest.mark.parametrize("lack", ["no room", "refused"])
def test_without_memory_a_save_is_written_while_the_step_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lack: str
) -> None:
    def refused(self: HostCopy, size: int, *, locked: bool) -> torch.Tensor:
        raise MemoryError("cannot allocate memory")

    if lack == "no room":
        monkeypatch.setattr(host_copy_module, "available_bytes", lambda: 20)
    else:
        monkeypatch.setattr(HostCopy, "_slab", refused)
    held, values = Held(monkeypatch), torch.arange(6.0)
    with caplog.at_level(logging.WARNING):
        keeper = prepared(tmp_path, values)
        keeper._host.wait()
        threading.Timer(0.2, held.go.set).start()
        start(keeper, 1, values)
        assert held.go.is_set() and not held.under_way, "the values are read when the step goes on"
        values.add_(100)
        keeper.settle(wait=True)
    assert torch.equal(stored(tmp_path, 1), torch.arange(6.0))
    assert keeper._host._buffers == {}
    said = [record.getMessage() for record in caplog.records]
    if lack == "no room":
        needed = "24 bytes of host memory are needed, 20 are available to copy"
        assert [needed in line for line in said] == [True, True]
        assert said[0].endswith("it is not made ahead") and said[1].endswith("the step waits for the disk")
    else:
        assert said[0] == "no host memory for the copy of a checkpoint: cannot allocate memory"
        assert said[-1].endswith("step_000000001: not copied; the step waits for the disk")


def test_a_failed_write_without_memory_is_told_and_hangs_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copy_module, "available_bytes", lambda: 0)
    held = Held(monkeypatch, OSError("disk gone"))
    held.go.set()
    keeper = CheckpointFolder(tmp_path, World(), keep=2)
    start(keeper, 1, torch.arange(6.0))
    with pytest.raises(RuntimeError, match="disk gone"):
        keeper.settle(wait=True)


def test_a_run_that_leaves_does_not_wait_for_all_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    touched = threading.Event()
    plain = HostCopy._slab

    def slow(self: HostCopy, size: int, *, locked: bool) -> Any:
        touched.set()
        self._stop.wait(30)
        return plain(self, size, locked=locked)

    monkeypatch.setattr(HostCopy, "_slab", slow)
    copy = HostCopy(CPU)
    copy.make(
        layout_of({str(n): torch.empty(SLAB_BYTES // 4, device="meta") for n in range(64)}), behind=True
    )
    assert touched.wait(30)
    begin = time.monotonic()
    copy.stop()
    copy.wait()
    # 16 GiB would take seconds; the machines that run this test may not even have them.
    assert time.monotonic() - begin < 5 and copy._buffers == {}


def test_pieces_lie_in_slabs_side_by_side_without_waste() -> None:
    shapes = {
        "a": (7,),
        "b": (SLAB_BYTES // 8,),
        "c": (SLAB_BYTES // 8,),
        "d": (SLAB_BYTES,),
        "e": (3, 5),
    }
    layout = layout_of({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    scalar = Place(torch.Size(()), torch.float64, locked=False)
    empty = Place(torch.Size((0,)), torch.float32, locked=False)
    of_gpu = Place(torch.Size((4,)), torch.float32, locked=True)
    layout = {"h": of_gpu, **layout, "f": scalar, "g": empty, "i": of_gpu}
    slabs = list(_slabs(layout))
    assert [list(offsets) for offsets, *_ in slabs] == [["a", "b"], ["c"], ["d"], ["e", "f", "g"], ["h", "i"]]
    assert [locked for *_, locked in slabs] == [False] * 4 + [True]
    for offsets, size, _ in slabs:
        ends = [offsets[key] + layout[key].nbytes for key in offsets]
        starts = [*list(offsets.values())[1:], size]
        assert all(0 <= start - end < 64 for end, start in zip(ends, starts, strict=True))
        assert all(start % 64 == 0 for start in offsets.values())
        assert size <= SLAB_BYTES or len(offsets) == 1


def test_every_kind_of_tensor_is_copied() -> None:
    values = {
        "matrix": torch.randn(3, 5),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.empty(0),
        "flags": torch.tensor([True, False, True]),
        "view": torch.arange(10.0)[2:9],
    }
    copy = HostCopy(CPU)
    assert copy.fill(values) is None
    copy.make(layout_of(values))
    copied = copy.fill(values)
    assert copied is not None and copied.keys() == values.keys()
    for key, value in values.items():
        assert torch.equal(copied[key], value) and copied[key].dtype == value.dtype
        assert value.numel() == 0 or copied[key].data_ptr() != value.data_ptr()
    assert copy.need(layout_of(values)).lacking == 0
    assert copy.need(layout_of({"matrix": values["matrix"]})).lacking == 60


def test_the_ranks_of_a_host_share_its_room_and_one_of_them_speaks() -> None:
    needs = [
        HostNeed("a", 60, 100),
        HostNeed("b", 60, None),
        HostNeed("a", 60, 110),
        HostNeed("c", 60, 60),
        HostNeed("d", 0, 0),
    ]
    rooms = [Room.of(needs, rank) for rank in range(len(needs))]
    # Two ranks that each find room for themselves do not find it together.
    assert [room.enough for room in rooms] == [False, True, False, True, True]
    assert [room.first for room in rooms] == [True, True, False, True, True]
    assert str(rooms[2]) == "120 bytes of host memory are needed, 100 are available"


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.setattr(host_copy_module, "CGROUPS", tmp_path)
    place = tmp_path if version == 2 else tmp_path / "memory"
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for folder, limit, used, file in (("job", "1000", 700, 50), ("job/step", "max", 600, 0)):
        (place / folder).mkdir(parents=True)
        (place / folder / names[0]).write_text(f"{limit}\n")
        (place / folder / names[1]).write_text(f"{used}\n")
        (place / folder / "memory.stat").write_text(f"anon 5\n{names[2]} {file}\n")
    groups = "0::/job/step\n" if version == 2 else "4:memory:/job/step\n3:cpu:/\n"
    assert list(_left_by_groups(groups)) == [350]
    assert list(_left_by_groups("0::/elsewhere\n")) == []


def test_a_run_makes_the_memory_once_behind_its_first_step(groups: Groups) -> None:
    for found in groups.results(2, "save_first"):
        assert found["made"] == [("host memory", 1)], "by the thread, after the first step"
        assert found["saved"] == [2, 3]


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_copied_into_page_locked_memory() -> None:
    values = {"gpu": torch.randn(1 << 20, device="cuda"), "host": torch.randn(100)}
    copy = HostCopy(torch.device("cuda", torch.cuda.current_device()))
    copy.make(layout_of(values), behind=True)
    copied = copy.fill(values)
    torch.cuda.synchronize()
    assert copied is not None and copied["gpu"].is_pinned() and not copied["host"].is_pinned()
    assert all(torch.equal(copied[key], value.cpu()) for key, value in values.items())
