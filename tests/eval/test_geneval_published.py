"""GenEval against its published suite: the 553 prompts, drawn again, and the rules, written a second time.

The published metadata are draws of numpy's generator with seed 43, in a fixed order, without repetitions.
They are drawn here in that order, so the file need not be carried along.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tim_ds.eval import geneval
from tim_ds.eval.detector import COCO_CLASSES, Detection
from tim_ds.eval.geneval import COLOURS, POSITIONS, Rules, Task

SEED = 43
DRAWS = 100
"""Of each task but the first, which shows every class once."""
NAMES = tuple(COCO_CLASSES)


def line(tag: str, prompt: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), **more, "prompt": f"a photo of {prompt}"}


def some(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def drawn() -> Iterator[dict[str, Any]]:
    """All lines in the published order, repeated ones too."""
    rng = np.random.default_rng(SEED)

    def two(number: int) -> list[int]:
        return rng.choice(number, size=2, replace=False).tolist()

    # People have no colour: the first class is stepped over.
    coloured = NAMES[1:]
    for n in rng.choice(len(NAMES), size=len(NAMES), replace=False):
        yield line("single_object", with_article(NAMES[n]), some(NAMES[n]))
    for _ in range(DRAWS):
        a, b = (NAMES[n] for n in two(len(NAMES)))
        yield line("two_object", f"{with_article(a)} and {with_article(b)}", some(a), some(b))
    for _ in range(DRAWS):
        name, count = NAMES[rng.choice(len(NAMES))], int(rng.integers(2, 4, endpoint=True))
        plural = f"{name}es" if name.endswith("s") else f"{name}s"
        words = f"{('two', 'three', 'four')[count - 2]} {plural}"
        yield line("counting", words, some(name, count), exclude=[some(name, count + 1)])
    for _ in range(DRAWS):
        name, colour = coloured[rng.choice(len(coloured))], COLOURS[rng.choice(len(COLOURS))]
        yield line("colors", f"{with_article(colour)} {name}", some(name, color=colour))
    for _ in range(DRAWS):
        a, b = (NAMES[n] for n in two(len(NAMES)))
        where = POSITIONS[rng.choice(len(POSITIONS))]
        words = f"{with_article(a)} {where} {with_article(b)}"
        yield line("position", words, some(b), some(a, position=[where, 0]))
    for _ in range(DRAWS):
        a, b = (coloured[n] for n in two(len(coloured)))
        first, second = (COLOURS[n] for n in two(len(COLOURS)))
        words = f"{with_article(first)} {a} and {with_article(second)} {b}"
        yield line("color_attr", words, some(a, color=first), some(b, color=second))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    lines = dict.fromkeys(json.dumps(one) for one in drawn())
    path = tmp_path_factory.mktemp("published") / "evaluation_metadata.jsonl"
    path.write_text("".join(f"{one}\n" for one in lines))
    return geneval.read_metadata(path)


def test_the_published_suite_is_read_and_known(tasks: list[Task]) -> None:
    assert geneval.is_published_suite(tasks)
    assert Counter(task.tag for task in tasks) == geneval.TASKS and len(tasks) == 553
    # As others show them, by the number of their folder: the draws are the published ones to the last task.
    for number, prompt in {
        0: "a photo of a bench",
        457: "a photo of a pink oven and a green motorcycle",
        530: "a photo of a purple suitcase and an orange pizza",
    }.items():
        assert tasks[number].prompt == prompt


def test_verdicts_are_those_of_the_rules_written_a_second_time(tasks: list[Task]) -> None:
    """On pictures full of boxes, near one another, near the thresholds, in colours asked for or not."""
    rng, found = random.Random(0), Counter[tuple[str, bool]]()
    for _ in range(12_000):
        task, rules = (
            rng.choice(tasks),
            Rules(max_objects=rng.choice([2, 16]), max_overlap=rng.choice([0.5, 1])),
        )
        detections, colours = random_objects(task, rng)
        threshold = rules.detection_threshold(task.tag)
        kept = geneval.keep(
            detections, threshold, max_objects=rules.max_objects, max_overlap=rules.max_overlap
        )
        verdict = geneval.judge(task, kept, lambda seen, _, colours=colours: [colours[id(d)] for d in seen])
        assert verdict.is_correct == second_opinion(task.raw, detections, colours, rules), (task, detections)
        found[task.tag, verdict.is_correct] += 1
    assert len(found) == 2 * len(geneval.TASKS) and min(found.values()) > 50


def random_objects(task: Task, rng: random.Random) -> tuple[list[Detection], dict[int, str]]:
    """Detections of the classes that the prompt names, and their colours by identity."""
    asked = [clause.colour for clause in task.include if clause.colour]
    detections, colours = [], {}
    for _ in range(rng.choice([0, 1, 2, 2, 3, 3, 4, 5, 20])):
        left, top, width, height = (rng.uniform(1, high) for high in (900, 900, 400, 400))
        if rng.random() < 0.2:  # on a lattice: centres in line, boxes of one size
            left, top, width, height = 100 * round(left / 100), 100 * round(top / 100), 100.0, 100.0
        one = Detection(
            name=rng.choice(task.include).name,
            score=rng.choice([rng.uniform(0.2, 1), rng.uniform(0.85, 1)]),
            box=(left, top, left + width, top + height),
            mask=None,
        )
        detections.append(one)
        colours[id(one)] = rng.choice(asked if asked and rng.random() < 0.7 else COLOURS)
    return detections, colours


def second_opinion(
    wanted: dict[str, Any], detections: Sequence[Detection], colours: dict[int, str], rules: Rules
) -> bool:
    surest: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda d: d.score, reverse=True):
        if one.score > (0.9 if wanted["tag"] == "counting" else 0.3):
            surest.setdefault(one.name, []).append(one)
    for name, candidates in surest.items():
        candidates, surest[name] = candidates[: rules.max_objects], []
        while candidates:
            best = candidates.pop(0)
            surest[name].append(best)
            if rules.max_overlap < 1:
                candidates = [c for c in candidates if shared(best.box, c.box) < rules.max_overlap]
    taken: list[list[Detection] | None] = []
    for clause in wanted["include"]:
        mine = surest.get(clause["class"], [])[: clause["count"]]
        holds = len(mine) == clause["count"]
        if holds and "color" in clause:
            holds = all(colours[id(one)] == clause["color"] for one in mine)
        if holds and "position" in clause:
            where, of = clause["position"]
            theirs = taken[of]
            holds = theirs is not None and all(stands(a.box, where, b.box) for a in mine for b in theirs)
        taken.append(mine if holds else None)
    too_many = any(len(surest.get(c["class"], [])) >= c["count"] for c in wanted.get("exclude", []))
    return None not in taken and not too_many


def shared(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union; a box holds its last pixel."""
    corners = np.array([a, b]).reshape(2, 2, 2)
    low, high = corners[:, 0], corners[:, 1] + 1
    common = np.prod(np.clip(high.min(0) - low.max(0), 0, None))
    return float(common / (np.prod(high - low, axis=1).sum() - common))


def stands(a: Sequence[float], where: str, b: Sequence[float]) -> bool:
    corners = np.array([a, b]).reshape(2, 2, 2)
    centres, sizes = corners.mean(1), corners[:, 1] - corners[:, 0]
    offset = centres[0] - centres[1]
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * sizes.sum(0), 0)
    if np.abs(beyond).max() < 1e-3:
        return False
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[where]
    return bool(sign * beyond[axis] / np.linalg.norm(offset) > 0.5)
