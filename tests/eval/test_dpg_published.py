"""DPG-Bench beside the rules of the published script, written a second time with its three flaws."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest

from tim_ds.eval import dpg
from tim_ds.eval.dpg import Prompt, Question

CATEGORIES = ("entity - whole", "attribute - color", "relation - spatial", "global", "other - count")


@dataclass
class Published:
    """What the published script prints."""

    overall: float
    by_category: dict[str, float]


def published(
    prompts: list[Prompt],
    answers: list[list[dict[int, bool]]],
    *,
    skips_first: bool = True,
    last_alone: bool = True,
    before_dependencies: bool = True,
) -> Published:
    """The script's loops; each argument is one of its flaws."""
    totals: list[float] = []
    categories: dict[str, list[float]] = defaultdict(list)
    for n, (prompt, of_pictures) in enumerate(zip(prompts, answers, strict=True)):
        questions = prompt.questions[1:] if n == 0 and skips_first else prompt.questions
        scores = []
        for k, yes in enumerate(of_pictures):
            value = {q.number: float(yes[q.number]) for q in questions}
            original = dict(value)
            for q in questions:
                for parent in q.parents:
                    if value.get(parent, 1.0) == 0:
                        value[q.number] = 0.0
                        break
            scores.append(sum(value.values()) / len(value))
            if not last_alone or k == len(of_pictures) - 1:
                counted = original if before_dependencies else value
                for q in questions:
                    categories[q.broad_category].append(counted[q.number])
        totals.append(sum(scores) / len(scores))
    return Published(float(np.mean(totals)), {name: float(np.mean(v)) for name, v in categories.items()})


@pytest.fixture(scope="module")
def suite() -> tuple[list[Prompt], list[list[dict[int, bool]]]]:
    """As many prompts as published with 13 questions each, which hang on earlier ones; four pictures that are
    better or worse as a whole."""
    rng = np.random.default_rng(0)
    prompts, answers = [], []
    for n in range(dpg.PUBLISHED_PROMPTS):
        questions = []
        for number in range(1, 14):
            parents = min(number - 1, int(rng.integers(0, 3)))
            some = rng.choice(np.arange(1, number), size=parents, replace=False)
            category = CATEGORIES[int(rng.integers(len(CATEGORIES)))]
            questions.append(Question(number, tuple(map(int, some)), category, f"question {number}?"))
        prompts.append(Prompt(f"item{n}", "a prompt", tuple(questions)))
        quality = rng.uniform(0.7, 1.0)
        answers.append([{q.number: bool(rng.random() < quality) for q in questions} for _ in range(4)])
    return prompts, answers


def test_without_its_flaws_the_script_gives_our_numbers(
    suite: tuple[list[Prompt], list[list[dict[int, bool]]]],
) -> None:
    scores, details = dpg.summarise(*suite)
    theirs = published(*suite, skips_first=False, last_alone=False, before_dependencies=False)
    assert scores["overall"] == pytest.approx(theirs.overall, rel=1e-12)
    assert {name: scores[name] for name in theirs.by_category} == pytest.approx(theirs.by_category, rel=1e-12)
    before = published(*suite, skips_first=False, last_alone=False).by_category
    assert details["level_1_before_dependencies"] == pytest.approx(before, rel=1e-12)


def test_what_each_flaw_moves(suite: tuple[list[Prompt], list[list[dict[int, bool]]]]) -> None:
    """Measured: the first row 0.001 points of overall; the last picture alone up to 0.8, and answers before
    dependencies 15 to 16 points of a category."""
    prompts, answers = suite
    right = published(prompts, answers, skips_first=False, last_alone=False, before_dependencies=False)
    first = published(prompts, answers, last_alone=False, before_dependencies=False)
    assert 0 < abs(first.overall - right.overall) < 1e-4
    last = published(prompts, answers, skips_first=False, before_dependencies=False)
    moved = [100 * abs(last.by_category[name] - right.by_category[name]) for name in right.by_category]
    assert last.overall == right.overall and 0.1 < max(moved) < 1.5
    before = published(prompts, answers, skips_first=False, last_alone=False)
    gained = [100 * (before.by_category[name] - right.by_category[name]) for name in right.by_category]
    assert all(gain > 5 for gain in gained)
