"""The report of a benchmark: a table over its result rows, a plot against evaluations, a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from string import ascii_uppercase
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tim_ds.eval.benchmarks import Scored, notes_of
from tim_ds.eval.generate import PictureSet, digest
from tim_ds.eval.report import draw_step_axis, markdown_table
from tim_ds.eval.results import RESULTS_NAME, Column, ResultRow, SheetItem, flattened
from tim_ds.eval.sheet import (
    Picture,
    Section,
    SheetBlock,
    SheetRow,
    contact_sheet,
    gallery,
    largest_px,
    read_reduced,
)
from tim_ds.model.weights import write_aside
from tim_ds.pipeline import write_png

TABLE_NAME = "table.md"
PLOT_NAME = "scores.png"
SHEET_NAME = "samples.png"

_COLOURS = ("#1f6feb", "#d97706", "#2e9d6b", "#8957e5", "#d1495b", "#0e7490")
_SHEET_PX = 320


def write_scored(
    rows: Sequence[ResultRow], row: ResultRow, scored: Scored, pictures: PictureSet, out: Path
) -> list[Path]:
    """The report of a benchmark whose last row is `row`: table and plot over all rows, sheet of this one."""
    return write(
        rows, scored.columns, out, notes=notes_of(row, scored), sheet=sheet_of(row, scored, pictures)
    )


def sheet_of(row: ResultRow, scored: Scored, pictures: PictureSet) -> Picture:
    """The contact sheet of one row, which says what is shown and how it was made."""
    making = [
        row.label,
        *(
            f"{name} {value}"
            for name in ("size", "steps", "nfe", "cfg")
            if (value := _making(row, name)) != "-"
        ),
    ]
    marks = "A red frame: judged wrong." if any(item.wrong for item in scored.items) else ""
    return samples_sheet(
        pictures, scored.items, title=row.title, footnote=f"{', '.join(making)}. {marks}".strip()
    )


def write(
    rows: Sequence[ResultRow],
    columns: Sequence[Column],
    out: Path,
    *,
    notes: str,
    sheet: Picture | None = None,
) -> list[Path]:
    """Write table, plot and sheet to `out`, replacing earlier ones; returns all paths."""
    text = table(rows, columns, notes=notes)
    write_aside(out / TABLE_NAME, len(text.encode()), lambda aside: aside.write_text(text, encoding="utf-8"))
    evaluation = rows[0].evaluation
    paths = [out / RESULTS_NAME, out / TABLE_NAME]
    if any(row.nfe is not None for row in rows):
        write_png(out / PLOT_NAME, plot(rows, columns), {"evaluation": evaluation})
        paths.append(out / PLOT_NAME)
    if sheet is not None:
        write_png(out / SHEET_NAME, sheet, {"evaluation": evaluation})
        paths.append(out / SHEET_NAME)
    return paths


def table(rows: Sequence[ResultRow], columns: Sequence[Column], *, notes: str) -> str:
    """Markdown whose columns line up: one line a set of pictures, one table a scorer.

    Numbers of two scorers (another detector, another question answering model, another reference, calibrated
    or not) do not compare, and stand under titles of their own that say what differs.
    """
    tables = []
    for letter, (title, found) in _by_scorer(rows).items():
        shown = [c for c in columns if any(row.scores.get(c.key) is not None for row in found)]
        header = ("network", "size", "steps", "nfe", "cfg", "pictures", *(c.header for c in shown))
        body = [
            (
                row.label,
                *(_making(row, name) for name in ("size", "steps", "nfe", "cfg")),
                str(row.num_pictures),
                *(c.show(row) for c in shown),
            )
            for row in found
        ]
        tables.append(f"{letter}{title}\n\n{markdown_table(header, body)}")
    return "\n".join([*tables, f"{notes}\n"])


def _by_scorer(rows: Sequence[ResultRow]) -> dict[str, tuple[str, list[ResultRow]]]:
    """{"A. ": (title, rows), ...} by title and scorer, in order; the one key is "" where all are alike."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(digest([row.title, row.scorer]), []).append(row)
    if len(groups) == 1:
        return {"": (rows[0].title, list(rows))}
    titles = [found[0].title for found in groups.values()]
    scorers = [flattened(found[0].scorer) for found in groups.values()]
    differs = [key for key in scorers[0] if any(one.get(key) != scorers[0][key] for one in scorers)]

    def whole(title: str, scorer: dict[str, Any]) -> str:
        """With what differs, where the title alone does not tell the groups apart."""
        said = ", ".join(f"{key} {_short(scorer.get(key))}" for key in differs)
        return title if titles.count(title) == 1 else f"{title} ({said})"

    return {
        f"{letter}. ": (whole(title, scorer), found)
        for letter, title, found, scorer in zip(_letters(), titles, groups.values(), scorers, strict=False)
    }


def _letters() -> Iterator[str]:
    """A, B, ..., Z, A2, ..."""
    for round_ in count(1):
        yield from (letter + ("" if round_ == 1 else str(round_)) for letter in ascii_uppercase)


def _short(value: object) -> str:
    """A value of a scorer; of hashes the first digits."""
    if isinstance(value, list):
        return "+".join(map(_short, value))
    text = str(value)
    return text[:8] if len(text) == 64 else text


def plot(rows: Sequence[ResultRow], columns: Sequence[Column]) -> Picture:
    """The plotted scores against network evaluations, one line a network and size: uint8 [H, W, 3]."""
    shown = [c for c in columns if c.plotted and any(row.scores.get(c.key) is not None for row in rows)]
    titles = _titles(rows)
    size = 5.5 * max(1, len(shown)), 4.0 + 0.18 * len(titles)
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    canvas = FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(1, max(1, len(shown))))
    letter_of = {id(row): letter for letter, (_, found) in _by_scorer(rows).items() for row in found}
    known = [row for row in rows if row.nfe is not None]

    def line_of(row: ResultRow) -> tuple[str, str, str]:
        return row.label, _making(row, "size"), letter_of[id(row)].rstrip(". ")

    lines = list(dict.fromkeys(map(line_of, known)))
    ticks = sorted({row.nfe for row in known if row.nfe is not None})
    for axes, column in zip(panels, shown, strict=False):
        for n, line in enumerate(lines):
            points = [
                (row.nfe, value)
                for row in known
                if line_of(row) == line
                and (value := row.scores.get(column.key)) is not None
                and row.nfe is not None
            ]
            factor = 100 if column.percent else 1
            axes.plot(
                [nfe for nfe, _ in points],
                [factor * value for _, value in points],
                color=_COLOURS[n % len(_COLOURS)],
                marker="o",
                linewidth=1.8,
                label=", ".join(part for part in line if part),
            )
        better = "lower" if column.is_lower_better else "higher"
        axes.set_title(f"{column.header}{', %' if column.percent else ''} ({better} is better)", fontsize=11)
        draw_step_axis(axes, ticks, "network evaluations a picture")
        if column.percent:
            # A share of nothing lies on the axis, not in the middle of a scale with negative shares.
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.03 * max(high, 1.0)), max(high, 1.0))
    figure.suptitle("\n".join(titles), fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _titles(rows: Sequence[ResultRow]) -> list[str]:
    """Each title in lines that fit a plot of one panel."""
    whole = (f"{letter}{title}" for letter, (title, _) in _by_scorer(rows).items())
    return [line for title in whole for line in wrap(title, width=68)]


def samples_sheet(pictures: PictureSet, items: Sequence[SheetItem], *, title: str, footnote: str) -> Picture:
    """One column an item, its pictures one below the other; a red frame marks a wrong one.

    Items of one picture each fill a gallery.
    """
    depth = min(len(item.pictures) for item in items)
    if depth == 1 and not any(item.wrong for item in items):
        longest = largest_px(len(items))
        shown = [read_reduced(pictures.path(item.pictures[0]), longest) for item in items]
        return gallery([Section(title, shown, [item.caption for item in items])], footnote=footnote)
    sheet_rows = []
    for k in range(depth):
        shown = [read_reduced(pictures.path(item.pictures[k]), _SHEET_PX) for item in items]
        wrong = [item.wrong is not None and item.wrong[k] for item in items]
        sheet_rows.append(SheetRow(f"picture {k + 1}" if depth > 1 else "", shown, wrong))
    return contact_sheet([item.caption for item in items], [SheetBlock(title, sheet_rows)], footnote=footnote)


def _making(row: ResultRow, name: str) -> str:
    key = {"steps": "num_steps", "cfg": "cfg_scale"}.get(name, name)
    value = None if row.made_by is None else row.made_by.get(key)
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
