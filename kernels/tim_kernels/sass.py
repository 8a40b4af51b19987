"""Machine code as nvdisasm prints it: instructions, basic blocks, loops, and what they read and write.

Nothing here knows a kernel or a device; `limits.py` draws conclusions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

_LABEL = re.compile(r"^(\.?[\w$.]+):\s*$")
# /*0a30*/  @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64+0x10] ;   Older tools wrap pairs in braces.
_INSTRUCTION = re.compile(
    r"^\s*\{?\s*/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.]*)(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"`\(([^)]+)\)")
_REGISTER = re.compile(r"(?<![\w.])(?P<bank>UP|UR|P|R)(?P<number>\d+)(?P<pair>\.64)?(?![\w])")
_WITHOUT_RESULT = (
    *(
        "BAR",
        "BRA",
        "BRX",
        "BSSY",
        "BSYNC",
        "CALL",
        "CCTL",
        "DEPBAR",
        "EXIT",
        "LDGDEPBAR",
        "LDGSTS",
        "MEMBAR",
    ),
    *("NOP", "PREFETCH", "RED", "RET", "ST", "STG", "STL", "STS", "SYNCS", "WARPGROUP", "WARPSYNC", "YIELD"),
)
_JUMPS = ("BRA", "BRX", "EXIT", "RET", "JMP", "JMX", "BRXU")
_MATRIX_REGISTERS = {"HMMA": 4, "IMMA": 4}
_LOADS = ("LDG", "LDS", "LD", "LDL", "LDC", "ULDC", "LDGSTS")
_STORES = ("STG", "STS", "ST", "STL")


class UnreadableListing(ValueError):
    """A listing that is not what nvdisasm is known to print."""


@dataclass(frozen=True)
class Instruction:
    """One line. Registers are named "R4", "UR4", "P0" and "UP0"; constant ones (RZ, PT) are left out."""

    address: int
    guard: str | None
    opcode: str
    operands: str
    target: str | None = None
    """Label that a jump goes to."""

    @property
    def family(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def is_conditional(self) -> bool:
        return self.guard is not None

    @cached_property
    def width(self) -> int:
        """Bytes a thread that a load or store moves; 0 of anything else."""
        if self.family not in _LOADS + _STORES:
            return 0
        parts = self.opcode.split(".")
        for size, names in ((16, ("128",)), (8, ("64",)), (1, ("U8", "S8")), (2, ("U16", "S16"))):
            if any(name in parts for name in names):
                return size
        return 4

    @cached_property
    def results(self) -> tuple[str, ...]:
        return tuple(self._registers[0])

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Registers read, the guard's and those of the address included."""
        return tuple(self._registers[1])

    @cached_property
    def address_registers(self) -> tuple[str, ...]:
        """Registers inside the brackets of a load or store, without the descriptor."""
        inside = re.findall(r"(desc)?\[([^\]]*)\]", self.operands)
        return tuple(r for is_descriptor, text in inside if not is_descriptor for r in _named(text))

    @cached_property
    def _registers(self) -> tuple[list[str], list[str]]:
        operands = _split(self.operands)
        results: list[str] = []
        if self.family not in _WITHOUT_RESULT and operands:
            # Predicates that an instruction sets stand before or after its first register.
            while operands and re.fullmatch(r"U?P(\d|T)", operands[0]):
                results += _named(operands.pop(0))
            comparison = self.family.removeprefix("U").endswith("SETP") or self.family in ("PLOP3", "UPLOP3")
            if operands and not comparison:
                results += self._group(operands.pop(0))
                while operands and re.fullmatch(r"U?P(\d|T)", operands[0]) and self.family != "SEL":
                    results += _named(operands.pop(0))
        sources = [r for text in operands for r in _named(text)]
        if self.guard is not None:
            sources += _named(self.guard.removeprefix("!"))
            # What a skipped instruction would have overwritten lives on.
            sources += results
        return results, sources

    def _group(self, operand: str) -> list[str]:
        """The registers of a result, of which the text names the first."""
        names = _named(operand)
        if not names:
            return []
        bank = names[0].rstrip("0123456789")
        first = int(names[0].removeprefix(bank))
        parts = self.opcode.split(".")
        size = max(1, self.width // 4)
        if "WIDE" in parts or (self.family in ("LDC", "ULDC") and "64" in parts):
            size = 2
        elif self.family in _MATRIX_REGISTERS:
            size = _MATRIX_REGISTERS[self.family]
        return [f"{bank}{first + i}" for i in range(size)]


@dataclass(frozen=True)
class Loop:
    """The instructions that one iteration goes through, in order."""

    start: int
    end: int
    body: tuple[Instruction, ...]

    @cached_property
    def carried(self) -> frozenset[str]:
        """Registers that an iteration reads as the one before has left them."""
        written: set[str] = set()
        early: set[str] = set()
        for instruction in self.body:
            early |= set(instruction.sources) - written
            written |= set(instruction.results)
        return frozenset(early & written)

    def streaming(self) -> frozenset[int]:
        """Addresses of the loads from device memory whose own addresses differ between iterations.

        The others find what the iteration before has read in the cache.
        """
        varying = set(self.carried)
        found = set()
        for instruction in self.body:
            varies = any(r in varying for r in instruction.sources)
            if instruction.family in ("LDG", "LDGSTS"):
                if any(r in varying for r in instruction.address_registers):
                    found.add(instruction.address)
                varies = True
            elif instruction.family in ("LDS", "SHFL"):
                varies = True
            for r in instruction.results:
                (varying.add if varies else varying.discard)(r)
        return frozenset(found)


@dataclass(frozen=True)
class Program:
    """A kernel's entry: what runs once, and its innermost loops."""

    once: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    @property
    def instructions(self) -> Iterator[Instruction]:
        yield from self.once
        for loop in self.loops:
            yield from loop.body


def parse(listing: str) -> Program:
    """Read `nvdisasm -c` of a file with one kernel.

    Blocks that call a subroutine are rare paths (division beyond the range of its fast form) and are left
    out, as are the subroutines. Of a loop inside a loop the inner one counts as a loop, the rest of the outer
    as running once.

    Raises:
        UnreadableListing: if no kernel is found, a line cannot be read, or a jump goes nowhere.
    """
    instructions, labels = _read(listing)
    blocks = _blocks(instructions, labels)
    reached = _reached(blocks)
    loops = _loops(blocks, reached)
    inside = {i.address for loop in loops for i in loop.body}
    rare = {b for b in reached if _is_rare(blocks[b].body)}
    once = [i for b in sorted(reached - rare) for i in blocks[b].body if i.address not in inside]
    return Program(tuple(once), tuple(loops))


@dataclass(frozen=True)
class _Block:
    body: tuple[Instruction, ...]
    followers: tuple[int, ...]


def _read(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of the section of code, in order, and the index of the one that follows each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    sections = 0
    is_code = False
    for number, line in enumerate(listing.splitlines(), 1):
        if re.match(r"\s*\.section\s", line):
            is_code = ".text." in line
            sections += is_code
            continue
        if not is_code:
            continue
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        match = _INSTRUCTION.match(line)
        if match:
            target = _TARGET.search(match["operands"])
            instructions.append(
                Instruction(
                    int(match["at"], 16),
                    match["guard"],
                    match["opcode"],
                    match["operands"].strip(),
                    target[1] if target else None,
                )
            )
        elif re.match(r"\s*\{?\s*/\*[0-9a-f]{4,}\*/\s+\S", line):
            raise UnreadableListing(
                f"line {number} of nvdisasm's listing: expected an instruction, "
                f"received {line.strip()[:80]!r}"
            )
    if sections != 1 or not instructions:
        raise UnreadableListing(
            f"nvdisasm's listing: expected one section .text.<kernel> with instructions, received {sections} "
            f"sections and {len(instructions)} instructions"
        )
    return instructions, labels


def _blocks(instructions: Sequence[Instruction], labels: dict[str, int]) -> list[_Block]:
    starts = {0, *(i for i in labels.values() if i < len(instructions))}
    starts |= {i + 1 for i, x in enumerate(instructions[:-1]) if _is_jump(x)}
    ordered = sorted(starts)
    block_of = {start: b for b, start in enumerate(ordered)}
    blocks = []
    for b, start in enumerate(ordered):
        stop = ordered[b + 1] if b + 1 < len(ordered) else len(instructions)
        body = tuple(instructions[start:stop])
        last = body[-1]
        followers = []
        if last.family == "BRA" or (last.family == "CALL" and _is_jump(last)):
            if last.target not in labels:
                raise UnreadableListing(f"jump at {last.address:#x}: no label {last.target!r} in the listing")
            followers.append(block_of[labels[last.target]])
        elif _is_jump(last) and last.family not in ("EXIT", "RET"):
            raise UnreadableListing(f"jump at {last.address:#x}: cannot follow {last.opcode}")
        is_certain = _is_jump(last) and not last.is_conditional and not _names_predicate(last)
        if not is_certain and b + 1 < len(ordered):
            followers.append(b + 1)
        blocks.append(_Block(body, tuple(followers)))
    return blocks


def _names_predicate(jump: Instruction) -> bool:
    """BRA.DIV and BRA.U carry their condition among the operands."""
    return jump.family == "BRA" and bool(re.match(r"!?U?[PR]\w+\s*,", jump.operands))


def _reached(blocks: Sequence[_Block]) -> set[int]:
    found, open_ = {0}, [0]
    while open_:
        for follower in blocks[open_.pop()].followers:
            if follower not in found:
                found.add(follower)
                open_.append(follower)
    return found


def _is_rare(body: Sequence[Instruction]) -> bool:
    return any(i.family == "CALL" and not _is_jump(i) for i in body)


def _is_jump(instruction: Instruction) -> bool:
    """ptxas for sm_80 leaves loops by a call of the label behind them, from which nothing returns."""
    if instruction.family == "CALL":
        return instruction.target is not None and instruction.target.startswith(".L_")
    return instruction.family in _JUMPS


def _loops(blocks: Sequence[_Block], reached: set[int]) -> list[Loop]:
    """Natural loops that hold no other, by the order of their starts."""
    backward = {(b, f) for b in reached for f in blocks[b].followers if f <= b}
    members: dict[int, set[int]] = {}
    before: dict[int, set[int]] = {b: set() for b in reached}
    for b in reached:
        for f in blocks[b].followers:
            before[f].add(b)
    for tail, head in backward:
        if len(blocks[tail].body) == 1 and tail == head:
            # The jump to itself with which ptxas ends a program.
            continue
        found, open_ = {head, tail}, [tail]
        while open_:
            b = open_.pop()
            if b == head:
                continue
            for p in before[b] - found:
                found.add(p)
                open_.append(p)
        members[head] = members.get(head, set()) | found
    loops = []
    for head, found in sorted(members.items()):
        if any(other != head and other in found for other in members):
            continue
        body = [i for b in sorted(found) if not _is_rare(blocks[b].body) for i in blocks[b].body]
        if body:
            loops.append(Loop(body[0].address, body[-1].address, tuple(body)))
    return loops


def _split(operands: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(operands):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append(operands[start:at].strip())
            start = at + 1
    parts.append(operands[start:].strip())
    return [p for p in parts if p]


def _named(text: str) -> list[str]:
    found = []
    for match in _REGISTER.finditer(text):
        bank, number = match["bank"], int(match["number"])
        found.append(f"{bank}{number}")
        if match["pair"] or (bank == "UR" and "desc" in text):
            found.append(f"{bank}{number + 1}")
    return found
