"""DPG-Bench: questions about a picture, some of which only count if others were answered yes.

The published protocol answers with mPLUG-large of modelscope; here any question answering model of
transformers does (`vqa.py`), and a score names it: scores of two models are not comparable.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from tim_ds.errors import RequestError
from tim_ds.eval.generate import PictureSet, Wanted, load_picture
from tim_ds.eval.results import ScoreLog
from tim_ds.pipeline import write_png

PROTOCOL = 1
"""Raised whenever the meaning of a score changes."""
PUBLISHED_PROMPTS = 1065
PUBLISHED_VQA = "mPLUG-large (damo/mplug_visual-question-answering_coco_large_en of modelscope)"
WHERE = "dpg_bench/dpg_bench.csv of https://github.com/TencentQQGYLab/ELLA"

Layout = Literal["files", "grid"]
"""`files`: ITEM/0000k.png; `grid`: ITEM.png, four pictures in two rows."""

_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")


class Answerer(Protocol):
    """What a question answering model is to this benchmark."""

    def __call__(self, picture: Image.Image, questions: Sequence[str]) -> list[str]:
        """One answer a question."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture."""

    number: int
    parents: tuple[int, ...]
    """Questions that must be answered yes for this one to count."""
    category: str
    """Level 2, such as `attribute - color`."""
    text: str

    @property
    def broad_category(self) -> str:
        """Level 1, such as `attribute`."""
        return self.category.split("-")[0].strip()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with its questions."""

    item: str
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class QuestionFile:
    """All prompts, and what in the file did not fit together."""

    prompts: tuple[Prompt, ...]
    num_unknown_parents: int
    """Dependencies on questions that the prompt does not have; they demand nothing."""
    num_repeated: int
    """Questions given twice under one number; the later one counts, as in the published code."""
    num_other_texts: int
    """Rows whose prompt is not that of the first row of their item, which is drawn."""


def read_questions(path: Path) -> QuestionFile:
    """The prompts of a CSV file in the published format; every row counts, the first one too.

    Raises:
        RequestError: naming the line that does not fit.
    """
    items: dict[str, tuple[str, dict[int, Question]]] = {}
    repeated = other_texts = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise RequestError(
                    f"--questions {path}: no column {', '.join(missing)}; expected the format of {WHERE}"
                )
            for row in reader:
                question = _parse(path, reader.line_num, row)
                text, questions = items.setdefault(row["item_id"], (row["text"], {}))
                other_texts += row["text"] != text
                repeated += question.number in questions
                questions[question.number] = question
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"--questions {path}: cannot be read ({error}); it is {WHERE}") from error
    if not items:
        raise RequestError(f"--questions {path}: holds no questions; expected {WHERE}")
    prompts = tuple(Prompt(item, text, tuple(found.values())) for item, (text, found) in items.items())
    unknown = sum(
        parent not in {q.number for q in prompt.questions}
        for prompt in prompts
        for question in prompt.questions
        for parent in question.parents
    )
    return QuestionFile(prompts, unknown, repeated, other_texts)


def wanted_pictures(
    prompts: Sequence[Prompt], *, num_per_prompt: int, seed: int, layout: Layout = "files"
) -> list[Wanted]:
    """One file a picture, or one a prompt for grids (which are read, not generated)."""
    if layout == "grid":
        return [Wanted(f"{prompt.item}.png", prompt.text, seed + n) for n, prompt in enumerate(prompts)]
    return [
        Wanted(f"{prompt.item}/{k:05d}.png", prompt.text, seed + n * num_per_prompt + k)
        for n, prompt in enumerate(prompts)
        for k in range(num_per_prompt)
    ]


def write_grids(pictures: PictureSet, prompts: Sequence[Prompt], folder: Path) -> None:
    """The published layout for the published evaluator: ITEM.png of four pictures, two a row.

    Raises:
        RequestError: if there are not four pictures a prompt.
    """
    if len(pictures.names) != 4 * len(prompts):
        raise RequestError(
            f"--grids: a grid holds 4 pictures a prompt, received "
            f"{len(pictures.names) // len(prompts)} (--num 4)"
        )
    for n, prompt in enumerate(prompts):
        path = folder / f"{prompt.item}.png"
        if path.exists():
            continue
        parts = [np.asarray(load_picture(pictures.path(4 * n + k))) for k in range(4)]
        grid = np.concatenate([np.concatenate(parts[:2], axis=1), np.concatenate(parts[2:], axis=1)])
        write_png(path, grid, {"prompt": prompt.text})


def cut_grid(grid: Image.Image) -> list[Image.Image]:
    """The four pictures of a grid, row by row.

    Raises:
        RequestError: if its sides are odd.
    """
    if grid.width % 2 or grid.height % 2:
        raise RequestError(f"grid of {grid.height}x{grid.width}: expected even sides, two pictures each")
    w, h = grid.width // 2, grid.height // 2
    return [grid.crop((x * w, y * h, (x + 1) * w, (y + 1) * h)) for y in (0, 1) for x in (0, 1)]


def is_yes(answer: str) -> bool:
    """Whether the first word of an answer is yes, whatever its case and punctuation."""
    words = "".join(c if c.isalnum() else " " for c in answer.lower()).split()
    return bool(words) and words[0] == "yes"


def apply_dependencies(questions: Sequence[Question], yes: Mapping[int, bool]) -> dict[int, bool]:
    """Which questions count as met: answered yes, with every parent met.

    In the order of the file, as published: a parent that comes before its child carries its own dependencies
    to it. Parents that do not exist demand nothing.
    """
    met = dict(yes)
    for question in questions:
        met[question.number] = met[question.number] and all(
            met.get(parent, True) for parent in question.parents
        )
    return met


def score_pictures(
    pictures: PictureSet,
    prompts: Sequence[Prompt],
    answerer: Answerer,
    log: ScoreLog,
    *,
    layout: Layout = "files",
    num_of_grid: int = 4,
    progress: bool = True,
) -> list[list[dict[int, bool]]]:
    """By prompt and picture, the answer to each question: yes or not.

    Args:
        num_of_grid: pictures of a grid that count, the first ones.
    """
    per_prompt = len(pictures.names) // len(prompts)
    by_prompt: list[list[dict[int, bool]]] = [[] for _ in prompts]
    for i, name in enumerate(tqdm(pictures.names, unit="file", desc="dpg", disable=not progress)):
        prompt = prompts[i // per_prompt]
        if name not in log.done:
            parts = _parts(pictures.path(i), layout, num_of_grid)
            asked = [q.text for q in prompt.questions]
            log.add(name, [answerer(part, asked) for part in parts])
        for answers in log.done[name]:
            by_prompt[i // per_prompt].append(
                {q.number: is_yes(a) for q, a in zip(prompt.questions, answers, strict=True)}
            )
    return by_prompt


def summarise(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[Mapping[int, bool]]]
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """(scores, details) of all pictures of all prompts.

    A picture's score is the share of its questions that are met; a prompt's the mean of its pictures;
    `overall` the mean of the prompts. Categories take every question of every picture once, after
    dependencies (`details` has them before, too).
    """
    per_prompt: dict[str, float] = {}
    after: dict[str, list[bool]] = {}
    before: dict[str, list[bool]] = {}
    for prompt, of_pictures in zip(prompts, answers, strict=True):
        shares = []
        for yes in of_pictures:
            met = apply_dependencies(prompt.questions, yes)
            shares.append(sum(met.values()) / len(met))
            for question in prompt.questions:
                after.setdefault(question.category, []).append(met[question.number])
                before.setdefault(question.category, []).append(yes[question.number])
        per_prompt[prompt.item] = sum(shares) / len(shares)
    scores: dict[str, float | None] = {"overall": sum(per_prompt.values()) / len(per_prompt)}
    scores |= {name: _share(values) for name, values in sorted(_broad(after).items())}
    details = {
        "level_2": {name: _share(values) for name, values in sorted(after.items())},
        "level_1_before_dependencies": {n: _share(v) for n, v in sorted(_broad(before).items())},
        "level_2_before_dependencies": {n: _share(v) for n, v in sorted(before.items())},
        "num_questions": {name: len(values) for name, values in sorted(after.items())},
        "per_prompt": per_prompt,
    }
    return scores, details


def _broad(by_category: Mapping[str, Sequence[bool]]) -> dict[str, list[bool]]:
    broad: dict[str, list[bool]] = {}
    for name, values in by_category.items():
        broad.setdefault(name.split("-")[0].strip(), []).extend(values)
    return broad


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _parts(path: Path, layout: Layout, count: int) -> Iterator[Image.Image]:
    picture = load_picture(path)
    if layout == "files":
        yield picture
        return
    try:
        yield from cut_grid(picture)[:count]
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error


def _parse(path: Path, line: int, row: Mapping[str, str | None]) -> Question:
    def fail(reason: str) -> RequestError:
        return RequestError(f"--questions {path}, line {line}: {reason}; expected the format of {WHERE}")

    values = {name: (row.get(name) or "").strip() for name in _COLUMNS}
    empty = [name for name in _COLUMNS if not values[name]]
    if empty:
        raise fail(f"nothing in {', '.join(empty)}")
    item = values["item_id"]
    if "/" in item or item.startswith("."):
        raise fail(f"item_id {item!r} cannot be a file name")
    try:
        number = int(values["proposition_id"])
        parents = tuple(int(part) for part in values["dependency"].split(","))
    except ValueError as error:
        raise fail(
            f"expected numbers, received proposition_id {values['proposition_id']!r} and "
            f"dependency {values['dependency']!r}"
        ) from error
    # 0 stands for no parent.
    return Question(
        number,
        tuple(parent for parent in parents if parent != 0),
        values["tuple"].split("(")[0].strip(),
        values["question_natural_language"],
    )
