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


def narrow_offsets(ttir: str) -> list[str]:
    """The lines of 32-bit products, and of values cut to 32 bits, that reach an address and may not fit."""
    # A name may come again in a region beside its own: what was defined last is what is meant.
    values: dict[str, _Value] = {}
    found: set[str] = set()
    for raw in ttir.splitlines():
        line = re.sub(r" loc\(.*", "", raw).strip()
        if "scf.for" in line:
            # The counter, and what the loop hands from one round to the next.
            for name in re.findall(r"(%\w+) = ", line.partition("scf.for")[2]):
                values.pop(name, None)
        match = _DEFINITION.match(line)
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
    return sorted(found)


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
