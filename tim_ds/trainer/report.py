"""A run, or several beside each other, as one HTML page that needs nothing else.

    python -m tim_ds.trainer.report RUN [RUN ...] [--out PAGE.html] [--previews N]

Works on finished, running and broken runs; what is missing is named on the page.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from data_pipeline.command import command
from tim_ds import __version__
from tim_ds.errors import TimError
from tim_ds.model.weights import write_aside
from tim_ds.trainer.charts import Mark, Point, Series, line_chart, number, stacked_chart
from tim_ds.trainer.events import (
    BEGAN,
    CONTINUED,
    ENDS,
    EVENTS_FILE,
    FINISHED,
    SAVE_FAILED,
    SAVE_LEFT_OUT,
    SNAPSHOT_FAILED,
    STARTS,
)
from tim_ds.trainer.metrics import NUM_BINS
from tim_ds.trainer.report_style import STYLE
from tim_ds.trainer.run_record import EvaluationFolder, RunRecord, read_run

PAGE_NAME = "report.html"
MAX_PREVIEWS = 8
"""Sheets that a page embeds of each run, evenly spread, the first and the last among them."""
_NUM_COLOURS = 8
_LISTED_SKIPS = 20
_LISTED_EVENTS = 40
_LISTED_SAMPLES = 6

# Bottom to top in the breakdown, with the class of its colour; a phase that is none of these follows.
_PHASES = {
    "forward": "c0",
    "forward_and_derivative": "c0",
    "derivative": "c1",
    "teacher": "b3",
    "backward": "c2",
    "optimizer": "c5",
    "encoders": "c3",
    "data_wait": "c4",
    "preview": "c7",
    "save": "c6",
}
_LABELS = {
    "forward_and_derivative": "forward with derivative",
    "data_wait": "data wait",
    "optimizer": "optimiser",
}

_MARKED = {CONTINUED: "continued", SAVE_FAILED: "save", SAVE_LEFT_OUT: "save", SNAPSHOT_FAILED: "save"}


def render(records: Sequence[RunRecord], *, max_previews: int = MAX_PREVIEWS) -> str:
    """The page."""
    title = records[0].name if len(records) == 1 else f"{len(records)} runs"
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    labels = _labels(records)
    links = [
        ("curves", "Curves"),
        ("steps", "Time of a step"),
        ("interruptions", "Interruptions"),
        ("samples", "Samples"),
        ("evaluations", "Evaluations"),
        ("runs", "Runs"),
    ]
    navigation = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in links)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            '<a class="skip" href="#main">Skip to the content</a>',
            f'<header><h1>{escape(title)}</h1><nav aria-label="Sections">{navigation}</nav></header>',
            '<main id="main">',
            *(
                _summary(record, label, i)
                for i, (record, label) in enumerate(zip(records, labels, strict=True))
            ),
            *_curves(records, labels),
            *_breakdowns(records, labels),
            *_interruptions(records, labels),
            *_samples(records, labels, max_previews),
            *_evaluations(records, labels),
            *_details(records, labels),
            f"</main><footer>Made {now} by tim_ds {__version__}</footer></body></html>",
        ]
    )


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """Names of the runs; of folders too where names repeat."""
    names = [record.name for record in records]
    return [
        name if names.count(name) == 1 else f"{name} ({record.folder.name})"
        for name, record in zip(names, records, strict=True)
    ]


def _summary(record: RunRecord, label: str, position: int) -> str:
    facts: list[tuple[str, str]] = []
    if record.lines:
        last = record.lines[-1]
        speed = last.get("speed", {})
        facts = [
            ("loss, unweighted", _value(last.get("denoising"))),
            ("images/s", _value(speed.get("images_per_s"))),
            ("tokens/s", _value(speed.get("tokens_per_s"))),
            ("TFLOP/s a device", _value(speed.get("tflops_per_device"))),
            ("MFU", _percent(speed.get("mfu"))),
            ("packing fill", _percent(last.get("fill"))),
            ("skipped steps", _value(last.get("skipped_steps"))),
            ("continued", _value(_count(record, CONTINUED)) if record.events else ""),
            ("failed saves", _value(_count(record, SAVE_FAILED)) if record.events else ""),
            ("replaced samples", _value(sum(line.get("replaced", 0) for line in record.lines))),
        ]
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value)
    missing = ""
    if record.missing:
        listed = "".join(f"<li>{escape(part)}</li>" for part in record.missing)
        missing = f'<p class="missing">Not there:</p><ul class="missing">{listed}</ul>'
    kind = record.status.split()[0].rstrip(",")
    return (
        f'<section class="summary"><h2><span class="key c{position % _NUM_COLOURS}"></span>{escape(label)} '
        f'<span class="status {kind}">{escape(record.status)}</span></h2>'
        f'<p class="folder">{escape(str(record.folder))}</p><dl>{shown}</dl>{missing}</section>'
    )


def _curves(records: Sequence[RunRecord], labels: Sequence[str]) -> Iterator[str]:
    """One chart a quantity, one curve a run."""
    alone = len(records) == 1
    marks = _marks(records[0]) if alone else []
    chart = partial(line_chart, marks=marks)

    def across(get: Callable[[dict[str, Any]], Any], name: str = "") -> list[Series]:
        return [
            Series(name if alone and name else label, _points(record, get), f"c{i % _NUM_COLOURS}")
            for i, (record, label) in enumerate(zip(records, labels, strict=True))
        ]

    def field(name: str) -> Callable[[dict[str, Any]], Any]:
        return lambda line: line.get(name)

    def speed(name: str, scale: float = 1.0) -> Callable[[dict[str, Any]], Any]:
        def get(line: dict[str, Any]) -> Any:
            value = line.get("speed", {}).get(name)
            return None if value is None else scale * value

        return get

    charts = [
        chart("Loss, unweighted", across(field("denoising"), "denoising"), may_log=True),
        chart("Objective", across(field("loss"), "weighted loss"), may_log=True),
        *(
            chart(title, across(field(name), name), may_log=True)
            for name, title in (("directional", "Directional term"), ("alignment", "Alignment term"))
            if any(line.get(name) for record in records for line in record.lines)
        ),
        chart("Gradient norm", across(field("grad_norm"), "before clipping"), may_log=True),
        chart("Learning rate", across(field("lr"), "lr"), from_zero=True),
        chart("Images a second", across(speed("images_per_s"), "images/s"), from_zero=True),
        chart("Tokens a second", across(speed("tokens_per_s"), "tokens/s"), from_zero=True),
        chart("TFLOP/s a device", across(speed("tflops_per_device"), "model"), from_zero=True),
        chart("Utilisation (MFU)", across(speed("mfu", 100), "MFU"), unit="%", from_zero=True),
        chart("Packing fill", across(lambda line: _times(line.get("fill"), 100), "fill"), unit="%"),
        chart("Memory of the device", across(speed("memory_gib"), "peak"), unit="GiB", from_zero=True),
        chart("Memory of the host", across(speed("host_memory_gib"), "peak"), unit="GiB", from_zero=True),
        chart("Skipped steps", across(field("skipped_steps"), "skipped"), from_zero=True),
        chart("Replaced samples", across(field("replaced"), "in an interval"), from_zero=True),
        *(
            [chart("Requests made again", across(speed("retries"), "in an interval"), from_zero=True)]
            if any(line.get("speed", {}).get("retries") for record in records for line in record.lines)
            else []
        ),
    ]
    yield '<section id="curves"><h2>Curves</h2>'
    yield _mark_legend(marks)
    yield _grid(charts) or "<p>No curve: no line was written.</p>"
    for record, label in zip(records, labels, strict=True):
        bins = [
            chart(title, _bins(record, name, symbol), may_log=True)
            for name, title, symbol in (
                ("denoising_by_t", "Loss by time", "t"),
                ("denoising_by_interval", "Loss by interval", "t - r"),
            )
        ]
        if any(bins):
            of = "" if alone else f", {escape(label)}"
            yield f"<h3>By eighths of the transport's range{of}</h3>{_grid(bins)}"
    yield "</section>"


def _mark_legend(marks: Sequence[Mark]) -> str:
    """What the marks of the charts mean; as they are drawn, so that nobody needs colours."""
    shown = {mark.kind for mark in marks}
    parts = [
        f'<li><span class="mark-key {kind}"></span>{told}</li>'
        for kind, told in (
            ("continued", "dashed line: continued after an interruption"),
            ("save", "tick from above: not saved"),
            ("skipped", "tick from below: skipped step"),
        )
        if kind in shown
    ]
    return f'<ul class="legend marks">{"".join(parts)}</ul>' if parts else ""


def _bins(record: RunRecord, name: str, symbol: str) -> list[Series]:
    def get(i: int) -> Callable[[dict[str, Any]], Any]:
        return lambda line: (line.get(name) or [None] * NUM_BINS)[i]

    return [
        Series(f"{symbol} {i / NUM_BINS:.3g} to {(i + 1) / NUM_BINS:.3g}", _points(record, get(i)), f"b{i}")
        for i in range(NUM_BINS)
    ]


def _breakdowns(records: Sequence[RunRecord], labels: Sequence[str]) -> Iterator[str]:
    yield '<section id="steps"><h2>Time of a step</h2>'
    charts = []
    for record, label in zip(records, labels, strict=True):
        title = "Share of the time" if len(records) == 1 else f"Share of the time, {label}"
        marks = _marks(record)
        charts.append(stacked_chart(title, _shares(record), marks=marks))
        waits = [
            Series(name, _points(record, _phase_per_step(record, "data_wait", which)), colour)
            for name, which, colour in (("mean of the ranks", "mean", "c4"), ("slowest rank", "max", "c7"))
        ]
        if waits[0].points == waits[1].points:
            # One rank, or one line.
            waits = [Series("data wait", waits[0].points, waits[0].colour)]
        if len(records) == 1:
            charts.append(line_chart("Data wait a step", waits, unit="ms", from_zero=True, marks=marks))
    grid = _grid(charts)
    yield grid or "<p>No run recorded the phases of its steps.</p>"
    if grid:
        yield (
            '<p class="note">Mean over the ranks. What is left to 100 % belongs to no phase: moving data, '
            "logging, and what the host does between. On a GPU, phases are those of its stream, and "
            "data wait may run beside them. A derivative that the forward carries cannot be told from it.</p>"
        )
    yield "</section>"


def _shares(record: RunRecord) -> list[Series]:
    """Percent of each interval's time by phase, in one order, for intervals that have phases."""
    lines = [line for line in record.lines if line.get("speed", {}).get("phases")]
    present = {name for line in lines for name in line["speed"]["phases"]}
    order = [name for name in _PHASES if name in present] + sorted(present - set(_PHASES))
    return [
        Series(
            _LABELS.get(name, name),
            tuple(
                Point(
                    line["step"],
                    100
                    * max(0.0, line["speed"]["phases"].get(name, {}).get("mean", 0.0))
                    / line["speed"]["seconds"],
                )
                for line in lines
            ),
            _PHASES.get(name, "b6"),
        )
        for name in order
    ]


def _phase_per_step(record: RunRecord, name: str, which: str) -> Callable[[dict[str, Any]], Any]:
    """Milliseconds of a phase a step: an interval reaches from one line to the next."""
    steps = [line["step"] for line in record.lines]
    lengths = {step: step - before for before, step in zip([0, *steps], steps, strict=False)}

    def get(line: dict[str, Any]) -> Any:
        value = line.get("speed", {}).get("phases", {}).get(name, {}).get(which)
        return _times(value, 1000 / max(1, lengths[line["step"]]))

    return get


def _samples(records: Sequence[RunRecord], labels: Sequence[str], most: int) -> Iterator[str]:
    yield '<section id="samples"><h2>Samples through time</h2>'
    for record, label in zip(records, labels, strict=True):
        if len(records) > 1:
            yield f"<h3>{escape(label)}</h3>"
        if not record.previews:
            yield "<p>No previews were drawn.</p>"
            continue
        chosen = _spread(record.previews, most)
        if len(chosen) < len(record.previews):
            yield f'<p class="note">{len(chosen)} of {len(record.previews)} sheets, evenly spread.</p>'
        yield '<div class="sheets">'
        for preview in chosen:
            counts = ", ".join(map(str, preview.num_steps))
            rows = f"rows: {counts} sampling steps" if counts else "one row a number of steps"
            columns = f"; columns: {'; '.join(record.prompts)}" if record.prompts else ""
            alt = f"Samples at training step {preview.step}; {rows}{columns}"
            yield (
                f"<figure><figcaption>Step {preview.step:,} <span>{escape(rows)}</span></figcaption>"
                f"{_picture(preview.path, alt)}</figure>"
            )
        yield "</div>"
    yield "</section>"


def _evaluations(records: Sequence[RunRecord], labels: Sequence[str]) -> Iterator[str]:
    yield '<section id="evaluations"><h2>Evaluations</h2>'
    if not any(record.evaluations for record in records):
        yield "<p>None in the run folder. An evaluation whose --out lies in it is shown here.</p>"
    for record, label in zip(records, labels, strict=True):
        for evaluation in record.evaluations:
            place = evaluation.folder.relative_to(record.folder)
            title = str(place) if len(records) == 1 else f"{label}: {place}"
            yield f"<h3>{escape(title)}</h3>"
            yield _evaluation(evaluation)
    yield "</section>"


def _evaluation(evaluation: EvaluationFolder) -> str:
    parts = []
    if evaluation.table is not None:
        parts.append(f'<div class="scroll" tabindex="0"><pre>{escape(evaluation.table)}</pre></div>')
    parts.append('<div class="sheets">')
    for path in evaluation.pictures:
        name = path.stem.replace("_", " ")
        parts.append(
            f"<figure><figcaption>{escape(name)}</figcaption>{_picture(path, f'Evaluation: {name}')}</figure>"
        )
    parts.append("</div>")
    return "".join(parts)


def _details(records: Sequence[RunRecord], labels: Sequence[str]) -> Iterator[str]:
    yield '<section id="runs"><h2>Runs</h2>'
    for record, label in zip(records, labels, strict=True):
        yield f"<h3>{escape(label)}</h3>"
        yield _checkpoint_table(record)
        if record.versions:
            listed = ", ".join(f"{name} {value}" for name, value in record.versions.items())
            yield f"<p>Versions: {escape(listed)}</p>"
        if record.export is not None:
            source = record.export.get("source", {})
            which = f", average {source['average']}" if source.get("average") else ""
            yield f"<p>Export: step {record.export.get('step')}{escape(which)}</p>"
        for name, text in (("Recipe", record.recipe_text), ("Engine settings", record.engine_text)):
            if text:
                yield (
                    f'<details class="file"><summary>{name}</summary><div class="scroll" tabindex="0">'
                    f"<pre>{escape(text)}</pre></div></details>"
                )
    yield "</section>"


def _checkpoint_table(record: RunRecord) -> str:
    if not record.checkpoints:
        return "<p>No complete checkpoint.</p>"
    rows = [
        (
            checkpoint.path.name,
            f"{checkpoint.step:,}",
            number(sum(record.bytes for _, record in checkpoint.files) / 2**20) + " MiB",
            str(checkpoint.manifest.get("world_size", "")),
            str(checkpoint.manifest.get("zero_stage", "")),
        )
        for checkpoint in record.checkpoints
    ]
    snapshots = ""
    if record.snapshots:
        steps = ", ".join(f"{snapshot.step:,}" for snapshot in record.snapshots)
        snapshots = f"<p>{len(record.snapshots)} snapshots of averages, at steps {steps}</p>"
    return _table("Checkpoints", ("checkpoint", "step", "size", "ranks", "ZeRO stage"), rows) + snapshots


def _count(record: RunRecord, event: str) -> int:
    return sum(happened["event"] == event for happened in record.events)


def _marks(record: RunRecord) -> list[Mark]:
    """What interrupted a run, for its charts."""
    skipped = [
        Mark(line["step"], "skipped", f"step {line['step']}: {line['skipped']}") for line in record.skipped
    ]
    return skipped + [
        Mark(event["step"], _MARKED[event["event"]], f"step {event['step']}: {event['event']}")
        for event in record.events
        if event["event"] in _MARKED
    ]


def _interruptions(records: Sequence[RunRecord], labels: Sequence[str]) -> Iterator[str]:
    yield '<section id="interruptions"><h2>Interruptions</h2>'
    for record, label in zip(records, labels, strict=True):
        if len(records) > 1:
            yield f"<h3>{escape(label)}</h3>"
        yield _event_table(record)
        yield _skip_table(record)
    yield "</section>"


def _event_table(record: RunRecord) -> str:
    if not record.events:
        return (
            f"<p>No {EVENTS_FILE}: when the run was continued, and what it could not save, is not known.</p>"
        )
    rows = []
    ended = True
    for event in record.events:
        what, told = event["event"], [str(event[key]) for key in ("reason",) if event.get(key)]
        if what in STARTS:
            told.insert(0, f"ranks: {event.get('ranks', '?')}, ZeRO stage {event.get('zero_stage', '?')}")
            if not ended:
                told.append("the process before left no word: it was killed, or a rank was lost")
        ended = what in ENDS or (ended and what not in STARTS)
        rows.append(
            (str(event.get("time", ""))[:16].replace("T", " "), f"{event['step']:,}", what, "; ".join(told))
        )
    if all(row[2] in (BEGAN, FINISHED) for row in rows) and len(rows) <= 2:
        return "<p>None: begun once, and every save went well.</p>"
    title = "What happened (times are UTC)"
    if len(rows) > _LISTED_EVENTS:
        title += f", the last {_LISTED_EVENTS} of {len(rows)}"
    return _table(title, ("time", "step", "what", "how and why"), rows[-_LISTED_EVENTS:], words=True)


def _skip_table(record: RunRecord) -> str:
    if not record.skipped:
        return "<p>No step was skipped.</p>"
    rows = []
    for line in record.skipped[-_LISTED_SKIPS:]:
        samples = line.get("samples", [])
        more = f" and {len(samples) - _LISTED_SAMPLES} more" if len(samples) > _LISTED_SAMPLES else ""
        rows.append((f"{line['step']:,}", line["skipped"], ", ".join(samples[:_LISTED_SAMPLES]) + more))
    title = f"Skipped steps ({len(record.skipped)})"
    if len(record.skipped) > _LISTED_SKIPS:
        title += f", the last {_LISTED_SKIPS}"
    return _table(title, ("step", "why", "samples"), rows, words=True)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """With `words`, cells are read, not compared: they begin at the left and break."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(c)}</td>" for c in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{"words" if words else "figures"}">'
        f"<caption>{escape(title)}</caption>"
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _picture(path: Path, alt: str) -> str:
    """The picture itself, in the page."""
    try:
        content = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        return f"<p>{escape(path.name)} cannot be read: {escape(error.strerror or str(error))}</p>"
    return f'<img loading="lazy" alt="{escape(alt, quote=True)}" src="data:image/png;base64,{content}">'


def _grid(charts: Sequence[str]) -> str:
    shown = [chart for chart in charts if chart]
    return f'<div class="charts">{"".join(shown)}</div>' if shown else ""


def _points(record: RunRecord, get: Callable[[dict[str, Any]], Any]) -> tuple[Point, ...]:
    """Step and value of the lines that have one."""
    found = ((line["step"], get(line)) for line in record.lines)
    return tuple(Point(step, float(value)) for step, value in found if value is not None)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return list(items)
    if most == 1:
        return [items[-1]]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _value(value: float | None) -> str:
    return "" if value is None else number(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


@command(TimError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tim_ds.trainer.report",
        description="Render runs of launch/train.py as one HTML page.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {PAGE_NAME} in the first run)")
    parser.add_argument(
        "--previews", type=int, default=MAX_PREVIEWS, help=f"most sheets of a run (default: {MAX_PREVIEWS})"
    )
    options = parser.parse_args(arguments)
    if options.previews < 1:
        parser.error(f"--previews: expected at least 1, received {options.previews}")
    out = options.out or options.runs[0] / PAGE_NAME
    page = render([read_run(folder) for folder in options.runs], max_previews=options.previews).encode()

    def write(aside: Path) -> None:
        aside.write_bytes(page)

    write_aside(out, len(page), write)
    print(f"{out}: {len(page) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
