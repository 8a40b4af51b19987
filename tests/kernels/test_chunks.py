"""How packs are cut into chunks, and rows into column blocks."""

from __future__ import annotations

import pytest
import torch

from tim_kernels import ChunkPlan
from tim_kernels.chunks import MIN_CHUNKS, MIN_ROWS_PER_CHUNK
from tim_kernels.columns import MAX_BLOCKS, column_blocks
from tim_kernels.schedule import RUN, schedule_of

MAX_ROWS_PER_CHUNK = schedule_of(RUN).rows

LENGTHS = {"mixed": (5, 0, 1, 17, 32, 33, 0), "empty": (), "only-empty": (0, 0), "one": (1,)}


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 32, None])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_row_belongs_to_one_chunk_of_its_own_segment(lengths, rows_per_chunk):
    plan = ChunkPlan.from_lengths(lengths, rows_per_chunk=rows_per_chunk)
    rows, owners = [], []
    for first, count, segment in plan.chunks.tolist():
        assert 1 <= count <= (rows_per_chunk or MAX_ROWS_PER_CHUNK)
        rows += range(first, first + count)
        owners += [segment] * count
    assert rows == list(range(sum(lengths)))
    assert owners == plan.segment_ids.tolist() == [s for s, n in enumerate(lengths) for _ in range(n)]
    assert plan.num_chunks == plan.first_chunk[-1]
    for s in range(len(lengths)):
        begin, end = plan.first_chunk[s : s + 2].tolist()
        assert (plan.chunks[begin:end, 2] == s).all()


@pytest.mark.parametrize("num_rows", [1, 1000, 4096, 8192, 16384, 262144])
def test_a_pack_is_cut_fine_enough_to_fill_a_large_gpu_and_no_finer(num_rows):
    plan = ChunkPlan.from_lengths((num_rows,))
    rows = int(plan.chunks[0, 1]) if num_rows >= MIN_ROWS_PER_CHUNK else MIN_ROWS_PER_CHUNK
    assert MIN_ROWS_PER_CHUNK <= rows <= MAX_ROWS_PER_CHUNK
    assert plan.num_chunks >= MIN_CHUNKS or rows == MIN_ROWS_PER_CHUNK
    assert num_rows < 2 * rows * MIN_CHUNKS or rows == MAX_ROWS_PER_CHUNK


def test_given_segment_ids_are_kept():
    ids = torch.tensor([0, 0, 1])
    assert ChunkPlan.from_lengths((2, 1), segment_ids=ids).segment_ids is ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": (3, -1)}, "expected at least 0 each"),
        ({"lengths": (2**31,)}, "fewer than 2\\^31"),
        ({"lengths": (3,), "rows_per_chunk": 0}, "rows_per_chunk: expected at least 1"),
        ({"lengths": (3,), "segment_ids": torch.zeros(2)}, r"segment_ids: expected \[3\], received \[2\]"),
    ],
)
def test_plans_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChunkPlan.from_lengths(**arguments)


def test_column_blocks_cover_every_width_with_few_idle_lanes():
    for width in range(1, 4097):
        blocks = column_blocks(width)
        assert len(blocks) <= MAX_BLOCKS
        assert [start for start, _ in blocks] == [sum(n for _, n in blocks[:i]) for i in range(len(blocks))]
        assert all(size & (size - 1) == 0 for _, size in blocks)
        lanes = sum(size for _, size in blocks)
        assert width <= lanes <= width * 8 / 7
        assert blocks[-1][0] < width
        if width.bit_count() <= MAX_BLOCKS:
            assert lanes == width


def test_the_models_width_is_1024_and_128():
    assert column_blocks(1152) == ((0, 1024), (1024, 128))
