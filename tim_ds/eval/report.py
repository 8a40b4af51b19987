"""The report on quality against steps: tables, sheets of samples, a plot, TensorBoard logs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.handwriting import NUMERALS
from tim_ds.errors import CheckpointError
from tim_ds.eval.board import keep_board_thread_quiet
from tim_ds.eval.handwriting import Scores
from tim_ds.eval.nfe import Evaluation, PromptSet
from tim_ds.eval.sheet import Picture, SheetBlock, SheetRow, contact_sheet
from tim_ds.model.weights import write_aside
from tim_ds.pipeline import write_png

TABLE_NAME = "table.md"
PLOT_NAME = "quality.png"
TENSORBOARD_FOLDER = "tensorboard"
SHEET_NAMES = {"seen": "samples_seen.png", "held_back": "samples_held_back.png"}

_COLOURS = ("#1f6feb", "#d97706", "#2e9d6b", "#8957e5")
# As many as stand beside each other in a README at their full size.
_SHEET_COLUMNS = {"seen": 7, "held_back": 4}
# Of a row and of a column of digits: the highest picture makes every row of the sheet as high.
_SHEET_CELLS = {"seen": {"row": 3, "column": 2}, "held_back": {"row": 4, "column": 4}}
_FOOTNOTE = "Same prompts and seeds in every row. A red frame: the reader does not read what the prompt says."


def write(evaluation: Evaluation, out: Path) -> list[Path]:
    """Write everything to `out`, replacing an earlier report; returns the paths."""
    text = table(evaluation) + "\n"

    def write_text(aside: Path) -> None:
        aside.write_text(text)

    write_aside(out / TABLE_NAME, len(text.encode()), write_text)
    sheets = {s.name: samples_sheet(evaluation, s) for s in evaluation.sets}
    for name, picture in sheets.items():
        write_png(out / SHEET_NAMES[name], picture, {"evaluation": "nfe", "prompts": name})
    image = plot(evaluation)
    write_png(out / PLOT_NAME, image, {"evaluation": "nfe"})
    write_tensorboard(evaluation, sheets, image, out / TENSORBOARD_FOLDER)
    return [
        out / name for name in (TABLE_NAME, *(SHEET_NAMES[s.name] for s in evaluation.sets), PLOT_NAME)
    ] + [out / TENSORBOARD_FOLDER]


def table(evaluation: Evaluation) -> str:
    """Markdown whose columns line up, so that it reads as plain text too."""
    rows = evaluation.rows
    parts = []
    for prompts in evaluation.sets:
        scores = [row.scores[prompts.name] for row in rows]
        parts.append(f"{prompts.title} ({len(prompts.prompts)} pictures)\n")
        header = ("network", "steps", "nfe", "Frechet", "prompt", "digit", "count", "position", "ms/picture")
        body = [
            (
                row.label,
                str(row.num_steps),
                str(row.nfe),
                f"{s.frechet_distance:.3f}",
                *map(_percent, (s.prompt_accuracy, s.digit_accuracy, s.count_accuracy, s.position_accuracy)),
                f"{1000 * row.seconds_per_picture:.2f}",
            )
            for row, s in zip(rows, scores, strict=True)
        ]
        floor = ("training scans", "", "", f"{scores[0].frechet_floor:.3f}", "", "", "", "", "")
        parts.append(markdown_table(header, [*body, floor]))
    seen = evaluation.sets[0]
    parts.append("Accuracy by digit asked for (sizes seen in training)\n")
    parts.append(
        markdown_table(
            ("network", "steps", *NUMERALS),
            [
                (row.label, str(row.num_steps), *map(_percent, _by_digit(row.scores[seen.name])))
                for row in rows
            ],
        )
    )
    parts.append(
        "Frechet: distance of the cells that should hold a digit to held-back scans, in pixels; that of the\n"
        "training scans is the floor. prompt: every cell reads right; digit: cells that read as asked;\n"
        "count: as many digits as asked; position: of the pictures with the right digits, those with every\n"
        "digit in its cell.\n"
        f"The reader reads {evaluation.scorer.reader_accuracy:.1%} of the held-back scans right."
    )
    return "\n".join(parts)


def samples_sheet(evaluation: Evaluation, prompts: PromptSet) -> Picture:
    """One column a prompt, one block a network, one row a step count."""
    columns = choose_columns(prompts, _SHEET_COLUMNS[prompts.name], max_cells=_SHEET_CELLS[prompts.name])
    chosen = [prompts.prompts[c] for c in columns]
    blocks = []
    for label in evaluation.labels:
        sheet_rows = []
        for row, samples in zip(evaluation.rows, evaluation.samples, strict=True):
            if row.label != label:
                continue
            pictures = [samples[prompts.name][c] for c in columns]
            read = evaluation.scorer.read(chosen, pictures)
            wrong = [cells != prompt.cells for cells, prompt in zip(read, chosen, strict=True)]
            steps = "1 step" if row.num_steps == 1 else f"{row.num_steps} steps"
            sheet_rows.append(SheetRow(steps, pictures, wrong))
        blocks.append(SheetBlock(label, sheet_rows))
    return contact_sheet([prompts.captions[c] for c in columns], blocks, footnote=_FOOTNOTE)


def plot(evaluation: Evaluation) -> Picture:
    """Frechet distance and prompt accuracy against steps: uint8 [H, W, 3]."""
    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=130)
    canvas = FigureCanvasAgg(figure)
    distance, accuracy = figure.subplots(1, 2)
    seen = evaluation.sets[0]
    for n, label in enumerate(evaluation.labels):
        rows = [row for row in evaluation.rows if row.label == label]
        steps = [row.num_steps for row in rows]
        for prompts in evaluation.sets:
            style = {
                "color": _COLOURS[n % len(_COLOURS)],
                "linestyle": "-" if prompts is seen else "--",
                "marker": "o" if prompts is seen else "s",
                "markersize": 5,
                "linewidth": 1.8,
                "label": label if prompts is seen else f"{label}, four in a row (held back)",
            }
            scores = [row.scores[prompts.name] for row in rows]
            distance.plot(steps, [s.frechet_distance for s in scores], **style)
            accuracy.plot(steps, [100 * s.prompt_accuracy for s in scores], **style)
    floor = evaluation.rows[0].scores[seen.name].frechet_floor
    distance.axhline(floor, color="#6b6b6b", linewidth=1, linestyle=":")
    distance.annotate(
        f"training scans {floor:.2f}",
        (1, floor),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color="#6b6b6b",
        fontsize=9,
    )
    distance.set_yscale("log")
    distance.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    distance.yaxis.set_minor_locator(NullLocator())
    distance.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    distance.set_title("Frechet distance to held-back scans (lower is better)", fontsize=11)
    accuracy.set_ylim(-3, 103)
    accuracy.set_title("Pictures that show what the prompt says, % (higher is better)", fontsize=11)
    ticks = sorted({row.num_steps for row in evaluation.rows})
    label = "steps (network evaluations a picture)" if _unguided(evaluation) else "steps"
    for axes in (distance, accuracy):
        draw_step_axis(axes, ticks, label)
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_step_axis(
    axes: Axes, ticks: Sequence[int], label: str, *, grid: Literal["major", "both"] = "major"
) -> None:
    """Steps, or evaluations, on a scale of powers of two with a tick at each that was measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    axes.grid(True, which=grid, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def write_tensorboard(
    evaluation: Evaluation, sheets: dict[str, Picture], image: Picture, folder: Path
) -> None:
    """Scalars with the number of steps on the x axis, one TensorBoard run a network, and the pictures.

    Raises:
        CheckpointError: if the disk refuses; nothing half-written is left.
    """
    # Event files only grow: a second report beside the first would draw every curve twice.
    shutil.rmtree(folder, ignore_errors=True)
    keep_board_thread_quiet()
    try:
        for label in evaluation.labels:
            with SummaryWriter(str(folder / label)) as writer:
                for row in evaluation.rows:
                    if row.label != label:
                        continue
                    for name, scores in row.scores.items():
                        for tag, value in _scalars(scores).items():
                            writer.add_scalar(f"nfe_{name}/{tag}", value, row.num_steps)
        with SummaryWriter(str(folder / "pictures")) as writer:
            for name, picture in sheets.items():
                writer.add_image(f"nfe/samples_{name}", picture, dataformats="HWC")
            writer.add_image("nfe/quality", image, dataformats="HWC")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"{folder}: cannot be written ({error})") from error


def _scalars(scores: Scores) -> dict[str, float]:
    values = {
        "frechet_distance": scores.frechet_distance,
        "prompt_accuracy": scores.prompt_accuracy,
        "digit_accuracy": scores.digit_accuracy,
        "count_accuracy": scores.count_accuracy,
    }
    if scores.position_accuracy is not None:
        values["position_accuracy"] = scores.position_accuracy
    return values


def choose_columns(prompts: PromptSet, count: int, *, max_cells: Mapping[str, int]) -> list[int]:
    """The first prompts of each layout of up to `max_cells` of an orientation, in turn; ordered by layout."""
    by_layout: dict[tuple[str, int], list[int]] = {}
    for i, prompt in enumerate(prompts.prompts):
        if len(prompt.cells) <= max_cells[prompt.orientation]:
            by_layout.setdefault((prompt.orientation, len(prompt.cells)), []).append(i)
    layouts = sorted(by_layout, key=lambda layout: (layout[0] == "column", layout[1]))
    chosen: list[tuple[int, int]] = []
    depth = 0
    while len(chosen) < min(count, sum(map(len, by_layout.values()))):
        for n, layout in enumerate(layouts):
            if depth < len(by_layout[layout]) and len(chosen) < count:
                chosen.append((n, by_layout[layout][depth]))
        depth += 1
    return [i for _, i in sorted(chosen)]


def _unguided(evaluation: Evaluation) -> bool:
    return all(row.nfe == row.num_steps for row in evaluation.rows)


def _by_digit(scores: Scores) -> list[float | None]:
    return [scores.digit_accuracy_by_digit[name] for name in NUMERALS]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A pipe table: first column to the left, the others to the right."""
    widths = [max(len(line[c]) for line in (header, *body)) for c in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(x.rjust(w) for x, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    return "\n".join([line(header), rule, *map(line, body), ""])
