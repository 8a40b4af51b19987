"""Permutations by position: bijections, uniform over keys, the same everywhere."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from data_pipeline.permutation import derive_key, mix, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65_537])
def test_every_place_is_taken_once(size):
    for epoch in range(3):
        places = permute(np.arange(size), size, derive_key(7, "test", epoch))
        assert np.array_equal(np.sort(places), np.arange(size))


def test_each_position_may_have_a_domain_and_a_key_of_its_own():
    sizes, keys = np.array([5, 9, 1000]), mix(np.arange(3, dtype=np.uint64))
    together = permute(np.array([4, 0, 999]), sizes, keys)
    alone = [int(permute(np.array([q]), n, k)[0]) for q, n, k in zip((4, 0, 999), sizes, keys, strict=True)]
    assert together.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_small_domains_take_every_order_equally_often(size):
    draws = 24_000
    keys = mix(np.arange(draws, dtype=np.uint64) + np.uint64(1))
    orders = np.stack([permute(np.full(draws, q), size, keys) for q in range(size)], axis=1)
    counts = Counter(map(tuple, orders.tolist()))
    every = list(permutations(range(size)))
    expected = draws / len(every)
    chi_squared = sum((counts[order] - expected) ** 2 / expected for order in every)
    # Mean and standard deviation of chi squared are n and sqrt(2 n); five deviations, with fixed keys.
    degrees = len(every) - 1
    assert chi_squared < degrees + 5 * np.sqrt(2 * degrees)


def test_positions_go_far_in_a_large_domain():
    places = permute(np.arange(1000), 10**8, derive_key(0, "test", 0))
    # Neighbours land a third of the domain apart on average; standard error 0.24 / sqrt(1000) = 0.0075.
    assert np.abs(np.diff(places)).mean() / 1e8 == pytest.approx(1 / 3, abs=0.04)


def test_keys_depend_on_seed_stream_and_epoch():
    keys = {int(derive_key(s, n, e)) for s in (0, 1) for n in ("a", "b") for e in (0, 1)}
    assert len(keys) == 8


def test_values_never_change():
    # A stored run resumes under these numbers; wrapping integer arithmetic has no platform.
    assert permute(np.arange(6), 10**6, derive_key(0, "plan.samples", 0)).tolist() == STORED


def test_positions_outside_the_domain_are_refused():
    with pytest.raises(ValueError, match="0 to size - 1"):
        permute(np.array([3]), 3, np.uint64(0))


STORED = [417564, 4810, 329499, 323874, 339044, 522791]
