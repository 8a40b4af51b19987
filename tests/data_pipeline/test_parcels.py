"""What workers send arrives as it was, in memory that is used again once nobody sees it."""

import os
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data_pipeline.parcels import InParcels, Parcel, Parcels


@dataclass(frozen=True, eq=False)
class Inner:
    values: Tensor
    note: str


class Outer(NamedTuple):
    number: int
    inner: Inner
    more: tuple[Tensor, ...]


class Items(Dataset[Outer]):
    """Item n is made of n; every tenth is much larger."""

    def __getitem__(self, number: int) -> Outer:
        size = 4096 if number % 10 == 9 else 64
        values = torch.full((size,), float(number))
        more = (
            torch.tensor(number),
            torch.arange(6).reshape(2, 3).t() + number,
            torch.full((3,), number / 8, dtype=torch.bfloat16),
            torch.tensor([True, False]),
            torch.empty(0, 5),
        )
        return Outer(number, Inner(values, f"item {number}"), more)


def assert_is(item: Outer, number: int) -> None:
    expected = Items()[number]
    assert item.number == number and item.inner.note == expected.inner.note
    received = (item.inner.values, *item.more)
    for a, b in zip(received, (expected.inner.values, *expected.more), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def loader_of(parcels: Parcels, count: int, workers: int = 1) -> DataLoader[object]:
    items = InParcels(Items(), parcels)
    return DataLoader(items, batch_size=None, sampler=range(count), num_workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_items_arrive_as_they_were_sent(workers):
    parcels = Parcels(workers, 4)
    received = 0
    for number, parcel in enumerate(loader_of(parcels, 40, workers)):
        assert isinstance(parcel, Parcel), "a slab was not given back in time"
        item = parcel.open()
        del parcel
        assert_is(item, number)
        item.inner.values.zero_()
        received += 1
        del item
    assert received == 40 and not any(parcels._taken)


def test_each_slab_is_brought_along_once_or_when_it_grows():
    parcels = Parcels(1, 4)
    brought = []
    for number, parcel in enumerate(loader_of(parcels, 60)):
        assert isinstance(parcel, Parcel)
        if parcel.memory is not None:
            brought.append(number)
        parcel.open()
    # Four slabs, each made small or large, and made anew once at most.
    assert 1 <= len(brought) <= 8 and max(brought) < 50


def test_what_is_held_is_not_overwritten():
    parcels = Parcels(1, 4)
    held, plain = [], 0
    for parcel in loader_of(parcels, 30):
        plain += not isinstance(parcel, Parcel)
        held.append(parcel.open() if isinstance(parcel, Parcel) else parcel)
    # Four slabs travel, the rest as torch sends them.
    assert plain == 26
    for number, item in enumerate(held):
        assert_is(item, number)


@pytest.mark.parametrize("part", [lambda item: item.inner.values[3:], lambda item: item.more[0]])
def test_one_tensor_keeps_its_slab(part):
    parcels = Parcels(1, 8)
    for parcel in loader_of(parcels, 1):
        assert isinstance(parcel, Parcel)
        item = parcel.open()
        kept = part(item)
        slab = parcel.slab
        del item
        assert parcels._taken[slab]
        del kept
        assert not parcels._taken[slab]


def test_a_forked_process_gives_nothing_back():
    parcels = Parcels(1, 2)
    (parcel,) = loader_of(parcels, 1)
    assert isinstance(parcel, Parcel)
    held = [parcel.open()]
    child = os.fork()
    if child == 0:
        held.clear()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert parcels._taken[parcel.slab]
    held.clear()
    assert not parcels._taken[parcel.slab]


def test_page_locking_is_left_to_the_item():
    class Pinned(NamedTuple):
        values: Tensor
        is_pinned: bool = False

        def pin_memory(self) -> "Pinned":
            return Pinned(self.values.clone(), True)

    parcels = Parcels(1, 1)
    parcels.open = lambda parcel: Pinned(torch.ones(2))  # type: ignore[method-assign]  # in place of a worker
    item = Parcel(parcels._number, 0, b"", (), None).pin_memory()
    assert item.is_pinned and torch.equal(item.values, torch.ones(2))


def test_a_tensor_with_a_gradient_travels_too():
    class Learned(Dataset[Tensor]):
        def __getitem__(self, number: int) -> Tensor:
            assert get_worker_info() is not None
            return torch.ones(3, requires_grad=True)

    parcels = Parcels(1, 2)
    (parcel,) = DataLoader(InParcels(Learned(), parcels), batch_size=None, sampler=[0], num_workers=1)
    tensor = parcel.open()
    assert tensor.requires_grad and torch.equal(tensor.detach(), torch.ones(3))


def test_slabs_outlive_the_loader_that_filled_them():
    parcels = Parcels(1, 2)
    items = [parcel.open() for parcel in loader_of(parcels, 2) if isinstance(parcel, Parcel)]
    del parcels
    for number, item in enumerate(items):
        assert_is(item, number)
