"""Captions to states: fixed, trimmed, storable."""

import logging

import pytest
import torch

from data_pipeline.config import TextEncoderConfig
from data_pipeline.encoders.text import WordsEncoder, build_text_encoder, split_words
from data_pipeline.errors import DataError


def test_states_have_the_length_of_the_caption_and_a_begin_token():
    states = WordsEncoder(width=16).encode(["a three, a gap", "", "a"])
    assert [tuple(s.shape) for s in states] == [(6, 16), (1, 16), (2, 16)]
    assert all(s.dtype == torch.float32 for s in states)
    assert torch.equal(states[0][:1], states[1])
    assert torch.equal(states[0][:2], states[2])


def test_the_same_word_at_two_places_differs_by_the_position_alone():
    encoder = WordsEncoder(width=512)
    one, two = encoder.encode(["three three seven", "seven seven three"])
    # position 1 minus position 2, from two different words; each state was rounded to float16 (2^-10 at 4).
    torch.testing.assert_close(one[1] - one[2], two[1] - two[2], atol=4 * 2**-10, rtol=0)
    assert float((one[1] - two[1]).abs().mean()) > 0.5


def test_entries_have_unit_variance_and_words_are_unrelated():
    words = [f"word{n}" for n in range(200)]
    states = torch.stack([s[1] for s in WordsEncoder(width=256).encode(words)])
    centred = states - states.mean(dim=0)
    # The position is shared by all: it carries half of the variance, the words the other half.
    # 51,200 entries: standard error of a variance of 0.5 is 0.003; five of them.
    assert abs(float(centred.var()) - 0.5) < 0.016
    # The position vector alone has 256 entries: standard error of its variance of 0.5 is 0.044.
    assert abs(float(states.var()) - 1.0) < 0.25
    cosine = torch.nn.functional.normalize(centred, dim=1)
    off_diagonal = (cosine @ cosine.T).fill_diagonal_(0).abs().max()
    # Independent directions in 256 dimensions: standard deviation 0.0625; the largest of 20,000 pairs.
    assert float(off_diagonal) < 0.35


def test_values_do_not_change_between_versions():
    # The vectors are part of the data format: shards made today must fit prompts encoded tomorrow.
    state = WordsEncoder(width=4).encode(["three"])[0][1]
    assert state.tolist() == [-2.310546875, -1.1083984375, 0.4482421875, -0.393798828125]


def test_states_survive_storage_in_half_precision():
    states = WordsEncoder(width=64).encode(["an eight above a gap"])[0]
    assert torch.equal(states.half().float(), states)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A Three,a gap", ["a", "three", ",", "a", "gap"]),
        ("  it's 12:30!  ", ["it's", "12", ":", "30", "!"]),
        ("ÉTÉ\n雪", ["été", "雪"]),
        ("", []),
    ],
)
def test_words_are_lower_case_and_punctuation_stands_alone(caption, words):
    assert split_words(caption) == words


def test_a_long_caption_is_cut_with_a_warning_that_names_it(caplog):
    with caplog.at_level(logging.WARNING):
        states = WordsEncoder(width=4, max_tokens=5).encode(["one two three four five six"])[0]
    assert states.shape == (5, 4)
    assert "caption of 7 tokens cut to 5: 'one two three" in caplog.text


def test_build_gives_the_encoder_of_the_recipe():
    encoder = build_text_encoder(TextEncoderConfig(kind="words", width=32))
    assert encoder.width == 32
    with pytest.raises(DataError, match="padding"):
        build_text_encoder(TextEncoderConfig(kind="words", padding="constant"))


@pytest.mark.parametrize("arguments", [{"width": 0}, {"max_tokens": 0}])
def test_an_encoder_without_room_is_refused(arguments):
    with pytest.raises(DataError, match="at least 1"):
        WordsEncoder(**arguments)
