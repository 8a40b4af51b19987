"""Question answering models of all three kinds, loaded by the real classes from tiny random weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.tiny_scorers import save_blip, save_chat, save_vilt
from tim_ds.errors import RequestError
from tim_ds.eval.vqa import ChatAnswerer, ClassifyingAnswerer, GeneratingAnswerer, load_answerer

QUESTIONS = ["is there a dog?", "is the car red and blue?"]


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("save", "kind"),
    [(save_vilt, ClassifyingAnswerer), (save_blip, GeneratingAnswerer), (save_chat, ChatAnswerer)],
    ids=["vilt", "blip", "chat"],
)
def test_one_answer_a_question_whatever_is_asked_beside_it(
    tmp_path: Path, picture: Image.Image, save: Callable[[Path], Path], kind: type
) -> None:
    answerer = load_answerer(str(save(tmp_path / "model")))
    assert isinstance(answerer, kind)
    answers = answerer(picture, QUESTIONS)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    assert [answerer(picture, [question])[0] for question in QUESTIONS] == answers


def test_a_list_of_answers_gives_the_likeliest(tmp_path: Path, picture: Image.Image) -> None:
    answerer = load_answerer(str(save_vilt(tmp_path / "model")))
    assert isinstance(answerer, ClassifyingAnswerer)
    bias = answerer.model.classifier[-1].bias
    for place, expected in enumerate(["yes", "no", "maybe"]):
        with torch.no_grad():
            bias.zero_()
            bias[place] = 100.0
        assert answerer(picture, QUESTIONS) == [expected] * 2


def test_a_chat_model_is_asked_for_yes_or_no(tmp_path: Path, picture: Image.Image) -> None:
    """The request reaches the model, the answer holds new words alone."""
    answerer = load_answerer(str(save_chat(tmp_path / "model")))
    assert isinstance(answerer, ChatAnswerer)
    asked: list[torch.Tensor] = []
    real = answerer.model.generate

    def generate(**inputs: torch.Tensor) -> torch.Tensor:
        asked.append(inputs["input_ids"])
        yes = torch.tensor([[answerer.processor.tokenizer.convert_tokens_to_ids("yes")]])
        assert real(**inputs).shape[1] > inputs["input_ids"].shape[1]
        return torch.cat([inputs["input_ids"], yes], dim=1)

    answerer.model.generate = generate
    assert answerer(picture, ["is there a dog?"]) == ["yes"]
    text = answerer.processor.tokenizer.decode(asked[0][0], skip_special_tokens=True)
    assert "is there a dog" in text and "yes" in text and "no" in text and text.endswith("answer")


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--vqa .*none: no such folder of a model"):
        load_answerer(str(tmp_path / "none"))


def test_a_library_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as transformers beside a torchvision of another build than torch."""

    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise ImportError(f"no {name}: operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "transformers", Broken())  # type: ignore[arg-type]  # a module that fails
    with pytest.raises(
        RequestError, match=r"AutoConfig and AutoProcessor cannot be imported .*remove torchvision"
    ):
        load_answerer("somebody/a-model")
