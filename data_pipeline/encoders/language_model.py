"""Captions to the hidden states of a pretrained language model (Gemma, T5), through transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.config import TextEncoderConfig
from data_pipeline.encoders.identity import LOADING_ERRORS
from data_pipeline.errors import DataError

logger = logging.getLogger(__name__)


class CaptionTokenizer:
    """Captions to token ids, cut to `max_tokens`. Needs no weights."""

    def __init__(self, tokenizer: Any, *, max_tokens: int) -> None:
        if max_tokens < 1:
            raise DataError(f"data.text_encoder.max_tokens: expected at least 1, received {max_tokens}")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def tokenize(self, captions: Sequence[str]) -> list[Tensor]:
        """int32 [n] of each caption, n at least 1. Tokens beyond `max_tokens` are cut, with a warning.

        Raises:
            DataError: if the tokenizer gives no token at all for a caption.
        """
        if not captions:
            return []
        rows = self.tokenizer(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]
        for caption, row in zip(captions, rows, strict=True):
            self._check_length(caption, len(row))
        return [torch.tensor(row, dtype=torch.int32) for row in rows]

    def _check_length(self, caption: str, length: int) -> None:
        if length == 0:
            raise DataError(
                f"caption {caption[:80]!r}: the tokenizer gives no tokens; it must add one of its own"
            )
        if length == self.max_tokens:
            whole = len(self.tokenizer(caption)["input_ids"])
            if whole > self.max_tokens:
                logger.warning("caption of %d tokens cut to %d: %.80r", whole, self.max_tokens, caption)


class LanguageModelEncoder:
    """Final-normed last hidden states of the caption's own tokens, in float32.

    Captions of one call share a forward, padded on the right under a mask; the padding's states are cut off.
    A `padding_state` is for those who put captions together (`fill_up`).
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, width: int, max_tokens: int, padding_state: Tensor | None = None
    ) -> None:
        self._tokens = CaptionTokenizer(tokenizer, max_tokens=max_tokens)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._padding_state = padding_state
        self._width = width

    @property
    def width(self) -> int:
        return self._width

    @property
    def padding_state(self) -> Tensor | None:
        return self._padding_state

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> LanguageModelEncoder:
        """Move the weights to `device`; returns self."""
        self.model.to(device)
        return self

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """float32 [n, width] of each caption, on the CPU. Tokens beyond `max_tokens` are cut, with a warning.

        Raises:
            DataError: if the tokenizer gives no token at all for a caption.
        """
        return self.encode_ids(self.tokenize(captions))

    def tokenize(self, captions: Sequence[str]) -> list[Tensor]:
        """int32 [n] of each caption: what `encode_ids` takes."""
        return self._tokens.tokenize(captions)

    @torch.no_grad()
    def encode_ids(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """float32 [n, width] of each int [n], on the CPU: `encode` after the tokenizer.

        Raises:
            DataError: if an id is none of the model's vocabulary.
        """
        if not ids:
            return []
        lengths = [len(row) for row in ids]
        if min(lengths) == 0:
            raise DataError("token ids: expected at least one token a caption, received none")
        vocabulary = self.model.get_input_embeddings().num_embeddings
        largest = max(int(row.max()) for row in ids)
        if largest >= vocabulary or min(int(row.min()) for row in ids) < 0:
            raise DataError(
                f"token ids up to {largest}, none below 0, expected within the text encoder's {vocabulary}; "
                f"they are of another tokenizer"
            )
        input_ids = nn.utils.rnn.pad_sequence(
            [row.long() for row in ids], batch_first=True, padding_value=self.tokenizer.pad_token_id or 0
        )
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        hidden = self.hidden(input_ids.to(self.device), mask.long().to(self.device))
        return [row[:n].float().cpu() for row, n in zip(hidden, lengths, strict=True)]

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Final-normed last hidden states [B, n, width] of ids [B, n], of which those under a mask of 1 are
        real."""
        return self.model(input_ids=input_ids, attention_mask=mask).last_hidden_state


def empty_model(config: TextEncoderConfig, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The model of a text encoder on the meta device, without values.

    Raises:
        DataError: if there is no config at the path.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.models.t5 import T5EncoderModel

    found = _from_pretrained(AutoConfig, config.path or "")
    with torch.device("meta"):
        if config.kind == "t5":
            return T5EncoderModel._from_config(found, dtype=dtype)
        return AutoModel.from_config(found, dtype=dtype)


def load_gemma(
    path: str, *, max_tokens: int, constant_padding: bool, dtype: torch.dtype = torch.bfloat16
) -> LanguageModelEncoder:
    """A Gemma decoder from a folder or hub name, in bfloat16 as the released weights were trained with.

    Args:
        path: of a causal or base model with its tokenizer.
        max_tokens: longest caption.
        constant_padding: whether it has the padding state of the released weights (`padding_state`).
        dtype: of the weights.
    """
    from transformers import AutoModel, AutoTokenizer

    model = _from_pretrained(AutoModel, path, dtype=dtype)
    if not model.config.model_type.startswith("gemma"):
        raise DataError(
            f"data.text_encoder.path: expected a Gemma model in {path!r}, "
            f"received {model.config.model_type!r}"
        )
    tokenizer = _from_pretrained(AutoTokenizer, path)
    return LanguageModelEncoder(
        model,
        tokenizer,
        width=model.config.hidden_size,
        max_tokens=max_tokens,
        padding_state=padding_state(model, tokenizer.pad_token_id) if constant_padding else None,
    )


def load_t5(path: str, *, max_tokens: int, dtype: torch.dtype = torch.bfloat16) -> LanguageModelEncoder:
    """The encoder of a T5 model from a folder or hub name."""
    from transformers import AutoTokenizer
    from transformers.models.t5 import T5EncoderModel

    model = _from_pretrained(T5EncoderModel, path, dtype=dtype)
    tokenizer = _from_pretrained(AutoTokenizer, path)
    return LanguageModelEncoder(model, tokenizer, width=model.config.d_model, max_tokens=max_tokens)


def _from_pretrained(kind: Any, path: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path, **options)
    except LOADING_ERRORS as error:
        raise DataError(
            f"data.text_encoder.path: cannot load {kind.__name__} from {path!r} ({error}); "
            f"expected a folder with config.json, safetensors weights and a tokenizer, or a hub name"
        ) from error


@torch.no_grad()
def padding_state(model: Any, pad_token_id: int) -> Tensor:
    """float32 [1, width]: what the released TiM weights saw at every padded position of every caption.

    They were trained on FlashAttention, whose output at padded positions is zero: a padding token passes
    through the feed-forward layers alone, so its state depends on neither caption nor position.
    """
    device = next(model.parameters()).device
    with _silent_attention(model):
        output = model(input_ids=torch.tensor([[pad_token_id]], device=device))
    return output.last_hidden_state[0].float().cpu()


@contextmanager
def _silent_attention(model: Any) -> Iterator[None]:
    """Within, every attention layer outputs zero."""

    def silence(_module: Any, _inputs: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:])

    handles = [layer.self_attn.register_forward_hook(silence) for layer in model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
