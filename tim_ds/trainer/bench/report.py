"""Results as text, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from tim_ds.config.recipe import Recipe, recipe_hash
from tim_ds.errors import RequestError
from tim_ds.model.memory import gib
from tim_ds.model.weights import write_aside
from tim_ds.trainer.bench.contenders import IN_ORDER, Implementation, Objective, objective_of
from tim_ds.trainer.bench.measure import Refusal, Row
from tim_ds.trainer.bench.work import Sides, shape_of
from tim_ds.trainer.flops import step_flops
from tim_kernels.bench.report import environment

NOT_A_CLAIM = (
    "These are times of a CPU: they show that the benchmark runs, and are no claim of speed. Goals are not "
    "judged."
)
NO_GPU = (
    "No CUDA device here: nothing is timed. `--device cpu --preset small` runs a small network on this CPU, "
    "for show. What is known without a GPU, operations counted with what is computed twice:"
)
MAY_DIFFER = ("date", "command")
"""Of an earlier run that is gone on from."""


def where(
    recipe: Recipe,
    device: torch.device,
    *,
    engine: str,
    backend: str,
    text_tokens: int,
    command: Sequence[str],
) -> dict[str, Any]:
    """Hardware, versions, commit and settings: a result without them says nothing."""
    return {
        **environment(device),
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "precision": recipe.train.precision,
        "activation_checkpointing": recipe.train.activation_checkpointing,
        "tokens_per_pack": recipe.data.tokens_per_pack,
        "text_tokens": text_tokens if recipe.model.condition == "text" else None,
        "engine": engine,
        "optimizer": "AdamW, fused, for all",
        "compile": f"{backend}, static shapes, a compilation for all blocks",
        "command": " ".join(command),
    }


def store(path: Path, about: Mapping[str, Any], found: Sequence[Row | Refusal]) -> None:
    """Written aside and renamed, so that an interrupted run leaves the rows stored before."""
    stored = {
        "environment": dict(about),
        "rows": [one.to_json() for one in found if isinstance(one, Row)],
        "refused": [one.to_json() for one in found if isinstance(one, Refusal)],
    }
    text = json.dumps(stored, indent=1) + "\n"
    write_aside(path, len(text), lambda aside: aside.write_text(text, encoding="utf-8"))


def load(path: Path) -> tuple[dict[str, Any], list[Row | Refusal]]:
    """
    Raises:
        RequestError: if the file is not of this benchmark.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found: list[Row | Refusal] = [Row(**one) for one in stored["rows"]]
        return stored["environment"], [*found, *(Refusal(**one) for one in stored["refused"])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path}: not results of this benchmark ({error!r})") from error


def earlier(path: Path, about: Mapping[str, Any]) -> list[Row | Refusal]:
    """Results of an earlier run, to go on from.

    Raises:
        RequestError: if they were measured on another device, with other versions, settings or of another
            commit.
    """
    before, found = load(path)
    other = [key for key in about if key not in MAY_DIFFER and before.get(key) != about[key]]
    if other:
        what = ", ".join(f"{key} {before.get(key)}, here {about[key]}" for key in other)
        raise RequestError(f"{path}: measured elsewhere: {what}; store to another file")
    return found


def merged(before: Sequence[Row | Refusal], new: Sequence[Row | Refusal]) -> list[Row | Refusal]:
    """All results. Of two about the same the new one, unless it only says that there was no time."""
    kept = {one.key: one for one in before}
    for one in new:
        if not (isinstance(one, Refusal) and one.kind == "no time" and isinstance(kept.get(one.key), Row)):
            kept[one.key] = one
    return list(kept.values())


def page(about: Mapping[str, Any], found: Sequence[Row | Refusal]) -> str:
    """Everything as Markdown: what was measured where, the table, what is missing, the goals."""
    on_gpu = about["gpu"] is not None
    settings = "\n".join(f"- {key}: {value}" for key, value in about.items() if value is not None)
    parts = [f"# A training step, {about['recipe']}", settings, table(found)]
    if not on_gpu:
        parts.insert(1, f"**{NOT_A_CLAIM}**")
    refused = [one for one in found if isinstance(one, Refusal)]
    if refused:
        parts.append("Not measured:\n\n" + "\n".join(f"- {one.size}, {one}" for one in refused))
    if on_gpu:
        parts.append("Goals, set before any measurement:\n\n" + goals(found))
    return "\n\n".join(parts) + "\n"


def table(found: Sequence[Row | Refusal]) -> str:
    """A line a row."""
    rows = [one for one in found if isinstance(one, Row)]
    known = {row.key: row for row in rows}
    lines = [
        "| size | step | objective | images | tokens | p50 ms (p20, p80) | images/s | over eager baseline "
        "| time over flow matching | MFU | peak | off the baseline: loss, gradient, timed |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        speed, cost = _relative_speed(row, known), _relative_time(row, known)
        memory = "" if row.peak_bytes is None else gib(row.peak_bytes)
        retried = f", {row.allocator_retries} allocator retries" if row.allocator_retries else ""
        off = (row.loss_error, row.gradient_error, row.timed_error)
        lines.append(
            f"| {row.size} | {row.implementation} | {row.objective} | {row.images} | {row.tokens} "
            f"| {row.p50:.2f} ({row.p20:.2f}, {row.p80:.2f}){retried} | {row.images_per_s:.2f} "
            f"| {'' if speed is None else f'{speed:.2f}x'} | {'' if cost is None else f'{cost:.3f}'} "
            f"| {'' if row.mfu is None else f'{row.mfu:.1%}'} | {memory} "
            f"| {', '.join('-' if e is None else f'{e:.0e}' for e in off)} |"
        )
    return "\n".join(lines)


_Known = Mapping[tuple[str, str, str], Row]


def _relative_speed(row: Row, known: _Known) -> float | None:
    """Images a second over the eager baseline's with the same objective; `paired`, which the baseline does
    not have, over its `dde`."""
    objective = "dde" if row.objective == "paired" else row.objective
    eager = known.get((row.size, "baseline", objective))
    return None if eager is None else row.images_per_s / eager.images_per_s


def _relative_time(row: Row, known: _Known) -> float | None:
    """Time of a step over that of the same implementation with flow matching."""
    plain = known.get((row.size, row.implementation, "flow matching"))
    return None if plain is None else row.p50 / plain.p50


@dataclass(frozen=True)
class Goal:
    """A number of two rows of one size, and its bound."""

    text: str
    size: str
    numerator: tuple[Implementation, Objective]
    denominator: tuple[Implementation, Objective]
    value: Callable[[Row], float | None]
    bound: float
    at_least: bool

    def line(self, known: _Known) -> str:
        sign = ">=" if self.at_least else "<="
        what = f"| {self.size}: {self.text} | {sign} {self.bound:g}x"
        rows = known.get((self.size, *self.numerator)), known.get((self.size, *self.denominator))
        values = [None if row is None else self.value(row) for row in rows]
        if rows[0] is None or rows[1] is None or values[0] is None or values[1] is None:
            return f"{what} | not measured | - | - |"
        ratio = values[0] / values[1]
        reached = ratio >= self.bound if self.at_least else ratio <= self.bound
        counted = "-"
        if self.value is _time:
            counted = f"{rows[0].executed_flops / rows[1].executed_flops:.3f}x"
        return f"{what} | {ratio:.3f}x | {'yes' if reached else 'no'} | {counted} |"


def _speed(row: Row) -> float:
    return row.images_per_s


def _time(row: Row) -> float:
    return row.p50


def _memory(row: Row) -> float | None:
    return None if row.peak_bytes is None else float(row.peak_bytes)


def _throughput(objective: Objective, other: Implementation, bound: float) -> Goal:
    text = f"images a second, ours with {objective} over {other}"
    return Goal(text, "1024", ("ours", objective), (other, "dde"), _speed, bound, True)


def _overhead(size: str, objective: Objective, bound: float) -> Goal:
    text = f"time of a step with {objective} over flow matching"
    return Goal(text, size, ("ours", objective), ("ours", "flow matching"), _time, bound, False)


def _room(size: str, objective: Objective) -> Goal:
    text = f"peak memory with {objective} over flow matching"
    return Goal(text, size, ("ours", objective), ("ours", "flow matching"), _memory, 1.05, False)


GOALS: tuple[Goal, ...] = (
    _throughput("dde", "baseline", 1.8),
    _throughput("paired", "baseline", 1.8),
    _throughput("dde", "baseline, compiled", 1.1),
    _throughput("paired", "baseline, compiled", 1.1),
    _overhead("1024", "dde", 1.33),
    _overhead("1024", "paired", 1.25),
    _overhead("256", "dde", 1.22),
    _overhead("256", "paired", 1.14),
    _room("1024", "dde"),
    _room("1024", "paired"),
    _room("256", "dde"),
    _room("256", "paired"),
)
"""Set before any measurement. Memory holds the states of all weights, as a run on one GPU does."""


def goals(found: Sequence[Row | Refusal]) -> str:
    """What was aimed at beside what was measured."""
    known = {one.key: one for one in found if isinstance(one, Row)}
    return "\n".join(
        [
            "| goal | bound | measured | reached | operations |",
            "|---|---|---|---|---|",
            *(g.line(known) for g in GOALS),
        ]
    )


def without_gpu(recipe: Recipe, images: Mapping[str, Sequence[tuple[Sides, int]]], text_tokens: int) -> str:
    """What can be said without a GPU: counted operations. No times."""
    lines = [
        "| size | images | tokens | TFLOP of a step of flow matching | with dde | with paired |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for size, chosen in images.items():
        shape, transition = shape_of(recipe, chosen, text_tokens)
        first, *others = (
            step_flops(
                recipe.model,
                objective_of(objective, recipe.objective),
                shape,
                transition=() if objective == "flow matching" else transition,
                checkpointing=recipe.train.activation_checkpointing,
            ).executed
            for objective in get_args(Objective)
        )
        over = " | ".join(f"{other / first:.3f}x" for other in others)
        lines.append(
            f"| {size} | {len(shape.image_lengths)} | {shape.num_tokens} | {first / 1e12:.1f} | {over} |"
        )
    return "\n".join([NO_GPU, "", *lines])


def plot(about: Mapping[str, Any], found: Sequence[Row | Refusal], path: Path) -> bool:
    """Draw images a second over the baseline's, and time over flow matching's. False if there is nothing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [one for one in found if isinstance(one, Row)]
    if not rows:
        return False
    known = {row.key: row for row in rows}
    sizes = list(dict.fromkeys(row.size for row in rows))
    named = [pair for pair in IN_ORDER if any((row.implementation, row.objective) == pair for row in rows)]
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), constrained_layout=True)
    panels = (
        (axes[0], _relative_speed, "images a second, over the eager baseline"),
        (axes[1], _relative_time, "time of a step, over the same with flow matching"),
    )
    width = 0.8 / len(named)
    for axis, value, title in panels:
        for number, pair in enumerate(named):
            heights = [value(row, known) if (row := known.get((size, *pair))) else None for size in sizes]
            places = [i + (number - len(named) / 2 + 0.5) * width for i in range(len(sizes))]
            axis.bar(places, [h or 0.0 for h in heights], width, label=", ".join(pair))
        axis.axhline(1.0, color="0.3", linewidth=0.8)
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set(title=title, xlabel="size", ylim=(0, None))
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    device = about["gpu"] or "a CPU, no claim of speed"
    figure.suptitle(f"{about['recipe']}: {device}, torch {about['torch']}, commit {about['commit']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
