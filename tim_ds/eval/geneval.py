"""GenEval, rebuilt with Mask2Former of transformers (`python launch/evaluate.py geneval`).

Prompts, thresholds, rules and aggregation are the published ones; the detector is another training of
Mask2Former than that of the published evaluator, so a score made here is not its number. `calibrate` compares
verdicts picture by picture.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image
from tqdm import tqdm

from tim_ds.errors import RequestError
from tim_ds.eval.clip import Clip
from tim_ds.eval.detector import COCO_CLASSES, Detection
from tim_ds.eval.generate import PictureSet, Wanted, load_picture
from tim_ds.eval.results import ScoreLog
from tim_ds.model.weights import write_aside

TITLE = "GenEval (rebuilt with Mask2Former of transformers)"
PROTOCOL = 1
"""Raised whenever the meaning of a score changes."""

TASKS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
"""The six tasks, with the prompts that the published metadata hold of each."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
METADATA_NAME = "metadata.jsonl"
WHERE = "prompts/evaluation_metadata.jsonl of https://github.com/djghosh13/geneval"

_BACKGROUND = "#999"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """The published thresholds."""

    threshold: float = 0.3
    """A detection counts above it."""
    counting_threshold: float = 0.9
    """The same in task counting."""
    max_objects: int = 16
    """Of a class, the surest ones."""
    max_overlap: float = 1.0
    """Intersection over union from which the less sure of two boxes of a class goes; 1 keeps all."""
    position_threshold: float = 0.1
    """Share of the summed sizes that two centres must differ by, by axis."""

    def detection_threshold(self, tag: str) -> float:
        return self.counting_threshold if tag == "counting" else self.threshold


@dataclass(frozen=True, slots=True)
class Clause:
    """One demand of a prompt: at least `count` objects of a class, perhaps of a colour, perhaps somewhere."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None
    """(relation, which earlier clause it is relative to)."""


@dataclass(frozen=True, slots=True)
class Task:
    """One line of the metadata."""

    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    raw: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a picture shows what its prompt asks for, and why not."""

    is_correct: bool
    reasons: tuple[str, ...]


def read_metadata(path: Path) -> list[Task]:
    """The prompts of a metadata file in the published format, one JSON object a line.

    Raises:
        RequestError: naming the line that does not fit.
    """
    try:
        # Not splitlines(): a prompt may hold any character but the end of a line.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--metadata {path}: cannot be read ({error}); it is {WHERE}") from error
    tasks = [_parse_task(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not tasks:
        raise RequestError(f"--metadata {path}: holds no prompts; expected {WHERE}")
    return tasks


def wanted_pictures(tasks: Sequence[Task], *, num_per_prompt: int, seed: int) -> list[Wanted]:
    """The pictures in the published layout: NNNNN/samples/0000k.png."""
    return [
        Wanted(f"{n:05d}/samples/{k:05d}.png", task.prompt, seed + n * num_per_prompt + k)
        for n, task in enumerate(tasks)
        for k in range(num_per_prompt)
    ]


def pictures_of_layout(folder: Path, tasks: Sequence[Task]) -> list[Wanted]:
    """The pictures of another program in the published layout, however many digits their names have.

    Raises:
        RequestError: if a prompt has no pictures, or another number than the first, or another prompt.
    """
    folders = {int(path.name): path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()}
    wanted: list[Wanted] = []
    per_prompt = 0
    for n, task in enumerate(tasks):
        place = folders.get(n)
        samples = place / "samples" if place is not None else folder / f"{n:05d}" / "samples"
        names = sorted(path.relative_to(folder).as_posix() for path in samples.glob("*.png"))
        per_prompt = per_prompt or len(names)
        if not names or len(names) != per_prompt:
            raise RequestError(
                f"{samples}: half finished: expected {per_prompt or 'some'} pictures NUMBER.png of the "
                f"prompt {task.prompt!r}, received {len(names)}"
            )
        stated = samples.parent / METADATA_NAME
        if stated.exists() and _prompt_of(stated) != task.prompt:
            raise RequestError(
                f"{stated}: of another prompt than line {n + 1} of --metadata, {task.prompt!r}"
            )
        wanted.extend(Wanted(name, task.prompt, 0) for name in names)
    return wanted


def _prompt_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["prompt"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_layout(folder: Path, tasks: Sequence[Task]) -> None:
    """Each prompt's `metadata.jsonl`, so that the published evaluator can read the folder too."""
    for n, task in enumerate(tasks):
        path = folder / f"{n:05d}" / METADATA_NAME
        text = json.dumps(task.raw) + "\n"
        if not path.exists() or path.read_text() != text:
            _write(path, text)


def keep(
    detections: Sequence[Detection], threshold: float, *, max_objects: int, max_overlap: float
) -> dict[str, list[Detection]]:
    """Detections that count, by class, the surest first."""
    kept: dict[str, list[Detection]] = {}
    ordered = sorted((d for d in detections if d.score > threshold), key=lambda d: -d.score)
    for name in dict.fromkeys(d.name for d in ordered):
        candidates = [d for d in ordered if d.name == name][:max_objects]
        chosen: list[Detection] = []
        for one in candidates:
            if max_overlap >= 1 or all(overlap(one.box, other.box) < max_overlap for other in chosen):
                chosen.append(one)
        kept[name] = chosen
    return kept


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, their last pixel counted as in the published code."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def relations(a: Sequence[float], b: Sequence[float], *, position_threshold: float = 0.1) -> set[str]:
    """Where box a lies relative to box b: none, one or two of `POSITIONS`.

    By axis, the offset of the centres is brought towards 0 by `position_threshold` of the summed sizes, then
    divided by the length of the whole offset; beyond one half it makes a relation.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    slack = [position_threshold * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i])) for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - s, 0.0), o) for o, s in zip(offset, slack, strict=True)]
    # A thousandth of a pixel: two boxes with one centre have no direction.
    if max(map(abs, beyond)) < 1e-3:
        return set()
    dx, dy = (value / math.hypot(*offset) for value in beyond)
    claims = zip(POSITIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True)
    return {name for name, holds in claims if holds}


def judge(
    task: Task,
    objects: Mapping[str, Sequence[Detection]],
    colours_of: Callable[[Sequence[Detection], str], Sequence[str]],
    *,
    position_threshold: float = 0.1,
) -> Verdict:
    """Whether the objects found meet all demands of a prompt.

    Every `include` must hold and no `exclude` may. Colour and position are asked of the `count` surest
    objects of a class alone. Every pair of objects must stand as a position says.

    Args:
        objects: by class, the surest first (`keep`).
        colours_of: the colours of objects of a class.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in task.include:
        found = list(objects.get(clause.name, ()))[: clause.count]
        reason = _clause_reason(clause, found, matched, colours_of, position_threshold)
        if reason is not None:
            reasons.append(reason)
        matched.append(found if reason is None else None)
    for clause in task.exclude:
        count = len(objects.get(clause.name, ()))
        if count >= clause.count:
            reasons.append(f"{clause.name}: wanted fewer than {clause.count}, detected {count}")
    return Verdict(not reasons, tuple(reasons))


def _clause_reason(
    clause: Clause,
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    colours_of: Callable[[Sequence[Detection], str], Sequence[str]],
    position_threshold: float,
) -> str | None:
    """Why a demand is not met; None if it is."""
    if len(found) < clause.count:
        return f"{clause.name}: wanted {clause.count}, detected {len(found)}"
    if clause.colour is not None:
        seen = list(colours_of(found, clause.name))
        if seen.count(clause.colour) < clause.count:
            counts = ", ".join(f"{seen.count(c)} {c}" for c in COLOURS if c in seen)
            return f"{clause.name}: wanted {clause.count} {clause.colour}, read as {counts}"
    if clause.position is not None:
        relation, target = clause.position
        others = matched[target]
        if others is None:
            return f"{clause.name}: wanted {relation} an object that was not found"
        for one in found:
            for other in others:
                true = relations(one.box, other.box, position_threshold=position_threshold)
                if relation not in true:
                    where = " and ".join(sorted(true)) or "nowhere clear"
                    return f"{clause.name}: wanted {relation}, lies {where}"
    return None


class ColourReader:
    """Colours by CLIP: the object alone on grey, cut to its box, against three captions a colour."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._vectors: dict[str, Any] = {}

    def __call__(self, picture: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        if name not in self._vectors:
            templates = (
                f"a photo of a {{}} {name}",
                f"a photo of a {{}}-colored {name}",
                "a photo of a {} object",
            )
            self._vectors[name] = self.clip.class_vectors(COLOURS, templates)
        cut = [cut_out(picture, one) for one in objects]
        likeness = self.clip.encode_pictures(cut) @ self._vectors[name].T
        return [COLOURS[i] for i in likeness.argmax(dim=1).tolist()]


def cut_out(picture: Image.Image, one: Detection) -> Image.Image:
    """The object on a grey ground, cut to its box."""
    picture = picture.convert("RGB")
    if one.mask is not None:
        if one.mask.shape != (picture.height, picture.width):
            raise RequestError(
                f"mask of {one.name}: expected {picture.height}x{picture.width}, received {one.mask.shape}"
            )
        ground = Image.new("RGB", picture.size, color=_BACKGROUND)
        picture = Image.composite(picture, ground, Image.fromarray(one.mask.astype(np.uint8) * 255))
    left, top, right, bottom = (round(x) for x in one.box)
    return picture.crop((left, top, right, bottom))


def score_pictures(
    pictures: PictureSet,
    tasks: Sequence[Task],
    detector: Callable[..., Sequence[Detection]],
    colours: Callable[[Image.Image, Sequence[Detection], str], Sequence[str]],
    rules: Rules,
    log: ScoreLog,
    *,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """One result a picture, in the format of the published evaluator's results file."""
    per_prompt = len(pictures.names) // len(tasks)
    for i, name in enumerate(tqdm(pictures.names, unit="picture", desc="geneval", disable=not progress)):
        if name in log.done:
            continue
        task = tasks[i // per_prompt]
        picture = load_picture(pictures.path(i))
        threshold = rules.detection_threshold(task.tag)
        objects = keep(
            detector(picture, threshold=threshold),
            threshold,
            max_objects=rules.max_objects,
            max_overlap=rules.max_overlap,
        )

        def read(found: Sequence[Detection], kind: str, picture: Image.Image = picture) -> Sequence[str]:
            return colours(picture, found, kind)

        verdict = judge(task, objects, read, position_threshold=rules.position_threshold)
        log.add(
            name,
            {
                "filename": name,
                "tag": task.tag,
                "prompt": task.prompt,
                "correct": verdict.is_correct,
                "reason": "\n".join(verdict.reasons),
                "metadata": json.dumps(task.raw),
                "details": json.dumps(
                    {kind: [[*one.box, one.score] for one in found] for kind, found in objects.items()}
                ),
            },
        )
    return [log.done[name] for name in pictures.names]


def judge_at_thresholds(
    pictures: PictureSet,
    tasks: Sequence[Task],
    detector: Callable[..., Sequence[Detection]],
    colours: Callable[[Image.Image, Sequence[Detection], str], Sequence[str]],
    rules: Rules,
    thresholds: Sequence[float],
    log: ScoreLog,
    *,
    progress: bool = True,
) -> list[list[bool]]:
    """By picture, whether it is right when detections count above each of `thresholds`.

    The detector looks once, and every object's colour is read once at most.
    """
    per_prompt = len(pictures.names) // len(tasks)
    for i, name in enumerate(tqdm(pictures.names, unit="picture", desc="thresholds", disable=not progress)):
        if name in log.done:
            continue
        task, picture = tasks[i // per_prompt], load_picture(pictures.path(i))
        known: dict[int, str] = {}

        def read(
            found: Sequence[Detection],
            kind: str,
            picture: Image.Image = picture,
            known: dict[int, str] = known,
        ) -> Sequence[str]:
            for one in found:
                if id(one) not in known:
                    known[id(one)] = colours(picture, [one], kind)[0]
            return [known[id(one)] for one in found]

        detections = detector(picture, threshold=min(thresholds))
        verdicts = []
        for threshold in thresholds:
            objects = keep(
                detections, threshold, max_objects=rules.max_objects, max_overlap=rules.max_overlap
            )
            verdict = judge(task, objects, read, position_threshold=rules.position_threshold)
            verdicts.append(verdict.is_correct)
        log.add(name, verdicts)
    return [log.done[name] for name in pictures.names]


def summarise(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float | None], dict[str, Any]]:
    """(scores, counts): by task the share of right pictures; overall the plain mean of the tasks present.

    `pictures` and `prompts` are the shares of right pictures, and of prompts with a right one among theirs.
    """
    by_task: dict[str, list[bool]] = {}
    by_prompt: dict[str, list[bool]] = {}
    for result in results:
        by_task.setdefault(result["tag"], []).append(bool(result["correct"]))
        by_prompt.setdefault(result["metadata"], []).append(bool(result["correct"]))
    shares = {tag: sum(right) / len(right) for tag, right in by_task.items()}
    scores: dict[str, float | None] = {
        "overall": sum(shares.values()) / len(shares),
        **{tag: shares.get(tag) for tag in TASKS},
        "pictures": sum(bool(result["correct"]) for result in results) / len(results),
        "prompts": sum(any(right) for right in by_prompt.values()) / len(by_prompt),
    }
    counts = {tag: {"correct": sum(right), "pictures": len(right)} for tag, right in by_task.items()}
    return scores, {"by_task": counts, "num_prompts": len(by_prompt)}


def is_published_suite(tasks: Sequence[Task]) -> bool:
    """Whether the numbers of prompts by task are those of the published file."""
    return {tag: sum(task.tag == tag for task in tasks) for tag in TASKS} == TASKS


def write_results(path: Path, results: Sequence[Mapping[str, Any]], *, evaluator: str) -> None:
    """The results as JSON lines, which the published summary script reads too.

    Args:
        evaluator: who judged, said in every line: the file alone must not pass for the published one's.
    """
    _write(path, "".join(json.dumps({**result, "evaluator": evaluator}) + "\n" for result in results))


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Verdicts of a results file of the published evaluator (or of `write_results`), by picture.

    Raises:
        RequestError: if it is no such file.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--calibrate {path}: cannot be read ({error})") from error
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            result = json.loads(line)
            name = "/".join(Path(result["filename"]).parts[-3:])
            is_correct, tag = result["correct"], result["tag"]
            if not isinstance(is_correct, bool) or not isinstance(tag, str):
                raise TypeError("expected correct: true or false, and a tag")
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"--calibrate {path}, line {n}: not a verdict of GenEval's evaluator ({error!r})"
            ) from error
        if name in found:
            raise RequestError(f"--calibrate {path}, line {n}: a second verdict on {name}")
        found[name] = {"correct": is_correct, "tag": tag}
    return found


@dataclass(frozen=True, slots=True)
class Agreement:
    """Verdicts of two evaluators on the same pictures of one task."""

    task: str
    both_right: int
    both_wrong: int
    only_ours: int
    """Right here, wrong there."""
    only_theirs: int
    by_prompt: tuple[tuple[int, int], ...] = ()
    """Of every prompt: pictures right here alone less those right there alone, and all its pictures."""

    @property
    def num_pictures(self) -> int:
        return self.both_right + self.both_wrong + self.only_ours + self.only_theirs

    @property
    def agreement(self) -> float:
        return (self.both_right + self.both_wrong) / self.num_pictures

    @property
    def ours(self) -> float:
        return (self.both_right + self.only_ours) / self.num_pictures

    @property
    def theirs(self) -> float:
        return (self.both_right + self.only_theirs) / self.num_pictures

    @property
    def offset(self) -> float:
        """Ours minus theirs."""
        return (self.only_ours - self.only_theirs) / self.num_pictures

    @property
    def offset_error(self) -> float:
        """Standard error of the offset: that of independent pictures, or if larger that of whole prompts.

        For pictures, half a picture is added to each of the four counts, so that two evaluators that never
        differed on a few pictures are not told to agree without error. For prompts, the spread of their sums
        about the offset: the pictures of one prompt succeed and fail together.
        Source: Agresti and Min, Simple improved confidence intervals for comparing matched proportions
            (2005).
        """
        count = self.num_pictures + 2
        offset = (self.only_ours - self.only_theirs) / count
        of_pictures = ((self.only_ours + self.only_theirs + 1) / count - offset**2) / count
        prompts = len(self.by_prompt)
        if prompts < 2:
            return math.sqrt(of_pictures)
        squares = sum((total - self.offset * pictures) ** 2 for total, pictures in self.by_prompt)
        of_prompts = squares * prompts / (prompts - 1) / self.num_pictures**2
        return math.sqrt(max(of_pictures, of_prompts))


def calibrate(
    results: Sequence[Mapping[str, Any]], reference: Mapping[str, Mapping[str, Any]]
) -> list[Agreement]:
    """Agreement by task with the verdicts of another evaluator on the same pictures.

    Raises:
        RequestError: if the two did not judge the same pictures for the same tasks.
    """
    names = {result["filename"] for result in results}
    if names != set(reference):
        missing, extra = sorted(names - set(reference)), sorted(set(reference) - names)
        raise RequestError(
            f"--calibrate: expected verdicts on the same {len(names)} pictures, received {len(reference)}; "
            + "; ".join(
                f"{what}: {', '.join(which[:3])}"
                for what, which in (("without a verdict", missing), ("not among the pictures", extra))
                if which
            )
        )
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    prompts: dict[str, dict[str, list[int]]] = {}
    for result in results:
        other = reference[result["filename"]]
        if other["tag"] != result["tag"]:
            raise RequestError(
                f"--calibrate: {result['filename']} is of task {other['tag']!r} there and {result['tag']!r} "
                f"here; the pictures are of another order of prompts"
            )
        ours, theirs = bool(result["correct"]), bool(other["correct"])
        pairs.setdefault(result["tag"], []).append((ours, theirs))
        # NNNNN/samples/0000k.png: the first part is the prompt.
        place = result["filename"].split("/")[0]
        prompts.setdefault(result["tag"], {}).setdefault(place, []).append(ours - theirs)
    return [
        Agreement(
            task,
            both_right=pairs[task].count((True, True)),
            both_wrong=pairs[task].count((False, False)),
            only_ours=pairs[task].count((True, False)),
            only_theirs=pairs[task].count((False, True)),
            by_prompt=tuple((sum(found), len(found)) for found in prompts[task].values()),
        )
        for task in TASKS
        if task in pairs
    ]


def _parse_task(path: Path, n: int, line: str) -> Task:
    def fail(reason: str) -> RequestError:
        return RequestError(f"--metadata {path}, line {n}: {reason}; expected the format of {WHERE}")

    try:
        raw = json.loads(line)
    except ValueError as error:
        raise fail(f"not JSON ({error})") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("prompt"), str):
        raise fail("no prompt")
    if raw.get("tag") not in TASKS:
        raise fail(f"tag is {raw.get('tag')!r}, not one of {', '.join(TASKS)}")
    clauses: dict[str, tuple[Clause, ...]] = {}
    for key in ("include", "exclude"):
        entries = raw.get(key, [])
        if not isinstance(entries, list) or (key == "include" and not entries):
            raise fail(f"{key} is not a list of demands")
        parsed = []
        for place, entry in enumerate(entries):
            clause = _parse_clause(entry, place)
            if isinstance(clause, str):
                raise fail(f"{key}[{place}]: {clause}")
            parsed.append(clause)
        clauses[key] = tuple(parsed)
    return Task(raw["tag"], raw["prompt"], clauses["include"], clauses["exclude"], raw)


def _parse_clause(entry: Any, place: int) -> Clause | str:
    """A demand, or what is wrong with it."""
    if not isinstance(entry, dict):
        return f"expected a mapping, received {entry!r}"
    name, count, colour = entry.get("class"), entry.get("count"), entry.get("color")
    if name not in COCO_CLASSES:
        return f"class {name!r} is none of the 80 of COCO"
    if not _is_count(count):
        return f"count is {count!r}"
    if colour is not None and colour not in COLOURS:
        return f"color {colour!r} is none of {', '.join(COLOURS)}"
    position = entry.get("position")
    if position is None:
        return Clause(name, count, colour)
    if (
        not isinstance(position, list)
        or len(position) != 2
        or position[0] not in POSITIONS
        or not isinstance(position[1], int)
        or not 0 <= position[1] < place
    ):
        return f"position {position!r} is not [one of {', '.join(POSITIONS)}; number of an earlier demand]"
    return Clause(name, count, colour, (position[0], position[1]))


def _is_count(count: Any) -> TypeGuard[int]:
    return isinstance(count, int) and not isinstance(count, bool) and count >= 1


def _write(path: Path, text: str) -> None:
    write_aside(path, len(text.encode()), lambda aside: aside.write_text(text, encoding="utf-8"))
