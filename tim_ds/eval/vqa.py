"""Models of transformers that answer questions about a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from tim_ds.eval.pretrained import load_pretrained, of_transformers

_CHAT_REQUEST = "{question} Answer with yes or no only."
_MAX_NEW_TOKENS = 8


class ClassifyingAnswerer:
    """ViLT: an answer out of a fixed list."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor

    @torch.inference_mode()
    def __call__(self, picture: Image.Image, questions: Sequence[str]) -> list[str]:
        inputs = self.processor(
            images=[picture] * len(questions), text=list(questions), padding=True, return_tensors="pt"
        ).to(self.model.device)
        best = self.model(**inputs).logits.argmax(dim=-1).tolist()
        return [str(self.model.config.id2label[place]) for place in best]


class GeneratingAnswerer:
    """BLIP: a short answer written by a decoder trained for question answering."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor

    @torch.inference_mode()
    def __call__(self, picture: Image.Image, questions: Sequence[str]) -> list[str]:
        inputs = self.processor(
            images=[picture] * len(questions), text=list(questions), padding=True, return_tensors="pt"
        ).to(self.model.device)
        written = self.model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        return [text.strip() for text in self.processor.batch_decode(written, skip_special_tokens=True)]


class ChatAnswerer:
    """A vision-language chat model, asked one question at a time to answer with yes or no."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor

    @torch.inference_mode()
    def __call__(self, picture: Image.Image, questions: Sequence[str]) -> list[str]:
        return [self._ask(picture, question) for question in questions]

    def _ask(self, picture: Image.Image, question: str) -> str:
        content = [
            {"type": "image", "image": picture},
            {"type": "text", "text": _CHAT_REQUEST.format(question=question)},
        ]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        written = self.model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        new = written[:, inputs["input_ids"].shape[1] :]
        return str(self.processor.batch_decode(new, skip_special_tokens=True)[0]).strip()


Answerer = ClassifyingAnswerer | GeneratingAnswerer | ChatAnswerer


def load_answerer(name: str) -> Answerer:
    """The model of a local folder or a hub id, on the CPU, in the precision of its checkpoint.

    ViLT and BLIP are taken as the question answerers they are; anything else must be a vision-language chat
    model.

    Raises:
        RequestError: if it is not there, or does none of that.
    """
    of_config, of_processor = of_transformers("AutoConfig", "AutoProcessor")

    def load(which: Any) -> Any:
        return load_pretrained("--vqa", name, lambda found: which.from_pretrained(found, dtype="auto"))

    kind = load_pretrained("--vqa", name, of_config.from_pretrained).model_type
    processor = load_pretrained("--vqa", name, of_processor.from_pretrained)
    if kind == "vilt":
        return ClassifyingAnswerer(load(of_transformers("ViltForQuestionAnswering")), processor)
    if kind == "blip":
        return GeneratingAnswerer(load(of_transformers("BlipForQuestionAnswering")), processor)
    return ChatAnswerer(load(of_transformers("AutoModelForImageTextToText")), processor)
