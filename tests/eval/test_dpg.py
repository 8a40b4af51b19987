"""DPG-Bench: the file of questions, the dependency rule, aggregation, both layouts of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.eval.tiny_scorers import write_random_picture
from tim_ds.errors import RequestError
from tim_ds.eval import dpg
from tim_ds.eval.dpg import Prompt, Question
from tim_ds.eval.generate import open_pictures
from tim_ds.eval.results import ScoreLog

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language"
)
ROWS = [
    'barn,"A red barn, with a door",,1,0,entity,whole,entity - whole (barn),Is there a barn?',
    'barn,"A red barn, with a door",,2,1,attribute,color,"attribute - color (barn, red)",Is the barn red?',
    'barn,"A red barn, with a door",,3,1,entity,part,"entity - part (barn, door)",Has the barn a door?',
    'barn,"A red barn, with a door",,4,"2,3",relation,spatial,relation - spatial (x),Is it on the barn?',
    "cat,A cat,,1,0,entity,whole,entity - whole (cat),Is there a cat?",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "dpg_bench.csv"
    path.write_text("\n".join([HEADER, *ROWS]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def prompts(path: Path) -> tuple[Prompt, ...]:
    return dpg.read_questions(path).prompts


def test_every_row_is_a_question_the_first_one_too(path: Path) -> None:
    found = dpg.read_questions(path)
    barn, cat = found.prompts
    assert barn.item == "barn" and barn.text == "A red barn, with a door" and cat.text == "A cat"
    assert barn.questions[0] == Question(1, (), "entity - whole", "Is there a barn?")
    assert [q.parents for q in barn.questions] == [(), (1,), (1,), (2, 3)]
    assert [q.broad_category for q in barn.questions] == ["entity", "attribute", "entity", "relation"]
    assert (found.num_unknown_parents, found.num_repeated) == (0, 0)


def test_what_does_not_fit_together_is_counted(path: Path) -> None:
    text = path.read_text() + "cat,A cat,,1,7,entity,whole,entity - whole (cat),Is it a cat?\n"
    path.write_text(text)
    found = dpg.read_questions(path)
    assert (found.num_unknown_parents, found.num_repeated, found.num_other_texts) == (1, 1, 0)
    assert found.prompts[1].questions[0].text == "Is it a cat?"
    assert dpg.apply_dependencies(found.prompts[1].questions, {1: True}) == {1: True}
    path.write_text(text + "cat,Another cat,,2,0,entity,whole,entity - whole (cat),Is it a cat?\n")
    found = dpg.read_questions(path)
    assert found.num_other_texts == 1 and found.prompts[1].text == "A cat"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,text\na,b", "no column proposition_id, dependency, tuple, question_natural_language"),
        (HEADER, "holds no questions"),
        (f"{HEADER}\na,b,,x,0,,,c,d", "line 2: expected numbers, received proposition_id 'x'"),
        (f"{HEADER}\na,b,,1,,,,c,d", "line 2: nothing in dependency"),
        (f"{HEADER}\n../a,b,,1,0,,,c,d", "item_id '../a' cannot be a file name"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(RequestError) as caught:
        dpg.read_questions(tmp_path / "q.csv")
    assert message in str(caught.value) and "ELLA" in str(caught.value)


@pytest.mark.parametrize(
    ("answers", "met"),
    [
        ("yyyy", "yyyy"),
        ("nyyy", "nnnn"),
        # The fourth falls with either parent; the third does not depend on the second.
        ("ynyy", "ynyn"),
        ("yyny", "yynn"),
        ("yyyn", "yyyn"),
    ],
)
def test_a_question_counts_only_if_all_it_depends_on_do(
    prompts: tuple[Prompt, ...], answers: str, met: str
) -> None:
    yes = {n: letter == "y" for n, letter in enumerate(answers, 1)}
    found = dpg.apply_dependencies(prompts[0].questions, yes)
    assert "".join("y" if found[n] else "n" for n in (1, 2, 3, 4)) == met


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", True),
        (" Yes.", True),
        ("yes, a red one", True),
        ("no", False),
        ("", False),
        ("yesterday", False),
    ],
)
def test_the_first_word_decides(answer: str, expected: bool) -> None:
    assert dpg.is_yes(answer) == expected


def test_scores_are_means_of_pictures_then_prompts(prompts: tuple[Prompt, ...]) -> None:
    def yes(*numbers: int) -> dict[int, bool]:
        return {n: n in numbers for n in (1, 2, 3, 4)}

    answers = [[yes(1, 2, 3, 4), yes(2, 3, 4)], [{1: True}, {1: False}]]
    scores, details = dpg.summarise(prompts, answers)
    # Barn: 4/4 and, without the barn, 0/4; cat: 1 and 0. Every picture counts in the categories, too.
    assert details["per_prompt"] == {"barn": 0.5, "cat": 0.5} and scores["overall"] == 0.5
    assert scores["attribute"] == 0.5 and scores["relation"] == 0.5
    assert details["level_2"]["entity - whole"] == pytest.approx(2 / 4)
    assert details["level_1_before_dependencies"]["attribute"] == 1.0
    assert scores["entity"] == pytest.approx((1 + 1 + 0 + 0 + 1 + 0) / 6)
    assert details["num_questions"] == {
        "attribute - color": 2,
        "entity - part": 2,
        "entity - whole": 4,
        "relation - spatial": 2,
    }


def test_overall_weighs_prompts_alike_whatever_their_questions(prompts: tuple[Prompt, ...]) -> None:
    none = {n: False for n in (1, 2, 3, 4)}
    scores, _ = dpg.summarise(prompts, [[none], [{1: True}]])
    assert scores["overall"] == 0.5


class Reader:
    """Answers yes if the picture is bright; counts what it was asked."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[tuple[int, list[str]]] = []
        self.stop_after = stop_after

    def __call__(self, picture: Image.Image, questions: Sequence[str]) -> list[str]:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        value = int(np.asarray(picture).mean())
        self.asked.append((value, list(questions)))
        return ["Yes" if value > 100 else "no"] * len(questions)


def write_flat(path: Path, value: int, side: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (value,) * 3).save(path)


def score(folder: Path, prompts: Any, log: ScoreLog, reader: Reader, **options: Any) -> Any:
    wanted = dpg.wanted_pictures(prompts, num_per_prompt=2, seed=0, layout=options.get("layout", "files"))
    pictures = open_pictures(folder, wanted, progress=False)
    return dpg.score_pictures(pictures, prompts, reader, log, progress=False, **options)


def test_single_files_are_asked_all_questions_and_an_interruption_loses_one(
    tmp_path: Path, prompts: tuple[Prompt, ...]
) -> None:
    for n, item in enumerate(("barn", "cat")):
        for k in range(2):
            write_flat(tmp_path / "pictures" / item / f"{k:05d}.png", 50 + 100 * (n ^ k))
    first = Reader(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "pictures", prompts, ScoreLog(tmp_path, "dpg", {}), first)
    second = Reader()
    found = score(tmp_path / "pictures", prompts, ScoreLog(tmp_path, "dpg", {}), second)
    assert len(first.asked) == 3 and len(second.asked) == 1
    assert first.asked[0][1] == [q.text for q in prompts[0].questions]
    assert found == [
        [{n: False for n in (1, 2, 3, 4)}, {n: True for n in (1, 2, 3, 4)}],
        [{1: True}, {1: False}],
    ]


def test_grids_are_cut_row_by_row(tmp_path: Path, prompts: tuple[Prompt, ...]) -> None:
    for item, values in (("barn", (10, 20, 130, 140)), ("cat", (150, 30, 40, 50))):
        tiles = [np.full((4, 6, 3), v, dtype=np.uint8) for v in values]
        grid = np.concatenate([np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:], 1)])
        (tmp_path / "grids").mkdir(exist_ok=True)
        Image.fromarray(grid).save(tmp_path / "grids" / f"{item}.png")
    reader = Reader()
    found = score(tmp_path / "grids", prompts, ScoreLog(tmp_path, "a", {}), reader, layout="grid")
    assert [value for value, _ in reader.asked] == [10, 20, 130, 140, 150, 30, 40, 50]
    assert [answers[1] for answers in found[0]] == [False, False, True, True]
    few = Reader()
    score(tmp_path / "grids", prompts, ScoreLog(tmp_path, "b", {}), few, layout="grid", num_of_grid=1)
    assert [value for value, _ in few.asked] == [10, 150]
    write_flat(tmp_path / "grids" / "cat.png", 1, side=5)
    with pytest.raises(RequestError, match=r"cat.png: grid of 5x5: expected even sides"):
        score(tmp_path / "grids", prompts, ScoreLog(tmp_path, "c", {}), Reader(), layout="grid")


def test_grids_written_for_the_published_evaluator_hold_the_pictures(
    tmp_path: Path, prompts: tuple[Prompt, ...]
) -> None:
    wanted = dpg.wanted_pictures(prompts, num_per_prompt=4, seed=0)
    for n, one in enumerate(wanted):
        write_random_picture(tmp_path / "pictures" / one.name, n)
    pictures = open_pictures(tmp_path / "pictures", wanted, progress=False)
    dpg.write_grids(pictures, prompts, tmp_path / "grids")
    with Image.open(tmp_path / "grids" / "cat.png") as grid:
        parts = dpg.cut_grid(grid)
        for k, part in enumerate(parts):
            np.testing.assert_array_equal(np.asarray(part), np.asarray(Image.open(pictures.path(4 + k))))
    with pytest.raises(RequestError, match="a grid holds 4 pictures a prompt, received 2"):
        half = [one for one in wanted if one.name.endswith(("0.png", "1.png"))]
        for one in wanted:
            if one not in half:
                (tmp_path / "pictures" / one.name).unlink()
        dpg.write_grids(open_pictures(tmp_path / "pictures", half, progress=False), prompts, tmp_path / "g")
