"""The report on quality against size: a table, a plot, a sheet of samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tim_ds.eval.report import markdown_table
from tim_ds.eval.resolution import Evaluation
from tim_ds.eval.results import spread
from tim_ds.eval.sheet import Picture, Section, gallery, largest_px, read_reduced
from tim_ds.model.memory import gib
from tim_ds.model.weights import write_aside
from tim_ds.pipeline import write_png

TABLE_NAME = "table.md"
PLOT_NAME = "resolution.png"
SHEET_NAME = "samples.png"

_COLOURS = ("#1f6feb", "#d97706", "#2e9d6b", "#8957e5")
_SAMPLES_A_SIZE = 3
_HEADERS = {"pictures": "right pictures", "prompts": "any right", "overall_less_offset": "less offset"}
"""Of GenEval's scores, whose names say in a table something else."""


def write(evaluation: Evaluation, out: Path) -> list[Path]:
    """Write everything to `out`, replacing an earlier report; returns the paths."""
    text = table(evaluation) + "\n"
    write_aside(out / TABLE_NAME, len(text.encode()), lambda aside: aside.write_text(text))
    paths = [out / TABLE_NAME]
    if _titles(evaluation):
        write_png(out / PLOT_NAME, plot(evaluation), {"evaluation": "resolution"})
        paths.append(out / PLOT_NAME)
    for label, steps in dict.fromkeys((row.label, row.num_steps) for row in evaluation.rows):
        path = out / f"{label.replace('/', '-')}_steps{steps:04d}_{SHEET_NAME}"
        write_png(
            path, samples_sheet(evaluation, label, steps), {"evaluation": "resolution", "network": label}
        )
        paths.append(path)
    return paths


def table(evaluation: Evaluation) -> str:
    """What is scored, and Markdown whose columns line up: one row a network, step count and size."""
    names = [*dict.fromkeys(name for row in evaluation.rows for name in row.scores)]
    scores = [_HEADERS.get(name, name) for name in names]
    header = ("network", "steps", "nfe", "size", "seen", "pictures", *scores, "ms/picture", "peak memory")
    seen = {True: "yes", False: "no", None: "-"}
    body = [
        (
            row.label,
            str(row.num_steps),
            str(row.nfe),
            row.size,
            seen[row.seen],
            str(row.num_pictures),
            *(_score(name, row.scores.get(name)) for name in names),
            "-" if row.seconds_per_picture is None else f"{1000 * row.seconds_per_picture:.1f}",
            "-" if row.peak_bytes is None else gib(row.peak_bytes),
        )
        for row in evaluation.rows
    ]
    return f"{evaluation.suite.title}\n\n{markdown_table(header, body)}"


def plot(evaluation: Evaluation) -> Picture:
    """Every score against size: uint8 [H, W, 3]. Full marks: sizes that training shows; hollow: others."""
    titles = _titles(evaluation)
    figure = Figure(figsize=(1 + 4.6 * len(titles), 4.4), layout="constrained", dpi=110)
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    sizes = [group.size for group in evaluation.suite.groups]
    for axes, (score, title) in zip(panels, titles.items(), strict=True):
        factor = 100 if score.endswith("accuracy") else 1
        for n, (label, steps) in enumerate(
            dict.fromkeys((row.label, row.num_steps) for row in evaluation.rows)
        ):
            rows = [row for row in evaluation.rows if (row.label, row.num_steps) == (label, steps)]
            families = list(dict.fromkeys(group.family for group in evaluation.suite.groups))
            for family in families:
                names = {group.name for group in evaluation.suite.groups if group.family == family}
                line = [row for row in rows if row.group in names and row.scores.get(score) is not None]
                at = [sizes.index(row.size) for row in line]
                values = [factor * float(row.scores[score] or 0.0) for row in line]
                colour = _COLOURS[n % len(_COLOURS)]
                name = f"{label}, {steps} step{'s' * (steps > 1)}" if family == families[0] else None
                axes.plot(at, values, color=colour, linewidth=1.6, label=name)
                for x, value, row in zip(at, values, line, strict=True):
                    face = "white" if row.seen is False else colour
                    axes.plot(x, value, "o", markersize=6, markeredgecolor=colour, markerfacecolor=face)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(sizes)), sizes, rotation=60, ha="right", fontsize=8)
        axes.set_xlabel("height x width, pixels")
        axes.grid(True, axis="y", color="#e3e3e3", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if factor == 100:
            axes.set_ylim(-3, 103)
    note = "full: sizes that training shows; hollow: sizes that it never shows"
    handles, labels = panels[0].get_legend_handles_labels()
    known = any(row.seen is not None for row in evaluation.rows)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, title=note if known else None
    )
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def samples_sheet(evaluation: Evaluation, label: str, steps: int) -> Picture:
    """A few pictures of every size, under the size and above their captions."""
    groups = evaluation.suite.groups
    shown = [spread(len(group.captions), _SAMPLES_A_SIZE) for group in groups]
    longest = largest_px(sum(map(len, shown)))
    known = {True: "", False: ", not in training", None: ""}
    sections = [
        Section(
            f"{group.size}{known[group.seen]}",
            [
                read_reduced(evaluation.folders[label, steps, group.name] / f"{i:05d}.png", longest)
                for i in places
            ],
            [str(group.captions[i]) for i in places],
            [f"seed {group.seeds[i]}" for i in places],
        )
        for group, places in zip(groups, shown, strict=True)
    ]
    return gallery(sections, footnote=f"{label}, {steps} step{'s' * (steps > 1)}; height x width in pixels")


def _titles(evaluation: Evaluation) -> Mapping[str, str]:
    return evaluation.suite.plotted or {name: name for row in evaluation.rows[:1] for name in row.scores}


def _score(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.3f}"
