"""Memory is used again when nothing sees it any more, and never before."""

import pickle

import pytest
import torch

from data_pipeline.buffers import KEPT, Buffers


def test_memory_is_used_again_once_its_tensor_is_gone():
    buffers = Buffers()
    first = buffers.take(1000)
    place = first.data_ptr()
    del first
    again = buffers.take(900)
    assert again.data_ptr() == place and again.shape == (900,) and again.dtype == torch.uint8


@pytest.mark.parametrize(
    "view",
    [
        lambda whole: whole[16:],
        lambda whole: whole.view(torch.float32),
        lambda whole: whole.detach().reshape(8, 8),
        lambda whole: whole.numpy()[3:],
        lambda whole: memoryview(whole.numpy())[5:],
    ],
    ids=["slice", "dtype", "shape", "numpy", "memoryview"],
)
def test_any_view_keeps_the_memory(view):
    buffers = Buffers()
    whole = buffers.take(64)
    place, seen = whole.data_ptr(), view(whole)
    del whole
    other = buffers.take(64)
    assert other.data_ptr() != place
    del seen
    assert buffers.take(64).data_ptr() == place


def test_requests_of_many_sizes_settle_on_memory_for_the_largest():
    buffers = Buffers()
    places = set()
    for size in (10, 4000, 20, 3000, 4000, 0, 1):
        taken = buffers.take(size)
        assert len(taken) == size
        places.add(taken.data_ptr())
        del taken
    # The first block was too small for the second request; all others share one.
    assert len(places) <= 3


def test_what_many_held_at_once_is_not_kept_for_ever():
    buffers = Buffers()
    held = [buffers.take(100) for _ in range(3 * KEPT)]
    assert len({t.data_ptr() for t in held}) == 3 * KEPT
    held.clear()
    assert len(buffers._free) == KEPT


def test_another_process_starts_with_memory_of_its_own():
    buffers = Buffers()
    buffers.take(1 << 20)
    assert len(pickle.dumps(buffers)) < 200
    assert pickle.loads(pickle.dumps(buffers)).take(8).shape == (8,)
