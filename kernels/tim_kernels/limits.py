"""How far the machine code of a memory-bound kernel lets it go: bounds, counted and never measured.

    python -m tim_kernels.aot --limits                       for an H200
    python -m tim_kernels.aot --limits --architectures 80    for an A100

Three things keep a kernel that moves bytes from the bandwidth of its device, and each can be counted in what
nvdisasm prints:

- instructions: a scheduler issues one a cycle, and every pipe behind it takes its own number of cycles for
  one. What an element costs stands against the time in which the device moves the bytes of an element;
- bytes in flight: an SM must have bandwidth x latency / number of SMs of them under way. How many it has
  follows from the programs that fit on it (registers, shared memory, warps, programs) and from the time that
  a program takes from one row to the next: `period_of` lets one warp run through the loop in order, each
  instruction when what it reads is there;
- programs: fewer than the device holds leave a part of it idle.

Rates are those of data sheets and latencies are assumptions (`DEVICES`, `LATENCIES`): the figures serve to
compare two forms of a kernel, and to find one that cannot reach a goal. They are upper bounds. That a kernel
has room in all of them does not say that it is fast.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tim_kernels.sass import Instruction, Loop, Program, UnreadableListing
from tim_kernels.schedule import RUN, schedule_of

if TYPE_CHECKING:
    from tim_kernels.shipped import Variant

TOKENS = 65_536
"""Tokens of the pack for which programs are counted, the size of the goals; in segments of `SEGMENT`."""
SEGMENT = 1024
ROWS = schedule_of(RUN).rows
"""Rows of a chunk or of a run there."""


@dataclass(frozen=True)
class Device:
    """Data-sheet rates; the latency of device memory under load is an assumption."""

    name: str
    sms: int
    hertz: float
    bandwidth: float
    """Bytes a second."""
    latency: float
    """Seconds from a load to its use, while the device is busy."""
    fp32_lanes: int
    """Of an SM. 16 lanes of the special functions and 64 of integers are the same on all."""
    shared_bytes: int
    registers: int = 65_536
    warps: int = 64
    programs: int = 32

    @property
    def bytes_in_flight(self) -> float:
        """That one SM must have under way, reads and writes together (Little's law)."""
        return self.bandwidth * self.latency / self.sms


DEVICES = {
    80: Device("A100 80 GB", 108, 1.41e9, 2.039e12, 0.6e-6, 64, 164 * 1024),
    90: Device("H200", 132, 1.755e9, 4.8e12, 0.8e-6, 128, 228 * 1024),
}

LATENCIES = {
    **dict.fromkeys(("LDS", "LDSM", "ATOMS"), 30),
    **dict.fromkeys(("SHFL", "MUFU", "F2F", "I2F", "F2I"), 24),
    **dict.fromkeys(("S2R", "S2UR", "R2UR", "LDC", "ULDC"), 20),
    **dict.fromkeys(("HMMA", "IMMA"), 33),
    "BAR": 25,
}
"""Cycles from an instruction to the use of its result: round figures; 5 for all others."""
ORDINARY_LATENCY = 5
CACHED_LATENCY = 40
"""Of a load that repeats the address of the iteration before: the first-level cache has it."""
TABLE_LATENCY = 270
"""Of a load whose address another load gave: a table that the second-level cache holds."""
PROGRAM_CYCLES = 300
"""From the end of a program to the first instruction of the one that takes its place."""
RESERVED_SHARED_BYTES = 1024
"""Of each program, that the system keeps."""

_INTEGER = (
    *(
        "IADD3",
        "LOP3",
        "SHF",
        "PRMT",
        "ISETP",
        "FSETP",
        "FSEL",
        "SEL",
        "FMNMX",
        "LEA",
        "MOV",
        "VIADD",
        "IMNMX",
    ),
    *("F2FP", "PLOP3", "SGXT", "IABS", "VOTE", "P2R", "R2P", "BMSK", "FCHK", "SHL", "SHR", "CS2R"),
)
_FLOAT = ("FFMA", "FADD", "FMUL", "FSWZADD")
_INTEGER_PRODUCT = ("IMAD", "IDP", "HFMA2", "HADD2", "HMUL2")
_SPECIAL = ("MUFU", "F2F", "I2F", "F2I", "I2FP", "POPC", "FLO")
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDGSTS")


@dataclass(frozen=True)
class Work:
    """What one iteration of a program's loop, or a program without one, has to do."""

    elements: int
    reads: float
    """Bytes an element from device memory, a mean over the parts."""
    writes: float
    iterations: int
    programs: int
    parts: int = 1
    """Loops of which a program takes one."""
    has_loop: bool = True

    @property
    def bytes(self) -> float:
        return self.reads + self.writes


@dataclass(frozen=True)
class Limits:
    """Bounds of one variant on one device. Shares are of the time that its bytes take at full bandwidth."""

    instructions: float
    """Issued for each element of each warp, what runs once spread over the elements of a program."""
    issue: float
    """Share of the issue slots."""
    pipe: str
    """The busiest."""
    pipe_share: float
    barriers: float
    """Of one iteration."""
    resident_warps: int
    """Of an SM, as registers, shared memory, warps and programs let them, and as there are programs."""
    bytes_in_flight: float
    """Of reads, of an SM, in the mean over the time of a program."""
    needed_in_flight: float
    waves: float
    """Programs of the launch over those that the device holds."""

    @property
    def reach(self) -> float:
        """Bandwidth that the bytes in flight allow, over the device's."""
        return self.bytes_in_flight / self.needed_in_flight

    @property
    def bounds(self) -> dict[str, float]:
        """Bandwidth that each limit allows, over the device's."""
        return {
            "bytes in flight": self.reach,
            "issue": 1 / self.issue,
            self.pipe: 1 / self.pipe_share,
        }

    @property
    def first(self) -> str:
        return min(self.bounds, key=self.bounds.__getitem__)

    @property
    def room(self) -> float:
        return self.bounds[self.first]


def limits_of(
    program: Program, work: Work, device: Device, *, registers: int, shared_bytes: int, num_warps: int
) -> Limits:
    """The bounds of a kernel, from its registers a thread and its shared bytes and warps a program.

    Raises:
        UnreadableListing: if its loops are not those that `work` describes.
    """
    loops = _loops_that_run(program, work, num_warps)
    threads = 32 * num_warps
    # Instructions, and cycles of one program, of the mean part.
    once = _costs(program.once, device)
    cycles = period_of(program.once, None, device) / work.parts + PROGRAM_CYCLES
    spent = defaultdict(float, {name: cost / work.parts for name, cost in once.items()})
    barriers = 0.0
    for loop, unrolled in loops:
        trips = work.iterations / unrolled / work.parts
        for name, cost in _costs(loop.body, device).items():
            spent[name] += cost * trips
        cycles += period_of(loop.body, loop.streaming(), device) * trips
        barriers += _count(loop.body, "BAR") / unrolled / work.parts
    if not loops:
        barriers = _count(program.once, "BAR")
    elements = work.elements * work.iterations
    per_warp = elements / threads
    # A scheduler's cycles for one element of one warp, of the four of each SM.
    seconds = 32 * work.bytes / device.bandwidth
    budget = seconds * device.hertz * device.sms * 4
    issued = spent.pop("issue")
    pipe, busiest = max(spent.items(), key=lambda item: item[1])
    most = resident_programs(registers, shared_bytes, num_warps, device)
    held = min(most, work.programs / device.sms)
    read = work.reads * elements
    return Limits(
        instructions=issued / per_warp,
        issue=issued / per_warp / budget,
        pipe=pipe,
        pipe_share=busiest / per_warp / budget,
        barriers=barriers,
        resident_warps=math.floor(held * num_warps),
        bytes_in_flight=held * read / cycles * (device.latency * device.hertz),
        needed_in_flight=device.bytes_in_flight * work.reads / work.bytes,
        waves=work.programs / (most * device.sms),
    )


def resident_programs(registers: int, shared_bytes: int, num_warps: int, device: Device) -> int:
    """Programs that one SM holds. Registers are allotted to a warp in units of 256."""
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = device.registers // 4 // of_warp * 4 // num_warps
    by_shared = device.shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES)
    return max(1, min(by_registers, by_shared, device.warps // num_warps, device.programs))


def period_of(body: Sequence[Instruction], streaming: Iterable[int] | None, device: Device) -> float:
    """Cycles from one iteration of a loop to the next, of one warp that is alone on its scheduler.

    It issues in order, one instruction a cycle, each when its registers are there. Loads at the addresses of
    `streaming` take the latency of device memory. None: the instructions run once, and every load is such a
    one. Asynchronous copies are there when a wait for their group (LDGDEPBAR, DEPBAR) says so.
    """
    memory = device.latency * device.hertz
    ready: dict[str, float] = {}
    from_memory: set[str] = set()
    group, groups = 0.0, [0.0]
    clock = start = 0.0
    # The first iterations fill what is in flight. Copies of several rows take turns in waiting: hence a mean,
    # over a number that two, three and four rows divide.
    measured = 1 if streaming is None else 12
    for i in range(1 if streaming is None else 16):
        if i == 16 - measured:
            start = clock
        for instruction in body:
            family = instruction.family
            clock = max(
                [clock + 1, *(ready.get(r, 0.0) for r in (*instruction.sources, *instruction.results))]
            )
            latency = LATENCIES.get(family, ORDINARY_LATENCY)
            if family == "LDG":
                latency = _load_latency(instruction, streaming, from_memory, memory)
            elif family == "BAR":
                clock += latency
            elif family == "LDGSTS":
                group = max(group, clock + memory)
            elif family == "LDGDEPBAR":
                groups.append(max(groups[-1], group))
            elif family == "DEPBAR":
                pending = _groups_left_open(instruction)
                clock = max(clock, groups[max(0, len(groups) - 1 - pending)])
            is_loaded = family == "LDG" or any(r in from_memory for r in instruction.sources)
            for r in instruction.results:
                ready[r] = clock + latency
                (from_memory.add if is_loaded else from_memory.discard)(r)
    return (clock - start) / measured


def _groups_left_open(wait: Instruction) -> int:
    """Of DEPBAR.LE SB0, 0x2, {3,4}: it waits until at most two groups of copies are under way."""
    match = re.match(r"SB\d, (0x[0-9a-f]+)", wait.operands)
    if match is None:
        raise UnreadableListing(
            f"wait at {wait.address:#x}: expected SB<n>, 0x<n>, received {wait.operands!r}"
        )
    return int(match[1], 16)


def _load_latency(
    load: Instruction, streaming: Iterable[int] | None, from_memory: set[str], memory: float
) -> float:
    if streaming is None:
        return memory
    if any(r in from_memory for r in load.address_registers):
        return TABLE_LATENCY
    return memory if load.address in streaming else CACHED_LATENCY


_STREAMS: dict[tuple[str, str], tuple[str, str]] = {
    ("segment_sum", ""): ("partial", ""),
    ("modulated_layer_norm", "forward"): ("x branch", "x_new h"),
    ("modulated_layer_norm", "backward"): ("d_h d_x_new x_new branch", "d_x d_branch"),
    ("modulated_layer_norm_jvp", ""): ("x d_x branch d_branch", "d_x_new d_h"),
    ("gated_residual", "forward"): ("x branch", "out"),
    ("gated_residual", "backward"): ("d_out branch", "d_branch"),
    ("gated_residual_jvp", ""): ("d_x branch d_branch", "d_out"),
    ("swiglu", "forward"): ("gate up", "out"),
    ("swiglu", "backward"): ("d_out gate up", "d_gate d_up"),
    ("swiglu_jvp", ""): ("gate up d_gate d_up", "d_out"),
    ("transition_loss", "forward"): ("F x z dF_dt diffusion_target", ""),
    ("transition_loss", "backward"): ("F x z dF_dt diffusion_target", "d_F"),
    # Of the part named first; the others below.
    ("qk_norm_rope", "forward"): ("x", "first"),
    ("qk_norm_rope", "backward"): ("d_first x", "d_x"),
    ("qk_norm_rope_jvp", ""): ("d_x x", "d_first"),
}
"""Arguments that a kernel reads and writes once for each element, by op and direction."""
_SIZES = {"fp32": 4, "i32": 4, "bf16": 2, "fp16": 2}


def work_of(variant: Variant) -> Work | None:
    """What a variant has to do at `TOKENS` tokens; None of a kernel that device memory does not bind."""
    direction = variant.label.split(":")[0]
    form = direction if direction in ("forward", "backward") else ""
    names = _STREAMS.get((variant.op, form))
    if names is None or direction == "finish":
        return None
    reads, writes = (sum(_size(variant, name) for name in side.split()) for side in names)
    constants = variant.constants
    if variant.op == "segment_sum":
        # Three sums of width 1152 for each segment.
        blocks = TOKENS // SEGMENT * (3 * 1152 // constants["COLUMNS"])
        elements = constants["CHUNKS_AT_ONCE"] * constants["COLUMNS"]
        return Work(elements, reads, writes, -(-SEGMENT // ROWS // constants["CHUNKS_AT_ONCE"]), blocks)
    if variant.op.startswith("swiglu"):
        rows, columns = constants["ROWS"], constants["COLUMNS"]
        programs = -(-TOKENS // rows) * -(-constants["H"] // columns)
        return Work(rows * columns, reads, writes, 1, programs, has_loop=False)
    chunks = TOKENS // ROWS
    if variant.op == "transition_loss":
        elements = constants["CELLS"] * constants["L"]
        return Work(elements, reads, writes, max(1, ROWS * constants["C"] // elements), chunks)
    if variant.op.startswith("qk_norm_rope"):
        prefix = "" if form == "forward" else "d_"
        normed = [n for n in ("first", "second") if f"{prefix}{n}_ptr" in variant.types]
        parts = len(normed) + (f"{prefix}plain_ptr" in variant.types)
        # The plain part reads but one tensor.
        reads -= 0 if form == "forward" else _size(variant, "x") * (parts - len(normed)) / parts
        groups = -(-constants["N"] // constants["HEADS"])
        elements = constants["N"] * constants["H"] // groups
        return Work(elements, reads, writes, ROWS, chunks * groups * parts, parts)
    return Work(constants["D"], reads, writes, ROWS, chunks)


def _size(variant: Variant, name: str) -> int:
    """Bytes of an element of an argument, 0 of one that is None."""
    return _SIZES.get(variant.types.get(f"{name}_ptr", "").removeprefix("*"), 0)


def _loops_that_run(program: Program, work: Work, num_warps: int) -> list[tuple[Loop, int]]:
    """One loop for each part, with the iterations that the compiler has made one."""
    if not work.has_loop:
        if program.loops:
            raise UnreadableListing(f"expected no loop, found {len(program.loops)}")
        return []
    a_thread = work.elements / (32 * num_warps)
    family, size = ("STG", work.writes) if work.writes else ("LDG", work.reads)
    found: list[tuple[Loop, int]] = []
    for loop in program.loops:
        moved = sum(i.width for i in loop.body if i.family == family)
        if not moved:
            continue
        unrolled = max(1, round(moved / (size * a_thread)))
        # The loop behind an unrolled one is for what is left over.
        if unrolled > 1 or not found or found[-1][1] == 1:
            found.append((loop, unrolled))
    if len(found) != work.parts:
        raise UnreadableListing(
            f"expected {work.parts} loops that move {size:g} bytes for each of {work.elements} elements, "
            f"found {len(found)} among {len(program.loops)}"
        )
    return found


def _costs(body: Sequence[Instruction], device: Device) -> dict[str, float]:
    """Cycles of a scheduler, by what is busy: issue and each pipe. What all four share counts four times."""
    costs: defaultdict[str, float] = defaultdict(float)
    for instruction in body:
        family = instruction.family
        costs["issue"] += 1
        if family in _FLOAT:
            costs["float pipe"] += 128 / device.fp32_lanes
        elif family in _INTEGER_PRODUCT:
            costs["float pipe"] += 2
        elif family in _INTEGER:
            costs["integer pipe"] += 2
        elif family in _SPECIAL:
            costs["special functions"] += 8
        elif family == "SHFL":
            costs["load and store"] += 4
        elif family in _MEMORY:
            costs["load and store"] += 4 * max(1, instruction.width * 32 / 128)
    return costs


def _count(body: Sequence[Instruction], family: str) -> int:
    return sum(i.family == family for i in body)


HEADERS = (
    *("kernel", "instructions an element", "of the issue slots", "busiest pipe", "barriers", "warps an SM"),
    *("KB of reads in flight an SM", "of those needed", "waves", "bandwidth allowed", "first limit"),
)


def format_limits(table: dict[str, Limits], device: Device) -> str:
    """Markdown: one row a variant."""
    lines = [
        f"Static bounds on {device.name}: counted from machine code and data-sheet rates ({device.sms} SMs,",
        f"{device.hertz / 1e9:g} GHz, {device.bandwidth / 1e12:g} TB/s) at an assumed latency of "
        f"{device.latency * 1e6:g} us. Nothing here was measured.",
        "",
        f"| {' | '.join(HEADERS)} |",
        f"|---|{'---:|' * (len(HEADERS) - 2)}---|",
    ]
    for name, x in table.items():
        cells = (
            *(
                name,
                f"{x.instructions:.1f}",
                f"{x.issue:.0%}",
                f"{x.pipe} {x.pipe_share:.0%}",
                f"{x.barriers:.0f}",
            ),
            *(str(x.resident_warps), f"{x.bytes_in_flight / 1024:.0f}", f"{x.reach:.0%}", f"{x.waves:.1f}"),
            *(f"{x.room:.0%}", x.first),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
