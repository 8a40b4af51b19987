"""Captions to text states: one interface, whatever produces them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.config import TextEncoderConfig
from data_pipeline.errors import DataError

logger = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """Captions to states. The null caption is the empty string."""

    @property
    def width(self) -> int:
        """Width of a state."""
        ...

    @property
    def padding_state(self) -> Tensor | None:
        """float32 [1, width]: what captions that meet in a batch are filled up with (`fill_up`); None where
        they keep their own lengths."""
        ...

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """float32 [n, width] of each caption, trimmed to its real length; n is at least 1, also for ""."""
        ...


def fill_up(states: Sequence[Tensor], padding_state: Tensor | None, length: int = 0) -> list[Tensor]:
    """Captions [n, E] of one batch, filled up with `padding_state` to the longest of them, and to `length` at
    least; as they are where there is none.

    The released weights were trained so, and attend to the padding: dropped captions and the empty ones of
    guidance are filled up to the length of the batch that they stand in, like any other.
    """
    if padding_state is None:
        return list(states)
    length = max(length, *(len(state) for state in states))
    return [torch.cat([state, padding_state.expand(length - len(state), -1)]) for state in states]


class WordsEncoder:
    """Fixed random vectors: one a word plus one a position. Nothing is learnt and nothing is downloaded.

    A state is (word + position) / sqrt(2), both standard normal, so its entries have unit variance. Words are
    lower-cased runs of letters, digits and apostrophes; every other visible character is a word of its own.
    The sequence starts with a begin token, so the empty caption has one state. A vector depends on its word
    alone: two machines, or two runs, agree. Values are representable in float16, in which shards store them,
    so a caption encoded while sampling gives exactly the states that training saw.
    """

    def __init__(self, width: int = 64, max_tokens: int = 256) -> None:
        if width < 1 or max_tokens < 1:
            raise DataError(
                f"words encoder: width and max_tokens must be at least 1, received {width}, {max_tokens}"
            )
        self._width = width
        self.max_tokens = max_tokens

    @property
    def width(self) -> int:
        return self._width

    @property
    def padding_state(self) -> None:
        return None

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """float32 [n, width] of each caption. Words beyond `max_tokens` are cut, with a warning."""
        return [self._encode(caption) for caption in captions]

    def _encode(self, caption: str) -> Tensor:
        words = ["", *split_words(caption)]
        if len(words) > self.max_tokens:
            logger.warning("caption of %d tokens cut to %d: %.80r", len(words), self.max_tokens, caption)
            words = words[: self.max_tokens]
        states = np.stack([_vector("word", word, self._width) for word in words])
        states += np.stack([_vector("position", str(n), self._width) for n in range(len(words))])
        rounded = (states * np.float32(0.5**0.5)).astype(np.float16)
        return torch.from_numpy(rounded.astype(np.float32))


def split_words(caption: str) -> list[str]:
    """Lower-cased words; punctuation marks are words of their own."""
    return re.findall(r"[\w']+|[^\w\s]", caption.lower())


@lru_cache(maxsize=65536)
def _vector(kind: str, name: str, width: int) -> np.ndarray:
    digest = blake2b(f"{kind}\x00{name}".encode(), digest_size=16).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return rng.standard_normal(width, dtype=np.float32)


def build_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """The encoder that `config` names; weights are on the CPU.

    Raises:
        DataError: if weights cannot be loaded, or constant padding is asked of an encoder that has none.
    """
    constant = config.padding == "constant"
    if constant and config.kind != "gemma":
        raise DataError(
            f"data.text_encoder.padding: 'constant' repeats the padding of the released weights, which were "
            f"trained on gemma; {config.kind} has none, use 'none'"
        )
    if config.kind == "words":
        return WordsEncoder(config.width, config.max_tokens)
    # transformers takes seconds to import, which the words encoder must not cost.
    from data_pipeline.encoders.language_model import load_gemma, load_t5

    path = config.path or ""
    if config.kind == "gemma":
        return load_gemma(path, max_tokens=config.max_tokens, constant_padding=constant)
    return load_t5(path, max_tokens=config.max_tokens)
