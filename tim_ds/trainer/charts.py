"""Curves as inline SVG: no library, no script, colours from the page's style sheet.

Every chart is a `<figure>`: title, legend with last values, picture with a spoken summary, and the numbers as
a table that opens. Colours are classes (`c0`, `c1`, ... for things, `b0` to `b7` for ordered bins), so that
one picture serves light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 10, 34
MAX_POINTS = 400
"""Points of a curve; of longer ones, means of neighbours are drawn."""
_TABLE_ROWS = 10


class Point(NamedTuple):
    step: float
    value: float


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. `colour` is a class of the style sheet."""

    name: str
    points: tuple[Point, ...]
    colour: str
    dashed: bool = False


class Mark(NamedTuple):
    """Something that happened at a step."""

    step: float
    kind: str
    """A class of the style sheet: `continued` is drawn as a dashed line, `save` as a tick from above,
    `skipped` as a tick from below."""
    label: str


_MARK_TICK = 12
"""Height of a tick."""


def number(value: float, digits: int = 3) -> str:
    """Short, for axes and legends."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            divisor = 1e3 if unit == "k" else limit
            return f"{value / divisor:.{digits}g}{unit}"
    if size >= 1000 and digits <= 4:
        return f"{value:.0f}"
    # Python writes 8e-05.
    return f"{value:.{digits}g}".replace("e-0", "e-")


def labels(values: Sequence[float]) -> list[str]:
    """Of the ticks of an axis: as short as `number` has them, unless two would read the same."""
    found: list[str] = []
    for digits in range(3, 9):
        found = [number(value, digits) for value in values]
        if len(set(found)) == len(found):
            break
    return found


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    may_log: bool = False,
    from_zero: bool = False,
    marks: Sequence[Mark] = (),
) -> str:
    """Curves over steps, or nothing where no curve has a point.

    Args:
        may_log: use a logarithmic axis where the values span more than a factor of 30.
        from_zero: begin the axis at zero.
    """
    series = [thinned(s) for s in series if s.points]
    if not series:
        return ""
    values = [p.value for s in series for p in s.points]
    log = may_log and min(values) > 0 and max(values) / min(values) > 30
    low, high = min(values), max(values)
    if from_zero and not log:
        low = min(low, 0.0)
    frame = _Frame.of(series, low, high, log=log)
    drawn = []
    for s in series:
        path = "M" + "L".join(f"{frame.x(p.step):.1f} {frame.y(p.value):.1f}" for p in s.points)
        dash = ' stroke-dasharray="5 3"' if s.dashed else ""
        name = escape(s.name)
        if len(s.points) == 1:
            x, y = frame.x(s.points[0].step), frame.y(s.points[0].value)
            drawn.append(f'<circle class="dot {s.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        else:
            drawn.append(f'<path class="line {s.colour}" d="{path}"{dash}><title>{name}</title></path>')
    shown = frame.marks(marks)
    content = "".join([*frame.axes(), *shown.values(), *drawn])
    return _figure(title + (" (log)" if log else ""), series, content, unit, _counted(shown))


def stacked_chart(
    title: str, series: Sequence[Series], *, unit: str = "%", marks: Sequence[Mark] = ()
) -> str:
    """Shares of a whole over steps, one above the other; every series has the same steps."""
    series = [thinned(s) for s in series if s.points]
    if not series:
        return ""
    steps = [p.step for p in series[0].points]
    frame = _Frame.of(series, 0.0, 100.0, log=False)
    base = [0.0] * len(steps)
    drawn = []
    for s in series:
        top = [b + p.value for b, p in zip(base, s.points, strict=True)]
        outline = [(x, y) for x, y in zip(steps, top, strict=True)]
        outline += [(x, y) for x, y in zip(reversed(steps), reversed(base), strict=True)]
        path = "M" + "L".join(f"{frame.x(x):.1f} {frame.y(min(y, 100.0)):.1f}" for x, y in outline) + "Z"
        drawn.append(f'<path class="area {s.colour}" d="{path}"><title>{escape(s.name)}</title></path>')
        base = top
    shown = frame.marks(marks)
    return _figure(title, series, "".join([*drawn, *frame.axes(), *shown.values()]), unit, _counted(shown))


def thinned(series: Series) -> Series:
    """At most `MAX_POINTS` points: means over equal runs of neighbours."""
    count = len(series.points)
    if count <= MAX_POINTS:
        return series
    edges = [round(i * count / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    points = []
    for start, end in pairwise(edges):
        part = series.points[start:end]
        points.append(Point(part[-1].step, sum(p.value for p in part) / len(part)))
    return Series(series.name, tuple(points), series.colour, series.dashed)


@dataclass(frozen=True, slots=True)
class _Frame:
    """From steps and values to the picture."""

    first: float
    last: float
    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, series: Sequence[Series], low: float, high: float, *, log: bool) -> _Frame:
        steps = [p.step for s in series for p in s.points]
        first, last = min(steps), max(steps)
        if first == last:
            first, last = first - 1, last + 1
        if log:
            return cls(first, last, math.log10(low), math.log10(high), True)
        if low == high == 0:
            high = 1.0
        elif low == high:
            room = abs(low) or 1.0
            low, high = low - 0.5 * room, high + 0.5 * room
        return cls(first, last, low, high, False)

    def x(self, step: float) -> float:
        return _LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        height = math.log10(value) if self.log else value
        return HEIGHT - _BOTTOM - (height - self.low) / (self.high - self.low) * (HEIGHT - _BOTTOM - _TOP)

    def marks(self, marks: Sequence[Mark]) -> dict[tuple[str, int], str]:
        """Those within the curves, by kind and place: of several at one place, the last is drawn."""
        found = {}
        for mark in marks:
            if not self.first <= mark.step <= self.last:
                continue
            x, top, bottom = round(self.x(mark.step)), _TOP, HEIGHT - _BOTTOM
            if mark.kind == "save":
                bottom = top + _MARK_TICK
            elif mark.kind == "skipped":
                top = bottom - _MARK_TICK
            found[mark.kind, x] = (
                f'<line class="mark {mark.kind}" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}">'
                f"<title>{escape(mark.label)}</title></line>"
            )
        return found

    def axes(self) -> list[str]:
        parts = []
        values = self._value_ticks()
        for value, label in zip(values, labels(values), strict=True):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            label = number(value)
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        steps = ticks(self.first, self.last, 5, whole=True)
        for step, label in zip(steps, labels(steps), strict=True):
            x, y = self.x(step), HEIGHT - _BOTTOM
            parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 4}"/>')
            anchor = "end" if x > WIDTH - _RIGHT - 14 else "middle"
            parts.append(f'<text x="{x:.1f}" y="{y + 17}" text-anchor="{anchor}">{label}</text>')
        bottom = HEIGHT - _BOTTOM
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">step</text>')
        return parts

    def _value_ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, 5)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        factors = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
        found = [factor * 10.0**n for n in decades for factor in factors]
        return [v for v in found if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    if whole:
        size = max(size, 1.0)
    start = math.ceil(low / size - 1e-9)
    end = math.floor(high / size + 1e-9)
    return [n * size for n in range(start, end + 1)]


def _counted(shown: Mapping[tuple[str, int], str]) -> str:
    """Marks in words, for who cannot see them."""
    kinds = [kind for kind, _ in shown]
    told = {"continued": "continuations", "save": "failed saves", "skipped": "skipped steps"}
    parts = [f"{name} {kinds.count(kind)}" for kind, name in told.items() if kind in kinds]
    return f". Marked: {', '.join(parts)}" if parts else ""


def _figure(title: str, series: Sequence[Series], content: str, unit: str, marked: str = "") -> str:
    suffix = f" {unit}" if unit else ""
    legend = "".join(
        f'<li><span class="key {s.colour}{" dashed" if s.dashed else ""}"></span>{escape(s.name)} '
        f"<b>{number(s.points[-1].value)}{suffix}</b></li>"
        for s in series
    )
    summary = f"{title}. " + "; ".join(
        f"{s.name}: from {number(s.points[0].value)} at step {number(s.points[0].step)} to "
        f"{number(s.points[-1].value)}{suffix} at step {number(s.points[-1].step)}"
        for s in series
    )
    summary += marked
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><ul class="legend">{legend}</ul>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary, quote=True)}">'
        f"{content}</svg>{_table(series, unit)}</figure>"
    )


def _table(series: Sequence[Series], unit: str) -> str:
    """Some of the numbers, evenly spread, the last among them."""
    steps = sorted({p.step for s in series for p in s.points})
    if len(steps) > _TABLE_ROWS:
        steps = [steps[round(i * (len(steps) - 1) / (_TABLE_ROWS - 1))] for i in range(_TABLE_ROWS)]
    columns = [dict(s.points) for s in series]
    head = "".join(f'<th scope="col">{escape(s.name)}</th>' for s in series)
    body = "".join(
        f'<tr><th scope="row">{step:g}</th>'
        + "".join(f"<td>{number(c[step]) if step in c else ''}</td>" for c in columns)
        + "</tr>"
        for step in steps
    )
    note = f" ({escape(unit)})" if unit else ""
    return (
        f'<details><summary>Numbers{note}</summary><div class="scroll" tabindex="0"><table><thead><tr>'
        f'<th scope="col">step</th>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )
