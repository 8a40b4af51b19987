"""Gemma and T5 states, from tiny random models saved in the format of the released ones."""

import logging
import shutil
from typing import Any

import pytest
import torch

from data_pipeline.config import TextEncoderConfig
from data_pipeline.encoders.language_model import LanguageModelEncoder, load_gemma, load_t5
from data_pipeline.encoders.text import build_text_encoder, fill_up
from data_pipeline.errors import DataError
from tests.data_pipeline.tiny_models import WORDS, save_gemma, save_t5, save_tokenizer

CAPTIONS = ["a three above a seven", "", "a gap"]


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    save_gemma(folder)
    return folder


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    save_t5(folder)
    return folder


def gemma(folder: Any, *, constant_padding: bool = False, max_tokens: int = 16) -> LanguageModelEncoder:
    # float32: the comparisons below are about which states are taken, not about rounding.
    return load_gemma(
        str(folder), max_tokens=max_tokens, constant_padding=constant_padding, dtype=torch.float32
    )


def test_gemma_states_are_the_final_hidden_states_of_the_real_tokens(gemma_folder):
    from transformers import Gemma3ForCausalLM

    encoder = gemma(gemma_folder)
    assert encoder.width == 16
    causal = Gemma3ForCausalLM.from_pretrained(gemma_folder, dtype=torch.float32).eval()
    states = encoder.encode(CAPTIONS)
    assert [tuple(s.shape) for s in states] == [(6, 16), (1, 16), (3, 16)]
    for caption, received in zip(CAPTIONS, states, strict=True):
        ids = torch.tensor([[2, *(WORDS.index(word) for word in caption.split())]])
        with torch.no_grad():
            expected = causal(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        # Alone against padded in a batch: float32 sums of 24 terms in another order.
        torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-5)


def test_t5_states_are_those_of_the_encoder(t5_folder):
    encoder = load_t5(str(t5_folder), max_tokens=16, dtype=torch.float32)
    assert encoder.width == 16
    together = encoder.encode(CAPTIONS)
    assert [len(s) for s in together] == [6, 1, 3]
    for caption, received in zip(CAPTIONS, together, strict=True):
        # Alone against padded in a batch, as above.
        torch.testing.assert_close(received, encoder.encode([caption])[0], rtol=1e-5, atol=1e-5)


def test_constant_padding_fills_up_to_the_longest_caption(gemma_folder):
    plain = gemma(gemma_folder)
    encoder = gemma(gemma_folder, constant_padding=True)
    states = encoder.encode(CAPTIONS)
    assert plain.padding_state is None and encoder.padding_state is not None
    for least, length in ((0, 6), (4, 6), (9, 9)):
        filled = fill_up(states, encoder.padding_state, least)
        assert [len(s) for s in filled] == [length] * 3
        for short, long in zip(states, filled, strict=True):
            assert torch.equal(long[: len(short)], short)
            assert torch.equal(long[len(short) :], encoder.padding_state.expand(length - len(short), -1))
    assert [len(s) for s in fill_up(states, plain.padding_state, 9)] == [6, 1, 3]


def test_the_padding_state_is_the_path_without_attention(gemma_folder):
    encoder = gemma(gemma_folder, constant_padding=True)
    model = encoder.model
    with torch.no_grad():
        # The token's embedding through each layer's feed-forward branch, by hand.
        x = model.embed_tokens(torch.tensor([[0]]))
        for layer in model.layers:
            x = x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))
        expected = model.norm(x)[0]
    # The same float32 operations.
    torch.testing.assert_close(encoder.padding_state, expected, rtol=1e-6, atol=1e-6)
    assert not any(layer.self_attn._forward_hooks for layer in model.layers), "hooks must be gone"


def test_released_precision_is_the_default(gemma_folder):
    encoder = build_text_encoder(TextEncoderConfig(kind="gemma", path=str(gemma_folder), padding="constant"))
    assert isinstance(encoder, LanguageModelEncoder)
    parameters = list(encoder.model.parameters())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in parameters)
    states = encoder.encode(["a gap"])[0]
    assert states.dtype == torch.float32 and bool(states.isfinite().all())


def test_a_long_caption_is_cut_with_a_warning_that_names_it(gemma_folder, caplog):
    encoder = gemma(gemma_folder, max_tokens=4)
    with caplog.at_level(logging.WARNING):
        assert len(encoder.encode(["a three a"])[0]) == 4
        assert "cut" not in caplog.text
        assert len(encoder.encode(["a three above a seven"])[0]) == 4
    assert "caption of 6 tokens cut to 4: 'a three above" in caplog.text


def test_ids_give_the_states_of_their_captions(gemma_folder):
    encoder = gemma(gemma_folder)
    ids = encoder.tokenize(CAPTIONS)
    assert [row.tolist() for row in ids][1:] == [[2], [2, 4, 8]]
    assert all(row.dtype == torch.int32 for row in ids)
    for one, other in zip(encoder.encode_ids(ids), encoder.encode(CAPTIONS), strict=True):
        assert torch.equal(one, other)
    assert encoder.encode_ids([]) == encoder.tokenize([]) == []


@pytest.mark.parametrize(
    ("ids", "message"),
    [([9], "up to 9.*within the text encoder's 9"), ([-1, 2], "none below 0"), ([], "at least one token")],
)
def test_ids_of_another_tokenizer_are_refused(gemma_folder, ids, message):
    with pytest.raises(DataError, match=message):
        gemma(gemma_folder).encode_ids([torch.tensor(ids, dtype=torch.int32)])


def test_no_captions_give_no_states(gemma_folder):
    assert gemma(gemma_folder).encode([]) == []


@pytest.mark.parametrize("kind", ["words", "t5"])
def test_constant_padding_belongs_to_gemma(kind):
    with pytest.raises(DataError, match=rf"padding: 'constant'.*{kind} has none"):
        build_text_encoder(TextEncoderConfig(kind=kind, path="unused", padding="constant"))


def test_another_model_is_refused_by_name(t5_folder, tmp_path):
    with pytest.raises(DataError, match=r"expected a Gemma model in .* received 't5'"):
        gemma(t5_folder)
    with pytest.raises(DataError, match=r"data\.text_encoder\.path: cannot load AutoModel from"):
        gemma(tmp_path)


def test_a_tokenizer_that_gives_nothing_for_the_empty_caption_is_refused(gemma_folder, tmp_path):
    folder = shutil.copytree(gemma_folder, tmp_path / "bare")
    save_tokenizer(folder, "$A")
    with pytest.raises(DataError, match="caption '': the tokenizer gives no tokens"):
        gemma(folder).encode(["", "a gap"])
