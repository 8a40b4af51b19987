"""Finished `nfe` evaluations side by side: one row a setting, over all its runs; tables and a plot.

python -m tim_ds.eval.compare --out runs/study "exact=runs/a_seed0/nfe,runs/a_seed1/nfe" "noisy=runs/b/nfe"

A setting is a label and the `--out` folders of one or more evaluations, usually runs that differ in their
seed alone. Nothing is sampled: what cannot be compared, because its prompts or scans differ, is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from data_pipeline.command import command
from tim_ds.errors import RequestError, TimError
from tim_ds.eval.nfe import RESULTS_NAME, Row, read_rows
from tim_ds.eval.report import PLOT_NAME, TABLE_NAME, draw_step_axis, markdown_table
from tim_ds.eval.sheet import Picture
from tim_ds.model.weights import write_aside
from tim_ds.pipeline import refuse_unwritable, write_png

PROMPTS = "seen"
"""The set of prompts that is compared: sizes that training showed."""

_COMPARABLE = ("protocol", "prompts_sha256", "scans_sha256")


@dataclass(frozen=True, eq=False)
class Setting:
    """Scores of the runs of one setting at the step counts that all of them were sampled at.

    Shapes:
        distance, accuracy: [runs, steps], Frechet distance and share of prompts that read right.
    """

    label: str
    steps: tuple[int, ...]
    distance: np.ndarray
    accuracy: np.ndarray
    floor: float
    """Frechet distance of the training scans."""

    @property
    def num_runs(self) -> int:
        return len(self.distance)


def read_settings(words: Sequence[str]) -> list[Setting]:
    """Settings written `LABEL=FOLDER[,FOLDER ...]`.

    Of a folder that holds several networks, the one called LABEL is taken.

    Raises:
        RequestError: if a folder holds no such rows, a run is named twice, or prompts or scans differ.
    """
    settings: list[Setting] = []
    seen: dict[str, str] = {}
    reference: Row | None = None
    for word in words:
        label, _, folders = word.partition("=")
        if not label or not folders:
            raise RequestError(f"{word}: a setting is written LABEL=FOLDER[,FOLDER ...]")
        if label in (other.label for other in settings):
            raise RequestError(f"{word}: the label {label!r} is given twice; join the folders with commas")
        runs = [_rows_of(label, Path(folder)) for folder in folders.split(",")]
        for rows in runs:
            weights = rows[0].identity["weights_sha256"]
            if weights in seen:
                raise RequestError(f"{word}: holds the same weights as {seen[weights]}")
            seen[weights] = word
            reference = reference or rows[0]
            differing = [k for k in _COMPARABLE if rows[0].identity[k] != reference.identity[k]]
            if differing:
                raise RequestError(
                    f"{word}: not comparable with {words[0]}, {', '.join(differing)} differ; "
                    "evaluate both with the same data, numbers of pictures and seed"
                )
        settings.append(_setting(label, runs))
    return settings


def _rows_of(label: str, folder: Path) -> list[Row]:
    """The rows of one network, by steps."""
    path = folder / RESULTS_NAME
    rows = read_rows(path)
    if not rows:
        raise RequestError(f"{path}: no finished rows; run `python launch/evaluate.py nfe` first")
    labels = list(dict.fromkeys(row.label for row in rows))
    if len(labels) > 1:
        rows = [row for row in rows if row.label == label]
        if not rows:
            raise RequestError(f"{path}: holds {', '.join(labels)}, not {label}; call the setting by one")
    if len({row.identity["weights_sha256"] for row in rows}) > 1:
        raise RequestError(f"{path}: holds rows of several weights; evaluate them into folders of their own")
    return sorted(rows, key=lambda row: row.num_steps)


def _setting(label: str, runs: Sequence[Sequence[Row]]) -> Setting:
    steps = sorted(set.intersection(*({row.num_steps for row in rows} for rows in runs)))
    if not steps:
        raise RequestError(f"{label}: its runs have no step count in common")
    scores = [[row.scores[PROMPTS] for row in rows if row.num_steps in steps] for rows in runs]
    return Setting(
        label,
        tuple(steps),
        np.array([[s.frechet_distance for s in run] for run in scores]),
        np.array([[s.prompt_accuracy for s in run] for run in scores]),
        scores[0][0].frechet_floor,
    )


def table(settings: Sequence[Setting]) -> str:
    """Frechet distance and prompt accuracy by steps, in Markdown: the mean and the range over the runs."""
    steps = _all_steps(settings)
    header = ("setting", "runs", *map(str, steps))
    parts = [
        f"Frechet distance by steps (training scans: {settings[0].floor:.3f})\n",
        markdown_table(
            header,
            [(s.label, str(s.num_runs), *(_cell(s, s.distance, k, 1, 3) for k in steps)) for s in settings],
        ),
        "Pictures that show what the prompt says, %, by steps\n",
        markdown_table(
            header,
            [(s.label, str(s.num_runs), *(_cell(s, s.accuracy, k, 100, 1) for k in steps)) for s in settings],
        ),
    ]
    return "\n".join(parts)


def _cell(setting: Setting, values: np.ndarray, steps: int, scale: float, digits: int) -> str:
    if steps not in setting.steps:
        return "-"
    column = scale * values[:, setting.steps.index(steps)]
    text = f"{column.mean():.{digits}f}"
    if setting.num_runs > 1:
        text += f" ({column.min():.{digits}f}-{column.max():.{digits}f})"
    return text


def _all_steps(settings: Sequence[Setting]) -> list[int]:
    return sorted({k for setting in settings for k in setting.steps})


def plot(settings: Sequence[Setting]) -> Picture:
    """Mean over runs against steps, with the range as a band: uint8 [H, W, 3]."""
    figure = Figure(figsize=(11, 4.6 + 0.12 * len(settings)), layout="constrained", dpi=130)
    canvas = FigureCanvasAgg(figure)
    distance, accuracy = figure.subplots(1, 2)
    for n, setting in enumerate(settings):
        _draw(distance, setting, setting.distance, n)
        _draw(accuracy, setting, 100 * setting.accuracy, n)
    distance.set_yscale("log")
    distance.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    distance.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    distance.set_title("Frechet distance to held-back scans (lower is better)", fontsize=11)
    accuracy.set_title("Pictures that show what the prompt says, % (higher is better)", fontsize=11)
    ticks = _all_steps(settings)
    for axes in (distance, accuracy):
        draw_step_axis(axes, ticks, "steps", grid="both")
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw(axes: Axes, setting: Setting, values: np.ndarray, n: int) -> None:
    colour, line = f"C{n % 10}", ("-", "--", ":")[n // 10 % 3]
    runs = f" ({setting.num_runs} runs)" if setting.num_runs > 1 else ""
    label = setting.label + runs
    axes.plot(setting.steps, values.mean(0), color=colour, linestyle=line, marker="o", ms=4, label=label)
    axes.fill_between(setting.steps, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)


@command(TimError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, write them and the plot; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tim_ds.eval.compare",
        description="Compare finished evaluations of quality against steps, each setting over its runs.",
    )
    parser.add_argument(
        "settings", nargs="+", metavar="LABEL=FOLDER[,FOLDER]", help="--out folders of `evaluate.py nfe`"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for table and plot")
    options = parser.parse_args(arguments)
    settings = read_settings(options.settings)
    refuse_unwritable(options.out)
    text = table(settings)

    def write_text(aside: Path) -> None:
        aside.write_text(text)

    write_aside(options.out / TABLE_NAME, len(text.encode()), write_text)
    write_png(options.out / PLOT_NAME, plot(settings), {"evaluation": "compare"})
    print(f"{text}\n")
    for name in (TABLE_NAME, PLOT_NAME):
        print(f"written: {options.out / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
