"""Which addresses of a compiled kernel are computed in 32 bits though they may lie beyond 2^31 elements.

Read from Triton's own representation (TTIR), where it still shows what was widened and what was not. Every
offset that is added to a pointer is known by what it was made of; a product among that which is taken in 32
bits, or a value cut to them, is a fault unless its parts bound it: constants, ranges of columns, numbers of
programs, positions of a grid. Strides, row sizes, rows read from a table and counters of loops have no bound.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

PROGRAMS = {"x": 2**28, "y": 2**16, "z": 3}
"""Programs of a launch along each axis, at most: chunks, tiles or runs of rows; columns or heads; q, k, v."""
READ = {"%position_a_ptr": 2**20, "%position_b_ptr": 2**20}
"""What is read through a pointer, where it has a bound: positions are rows of the table of cosines."""

_DEFINITION = re.compile(r"^\s*(%\w+)(?::\d+)? = \"?([a-z_]+\.[a-z_]+)\b(.*)$")
_NAME = re.compile(r"%\w+")
_PASSED = {
    *(f"arith.{name}" for name in ("addi", "subi", "muli", "shli", "divsi", "remsi", "minsi", "maxsi")),
    *(f"arith.{name}" for name in ("extsi", "extui", "trunci", "select")),
    *(f"tt.{name}" for name in ("splat", "expand_dims", "broadcast", "trans", "reshape", "addptr")),
}
"""Operations whose result is made of their operands."""


@dataclass(frozen=True)
class _Value:
    """bound: largest magnitude.  suspects: lines that may have wrapped on the way.  source: of a pointer, the
    argument it comes from."""

    bound: float = math.inf
    suspects: frozenset[str] = frozenset()
    source: str = ""


@dataclass
class _Region:
    """An operation with a body: a loop, a condition, or another.

    name: of its results, if it has some.  suspects: of what it yields.  arguments: what a loop hands from one
    round to the next.
    """

    name: str | None = None
    suspects: frozenset[str] = frozenset()
    arguments: tuple[_Argument, ...] = ()


_Argument = tuple[int, int]
"""A value that a loop carries: the line of the loop, and its place there."""


def narrow_offsets(ttir: str) -> list[str]:
    """The lines of 32-bit products, and of values cut to 32 bits, that reach an address and may not fit."""
    carried: dict[_Argument, frozenset[str]] = {}
    while True:
        known = dict(carried)
        # What a round yields, the next one takes: read again until nothing is added.
        found = _once(ttir, carried)
        if carried == known:
            return sorted(found)


def _once(ttir: str, carried: dict[_Argument, frozenset[str]]) -> set[str]:
    """The lines that are found in one reading, which adds to what loops carry."""
    # A name may come again in a region beside its own: what was defined last is what is meant.
    values: dict[str, _Value] = {}
    found: set[str] = set()
    regions: list[_Region] = []
    for number, raw in enumerate(ttir.splitlines()):
        line = re.sub(r" loc\(.*", "", raw).strip()
        if line.startswith("scf.yield") and regions:
            names = _NAME.findall(line.partition(" : ")[0])
            for name, argument in zip(names, regions[-1].arguments, strict=False):
                carried[argument] = carried.get(argument, frozenset()) | values.get(name, _Value()).suspects
            regions[-1].suspects |= frozenset().union(*(values.get(n, _Value()).suspects for n in names))
        if line.startswith("}") and not line.endswith("{") and regions:
            closed = regions.pop()
            if closed.name is not None:
                values[closed.name] = _Value(suspects=closed.suspects)
        match = _DEFINITION.match(line)
        if line.endswith(("{", "({")) and not line.startswith("}"):
            region = _Region(None if match is None else match[1])
            if "scf.for" in line:
                _enter_loop(line, number, region, values, carried)
            regions.append(region)
            continue
        if match is None:
            continue
        name, op, rest = match.groups()
        names = _NAME.findall(rest.partition(" : ")[0])
        operands = [values.get(n, _Value(source=n)) for n in names]
        bound = _bound(op, rest, [x.bound for x in operands])
        source = operands[0].source if op in _PASSED and operands else ""
        suspects = frozenset().union(*(x.suspects for x in operands)) if op in _PASSED else frozenset()
        if op == "tt.load":
            bound = READ.get(operands[0].source, math.inf)
        if op == "tt.addptr":
            found |= operands[1].suspects
        is_narrow = rest.rstrip(">").endswith("i32") and op in ("arith.muli", "arith.shli", "arith.trunci")
        if is_narrow and bound >= 2**31:
            suspects |= {line}
        values[name] = _Value(bound, suspects, source)
    return found


def _enter_loop(
    line: str,
    number: int,
    region: _Region,
    values: dict[str, _Value],
    carried: dict[_Argument, frozenset[str]],
) -> None:
    """Define the counter of a loop, which has no bound, and what it carries."""
    head = line.partition("scf.for")[2]
    for name in re.findall(r"(%\w+) = ", head.partition("iter_args")[0]):
        values.pop(name, None)
    pairs = re.findall(r"(%\w+) = (%\w+)", head.partition("iter_args")[2])
    region.arguments = tuple((number, place) for place in range(len(pairs)))
    first = [values.get(start, _Value(source=start)) for _, start in pairs]
    for (name, _), argument, value in zip(pairs, region.arguments, first, strict=True):
        suspects = value.suspects | carried.get(argument, frozenset())
        values[name] = _Value(suspects=suspects, source=value.source)
        # A loop of no round yields what it began with.
        region.suspects |= suspects


def _bound(op: str, rest: str, parts: list[float]) -> float:
    """Largest magnitude of a result, from those of its operands."""
    match op, parts:
        case "arith.constant", _:
            value = re.match(r"\s*(?:dense<)?(-?\d+)>? :", rest)
            return math.inf if value is None else abs(int(value[1]))
        case "tt.make_range", _:
            end = re.search(r"end = (\d+)", rest)
            return math.inf if end is None else int(end[1]) - 1
        case "tt.get_program_id" | "tt.get_num_programs", _:
            return PROGRAMS[rest.split()[0]] - (op == "tt.get_program_id")
        case "arith.addi" | "arith.subi", [a, b]:
            return a + b
        case "arith.muli", [a, b]:
            return 0.0 if 0 in (a, b) else a * b
        case "arith.remsi", [a, b]:
            return min(a, b)
        case ("arith.minsi" | "arith.maxsi", [a, b]) | ("arith.select", [_, a, b]):
            return max(a, b)
        case "arith.divsi", [a, _]:
            return a
        case _, [a] if op in _PASSED:
            return a
    return math.inf
