"""Draws depend on (seed, stream, epoch, sample) and on nothing else."""

import numpy as np
import pytest

from data_pipeline.draws import generator, uniforms


def numbers(*key: object) -> tuple[float, ...]:
    return tuple(generator(*key).random(4).tolist())  # type: ignore[arg-type]  # keys are (int, str, int, int)


def test_the_same_key_gives_the_same_numbers():
    assert numbers(3, "noise", 2, 17) == numbers(3, "noise", 2, 17)


def test_every_part_of_the_key_matters():
    keys = [(s, name, e, i) for s in (0, 1) for name in ("noise", "times") for e in (0, 1) for i in (0, 1)]
    assert len({numbers(*key) for key in keys}) == len(keys) == 16


def test_epoch_and_sample_are_not_interchangeable():
    assert numbers(0, "noise", 1, 2) != numbers(0, "noise", 2, 1)


def test_neighbouring_samples_share_no_stretch_of_the_stream():
    # A generator that only offset the counter by the sample would repeat its neighbour a few values later.
    first = generator(0, "noise", 0, 5).integers(0, 2**63, 4096)
    second = generator(0, "noise", 0, 6).integers(0, 2**63, 4096)
    assert len(np.intersect1d(first, second)) == 0


def test_first_draws_over_samples_are_uniform():
    draws = np.array([generator(1, "caption_dropout", 0, i).random() for i in range(4000)])
    # Standard error of the mean is 0.0046 and of a share of 0.1 is 0.0047; five of them.
    assert abs(draws.mean() - 0.5) < 0.023
    assert abs((draws < 0.1).mean() - 0.1) < 0.024


@pytest.mark.parametrize("key", [(-1, "noise", 0, 0), (0, "noise", -1, 0), (0, "noise", 0, 2**64)])
def test_a_number_outside_64_bits_is_refused(key):
    with pytest.raises(ValueError, match="expected 0 to"):
        generator(*key)


def test_uniforms_belong_to_seed_stream_epoch_and_sample():
    ids = np.arange(20_000)
    streams = ("caption_dropout", "flip")
    draws, flips = uniforms(3, streams, 1, ids)
    assert np.array_equal(uniforms(3, streams, 1, np.array([5, 77])), [draws[[5, 77]], flips[[5, 77]]])
    assert np.array_equal(uniforms(3, ("flip",), 1, ids)[0], flips)
    assert draws.min() >= 0.0 and draws.max() < 1.0
    # Mean and correlations of 20,000 uniform draws have standard errors of 0.002 and 0.007.
    assert abs(draws.mean() - 0.5) < 0.01 and abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.035
    (seed,), (epoch,) = uniforms(4, streams[:1], 1, ids), uniforms(3, streams[:1], 2, ids)
    for other in (seed, flips, epoch):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.035
