"""The report of a benchmark: a table over its result rows, a plot against evaluations, a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from tim_ds.eval.benchmarks import Scored, notes_of
from tim_ds.eval.generate import PictureSet, load_picture
from tim_ds.eval.report import markdown_table
from tim_ds.eval.results import RESULTS_NAME, Column, ResultRow, SheetItem
from tim_ds.eval.sheet import Picture, SheetBlock, SheetRow, contact_sheet
from tim_ds.model.weights import write_aside
from tim_ds.pipeline import write_png

TABLE_NAME = "table.md"
PLOT_NAME = "scores.png"
SHEET_NAME = "samples.png"

_COLOURS = ("#1f6feb", "#d97706", "#2e9d6b", "#8957e5", "#d1495b", "#0e7490")
_SHEET_PX = 256


def write_scored(
    rows: Sequence[ResultRow], row: ResultRow, scored: Scored, pictures: PictureSet, out: Path
) -> list[Path]:
    """The report of a benchmark whose last row is `row`: table and plot over all rows, sheet of this one."""
    sheet = samples_sheet(pictures, scored.items, title=row.label, footnote="")
    return write(rows, scored.columns, out, notes=notes_of(row, scored), sheet=sheet)


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
    """Markdown whose columns line up: one line a set of pictures."""
    shown = [c for c in columns if any(row.scores.get(c.key) is not None for row in rows)]
    header = ("network", "size", "steps", "nfe", "cfg", "pictures", *(c.header for c in shown))
    body = [
        (
            row.label,
            *(_making(row, name) for name in ("size", "num_steps", "nfe", "cfg_scale")),
            str(row.num_pictures),
            *(c.show(row) for c in shown),
        )
        for row in rows
    ]
    return f"{rows[0].title}\n\n{markdown_table(header, body)}\n{notes}\n"


def plot(rows: Sequence[ResultRow], columns: Sequence[Column]) -> Picture:
    """The plotted scores against network evaluations, one line a network and size: uint8 [H, W, 3]."""
    shown = [c for c in columns if c.plotted and any(row.scores.get(c.key) is not None for row in rows)]
    figure = Figure(figsize=(5.5 * max(1, len(shown)), 4.2), layout="constrained", dpi=130)
    canvas = FigureCanvasAgg(figure)
    panels = np.atleast_1d(figure.subplots(1, max(1, len(shown))))
    known = [row for row in rows if row.nfe is not None]
    lines = list(dict.fromkeys((row.label, _making(row, "size")) for row in known))
    ticks = sorted({row.nfe for row in known if row.nfe is not None})
    for axes, column in zip(panels, shown, strict=False):
        for n, line in enumerate(lines):
            points = [
                (row.nfe, value)
                for row in known
                if (row.label, _making(row, "size")) == line
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
                label=f"{line[0]}, {line[1]}",
            )
        better = "lower" if column.is_lower_better else "higher"
        axes.set_title(f"{column.header}{', %' if column.percent else ''} ({better} is better)", fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(nfe) for nfe in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("network evaluations a picture")
        axes.grid(True, which="major", color="#e3e3e3", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def samples_sheet(pictures: PictureSet, items: Sequence[SheetItem], *, title: str, footnote: str) -> Picture:
    """One column an item, its pictures one below the other; a red frame marks a wrong one."""
    depth = min(len(item.pictures) for item in items)
    sheet_rows = []
    for k in range(depth):
        shown = [_reduced(pictures.path(item.pictures[k])) for item in items]
        wrong = [item.wrong is not None and item.wrong[k] for item in items]
        sheet_rows.append(SheetRow(f"picture {k + 1}" if depth > 1 else "", shown, wrong))
    return contact_sheet([item.caption for item in items], [SheetBlock(title, sheet_rows)], footnote=footnote)


def _reduced(path: Path) -> Picture:
    image = load_picture(path)
    longest = max(image.size)
    if longest > _SHEET_PX:
        factor = _SHEET_PX / longest
        image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
    return np.asarray(image)


def _making(row: ResultRow, name: str) -> str:
    value = None if row.made_by is None else row.made_by.get(name)
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
