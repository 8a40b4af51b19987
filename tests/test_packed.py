"""Segments, conditions and patches: the contract that every part builds on."""

from __future__ import annotations

import pytest
import torch

from tim_ds.errors import ShapeError
from tim_ds.packed import ClassCondition, Segments, TextCondition, concatenate, patchify, unpatchify


def test_segments_of_mixed_grids():
    s = Segments.from_grids([(2, 3), (1, 1), (3, 1)])
    assert s.lengths == (6, 1, 3)
    assert s.cu_seqlens.tolist() == [0, 6, 7, 10]
    assert s.segment_ids.tolist() == [0] * 6 + [1] + [2] * 3
    assert s.token_rows is not None and s.token_cols is not None
    assert s.token_rows.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1, 2]
    assert s.token_cols.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 0, 0]
    assert (s.num_tokens, s.num_segments, s.max_length) == (10, 3, 6)
    assert {s.cu_seqlens.dtype, s.segment_ids.dtype, s.token_rows.dtype} == {torch.int32}


def test_select_may_repeat_and_reorder():
    s = Segments.from_grids([(2, 2), (1, 3)])
    chosen = s.select([1, 0, 1])
    assert chosen.grids == ((1, 3), (2, 2), (1, 3))
    assert s.token_index([1, 0]).tolist() == [4, 5, 6, 0, 1, 2, 3]


def test_expand_and_mean_are_inverse_on_constants():
    s = Segments.from_lengths([3, 1, 2])
    value = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    assert s.expand(value).tolist() == [1.0, 1.0, 1.0, -2.0, 5.0, 5.0]
    assert torch.equal(s.mean(s.expand(value)), value)
    with pytest.raises(ShapeError, match="expected 3 values"):
        s.expand(value[:2])


def test_mean_counts_every_image_once():
    s = Segments.from_lengths([4, 1])
    assert s.mean(torch.tensor([1.0, 2.0, 3.0, 6.0, 10.0])).tolist() == [3.0, 10.0]


@pytest.mark.parametrize("grids", [[(0, 3)], [(2, 2), (3, -1)]])
def test_a_grid_without_tokens_is_refused(grids):
    with pytest.raises(ShapeError, match="at least 1x1"):
        Segments.from_grids(grids)


def test_captions_may_be_empty_but_not_negative():
    assert Segments.from_lengths([0, 2]).segment_ids.tolist() == [1, 1]
    with pytest.raises(ShapeError, match="negative"):
        Segments.from_lengths([-1])


def test_conditions_select_and_concatenate():
    text = TextCondition(torch.arange(10.0).reshape(5, 2), Segments.from_lengths([2, 0, 3]))
    picked = text.select([2, 0])
    assert picked.states_LE[:, 0].tolist() == [4.0, 6.0, 8.0, 0.0, 2.0]
    both = concatenate([text, picked])
    assert isinstance(both, TextCondition)
    assert both.segments.lengths == (2, 0, 3, 3, 2)
    labels = concatenate([ClassCondition(torch.tensor([1, 2])), ClassCondition(torch.tensor([3]))])
    assert isinstance(labels, ClassCondition)
    assert labels.labels_S.tolist() == [1, 2, 3]
    with pytest.raises(ShapeError, match="of one kind"):
        concatenate([text, labels])
    with pytest.raises(ShapeError, match="expected \\[5, E\\]"):
        TextCondition(torch.zeros(4, 2), text.segments)


def test_conditions_repeat_for_neighbouring_copies_of_each_image():
    text = TextCondition(torch.arange(10.0).reshape(5, 2), Segments.from_lengths([2, 0, 3])).repeat(2)
    assert (text.num_segments, text.segments.num_segments) == (6, 3)
    assert text.repeat(2).num_segments == 12
    # Images 4 and 5 read the third caption; picked on their own, they read one each.
    assert text.select([5, 0]).states_LE[:, 0].tolist() == [4.0, 6.0, 8.0, 0.0, 2.0]
    assert text.select([5, 0]).num_segments == 2
    joined = concatenate([text, text])
    assert isinstance(joined, TextCondition)
    assert (joined.num_segments, joined.images_per_caption) == (12, 2)
    with pytest.raises(ShapeError, match="do not join"):
        concatenate([text, text.select([0])])
    with pytest.raises(ShapeError, match="at least 1"):
        text.repeat(0)
    assert ClassCondition(torch.tensor([1, 2])).repeat(2).labels_S.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patchify_and_unpatchify_are_inverse(p):
    latent = torch.arange(3 * 8 * 4, dtype=torch.float64).reshape(3, 8, 4)
    tokens = patchify(latent, p)
    assert tokens.shape == ((8 // p) * (4 // p), p * p * 3)
    assert torch.equal(unpatchify(tokens, (8 // p, 4 // p), p), latent)
    # last axis is ordered (row in patch, col in patch, channel)
    assert torch.equal(tokens[0].reshape(p, p, 3), latent[:, :p, :p].permute(1, 2, 0))


def test_patchify_refuses_sizes_that_do_not_divide():
    with pytest.raises(ShapeError, match="5x4 is not a multiple of the patch size 2"):
        patchify(torch.zeros(1, 5, 4), 2)
    with pytest.raises(ShapeError, match="do not form a grid"):
        unpatchify(torch.zeros(5, 4), (2, 2), 1)


def test_neighbours_joined_are_one_segment_of_their_tokens_together() -> None:
    segments = Segments.from_grids([(1, 2), (1, 2), (3, 1), (3, 1)])
    joined = segments.joined(2)
    assert joined.lengths == (4, 6)
    assert joined.cu_seqlens.tolist() == [0, 4, 10]
    assert segments.joined(1) is segments
