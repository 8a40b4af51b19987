"""Captioned pictures with a new word: a folder that anybody's tools would make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.draws import generator
from data_pipeline.errors import DataError
from data_pipeline.handwriting import Prompt, caption
from data_pipeline.handwriting_words import NewName, main


def test_only_the_renamed_digit_has_another_word() -> None:
    name = NewName.parse("five=quint")
    prompt = Prompt((5, None, 8, 5), "column")
    assert name.caption(prompt, "chained") == "a quint above a gap above an eight above a quint"
    assert name.caption(prompt, "listed") == caption(prompt, "listed").replace("five", "quint")


def test_every_drawn_prompt_shows_the_digit() -> None:
    name = NewName.parse("seven=bex")
    drawn = [name.draw(generator(0, "test", 0, number))[0] for number in range(200)]
    assert all(7 in prompt.cells for prompt in drawn)
    assert len({len(prompt.cells) for prompt in drawn}) == 4
    assert {cell for prompt in drawn for cell in prompt.cells} == {None, *range(10)}


def test_pictures_and_captions_lie_beside_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quint"
    assert main(["--rename", "five=quint", "--count", "5", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir())[:2] == ["00000.png", "00000.txt"]
    for number in range(5):
        picture = np.asarray(Image.open(out / f"{number:05d}.png"))
        assert picture.dtype == np.uint8 and 8 in picture.shape and picture.max() > 200
        assert "quint" in (out / f"{number:05d}.txt").read_text()
    assert main(["--rename", "five=quint", "--count", "5", "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["quint", "5=quint", "five=", "five=Quint", "five=seven", "five=gap", "five=odd"]
)
def test_other_renamings_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="--rename: expected"):
        NewName.parse(text)
