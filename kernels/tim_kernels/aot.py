"""Ahead-of-time compilation of every shipped kernel, on a machine with or without a GPU.

    python -m tim_kernels.aot            compile, print the table, exit 1 if something is wrong
    python -m tim_kernels.aot --write    and record the table in kernels/results/resources.json
    python -m tim_kernels.aot --json     print it as JSON
    python -m tim_kernels.aot --common   leave out what few recipes launch
    python -m tim_kernels.aot --candidates   the same for what `bench --tune` times, sm_80 and sm_90
    python -m tim_kernels.aot --limits   what the machine code allows of a device's bandwidth (limits.py)

Compiles for sm_80 (A100), sm_90 (H100, H200) and sm_100 (B200) with the ptxas inside Triton and reads
registers, stack and machine code with the cuobjdump and nvdisasm beside it. Needs a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tim_kernels.offsets import narrow_offsets

if TYPE_CHECKING:
    from tim_kernels.limits import Limits
    from tim_kernels.shipped import Variant

ARCHITECTURES = (80, 90, 100)
WITHOUT_SPILLS = (80, 90)
"""Architectures on which a spill is a fault; on the others it is on record."""
STACK_MARGIN = 16
"""Bytes of stack a thread that another Triton than the record's may need: the kernels are tuned for one."""
CANDIDATE_STACK = 96
"""Bytes of stack a thread that a schedule which is timed, and not shipped, may need: some tiles on sm_80."""
REGISTER_MARGIN = 8
"""Registers a thread by which a kernel may grow over the record; 8 is the unit in which they are allotted."""
SHARED_MARGIN = 1024
"""Bytes of shared memory by which a kernel may grow over the record: room for a few more sums of a row."""
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may have."""
RECORD = Path(__file__).parents[1] / "results" / "resources.json"

_LOADS = ("LDG", "LDGSTS", "UBLKCP", "UTMALDG")
_ATOMICS = ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDAS")
_MATRIX = ("HMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "OMMA")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs, a thread or a program, and what its machine code holds."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    spills: int
    loads: int
    wide_loads: int
    """Loads of 128 bits a thread, asynchronous copies included."""
    wide_stores: int
    matrix: int
    traps: int
    atomics: int
    """In PTX or machine code, whichever holds more: sums in the order in which programs happen to run."""
    narrow_offsets: int
    """Products in 32 bits on the way to an address, which would wrap beyond 2^31 elements (`offsets.py`)."""
    specialised_lengths: int
    """Run-time lengths (num_*) on whose value Triton would compile anew."""


def disassemble(variant: Variant, architecture: int, *, is_aligned: bool = True) -> tuple[Resources, str]:
    """Compile for one architecture; also the machine code, as nvdisasm prints it.

    Args:
        is_aligned: whether 16 divides addresses and strides; of views it may not.
    Raises:
        RuntimeError: if Triton was imported for interpretation.
    """
    return _read(*_compile(variant, architecture, is_aligned=is_aligned))


def _compile(
    variant: Variant, architecture: int, *, is_aligned: bool = True
) -> tuple[dict[str, Any], int, int]:
    """Every stage of the code, bytes of shared memory, and how many lengths Triton would specialise on."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(variant.kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: start a process without it to compile kernels")
    names = variant.kernel.arg_names
    unspecialised = {p.name for p in variant.kernel.params if p.do_not_specialize}
    signature = {n: "constexpr" if n in variant.constants else variant.types[n] for n in names}
    divided = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or (signature[n].startswith("i") and n not in unspecialised)
    }
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=variant.constants,
        attrs=divided if is_aligned else {},  # type: ignore[arg-type]  # keys are paths of indices
    )
    options = {"num_warps": variant.num_warps, "maxnreg": variant.max_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    lengths = {n for n in names if n.startswith("num_")} - unspecialised
    return compiled.asm, compiled.metadata.shared, len(lengths)


def fill_cache(variant: Variant, architecture: int) -> None:
    """Compile through Triton's launcher, so that a launch on such a device finds it in Triton's cache.

    Neither needs nor touches a device, and is for a process that uses none: the driver is replaced.
    """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    driver.set_active(_NoDevice(GPUTarget("cuda", architecture, 32)))  # type: ignore[arg-type]  # a stand-in
    dtypes = {"*fp32": torch.float32, "*bf16": torch.bfloat16, "*i32": torch.int32}
    given = dict(variant.constants)
    for name, kind in variant.types.items():
        # Memory and strides that 16 divides, as `disassemble` has them.
        given[name] = torch.empty(16, dtype=dtypes[kind]) if kind in dtypes else 16 if kind == "i32" else 1.0
    options = {"num_warps": variant.num_warps, "maxnreg": variant.max_registers}
    arguments = [given[name] for name in variant.kernel.arg_names]
    variant.kernel.run(*arguments, grid=(1,), warmup=True, **options)


@dataclass(frozen=True)
class _NoDevice:
    """What Triton's launcher asks of a driver before it compiles."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def faults(
    variant: Variant,
    architecture: int,
    found: Resources,
    recorded: Resources | None,
    *,
    same_compiler: bool = True,
) -> list[str]:
    """What is wrong with a compiled kernel; `recorded` is None where there is nothing to compare with."""
    wrong = []
    if found.traps or not found.loads:
        # A compilation that Triton calls a success may be empty.
        wrong.append(f"no working body: {found.loads} loads, {found.traps} traps")
    allowed_stack = 0 if same_compiler else STACK_MARGIN
    spills = found.stack_bytes > allowed_stack or (same_compiler and found.spills)
    if architecture in WITHOUT_SPILLS and spills:
        wrong.append(f"{found.spills} spills, {found.stack_bytes} bytes of stack; expected none")
    if found.shared_bytes > SHARED_LIMIT[architecture]:
        wrong.append(
            f"{found.shared_bytes} bytes of shared memory, a program has {SHARED_LIMIT[architecture]}"
        )
    if found.wide_loads < variant.wide_loads:
        wrong.append(f"{found.wide_loads} loads of 128 bits, expected at least {variant.wide_loads}")
    if variant.matrix and not found.matrix:
        wrong.append("no matrix instructions")
    if found.atomics:
        wrong.append(f"{found.atomics} atomics: its sums would differ from run to run")
    if found.narrow_offsets:
        wrong.append(f"{found.narrow_offsets} products in 32 bits on the way to an address")
    if found.specialised_lengths:
        wrong.append(f"{found.specialised_lengths} lengths are not in do_not_specialize")
    if recorded is not None:
        wrong += _regressions(found, recorded)
    return [f"{variant.name}, sm_{architecture}: {text}" for text in wrong]


def _regressions(found: Resources, recorded: Resources) -> list[str]:
    """What is worse than on record; both by one compiler, so that what differs is the kernel."""
    wrong = []
    for name, what, margin in (
        ("registers", "registers", REGISTER_MARGIN),
        ("shared_bytes", "bytes of shared memory", SHARED_MARGIN),
    ):
        now, then = getattr(found, name), getattr(recorded, name)
        if now > then + margin:
            wrong.append(f"{now} {what}, on record {then}, at most {margin} more expected")
    for name, what in (
        ("wide_loads", "loads of 128 bits"),
        ("wide_stores", "stores of 128 bits"),
        ("matrix", "matrix instructions"),
    ):
        now, then = getattr(found, name), getattr(recorded, name)
        if now < then:
            wrong.append(f"{now} {what}, on record {then}")
    return wrong


def compile_all(architectures: Sequence[int], compiled: Sequence[Variant]) -> dict[str, Any]:
    """The table: compiler version, architectures, and the resources of each variant by architecture."""
    import triton

    # Triton compiles in this thread; its tools list the code in processes of their own, on the other cores.
    with ThreadPoolExecutor() as pool:
        read = {
            v.name: {f"sm_{a}": pool.submit(_read, *_compile(v, a)) for a in architectures} for v in compiled
        }
        table = {
            name: {a: asdict(found.result()[0]) for a, found in by_architecture.items()}
            for name, by_architecture in read.items()
        }
    return {"triton": triton.__version__, "architectures": list(architectures), "variants": table}


def compile_limits(architecture: int) -> dict[str, Limits]:
    """Static bounds of every variant that device memory binds, on the device of `limits.DEVICES`.

    Raises:
        UnreadableListing: if a listing is not what `sass.py` can read; the message names the variant.
    """
    from tim_kernels import limits, sass
    from tim_kernels.shipped import variants

    table = {}
    for v in variants():
        work = limits.work_of(v)
        if work is None:
            continue
        found, code = disassemble(v, architecture)
        try:
            table[v.name] = limits.limits_of(
                sass.parse(code),
                work,
                limits.DEVICES[architecture],
                registers=found.registers,
                shared_bytes=found.shared_bytes,
                num_warps=v.num_warps,
            )
        except sass.UnreadableListing as error:
            raise sass.UnreadableListing(f"{v.name}, sm_{architecture}: {error}") from error
    return table


def read_record(path: Path = RECORD) -> dict[str, Any]:
    return json.loads(path.read_text())


def all_faults(table: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Faults of a whole table. It is compared with the record where the same Triton made both; another may
    spill a few registers."""
    from tim_kernels.shipped import variants

    wrong = []
    comparable = table["triton"] == record["triton"]
    for v in variants():
        if v.is_seldom and v.name not in table["variants"]:
            continue
        for a in table["architectures"]:
            found = Resources(**table["variants"][v.name][f"sm_{a}"])
            old = record["variants"].get(v.name, {}).get(f"sm_{a}")
            if old is None:
                wrong.append(f"{v.name}, sm_{a}: not on record; run python -m tim_kernels.aot --write")
            recorded = Resources(**old) if old and comparable else None
            wrong += faults(v, a, found, recorded, same_compiler=comparable)
    stale = record["variants"].keys() - {v.name for v in variants()}
    wrong += [f"{name}: on record but not shipped; run python -m tim_kernels.aot --write" for name in stale]
    return wrong


def candidate_faults(table: dict[str, Any]) -> list[str]:
    """Faults of a table of `shipped.candidates`, of which nothing is on record: what could not run."""
    from tim_kernels.shipped import candidates

    wrong = []
    for v in candidates():
        for a in table["architectures"]:
            found = Resources(**table["variants"][v.name][f"sm_{a}"])
            if found.stack_bytes <= CANDIDATE_STACK:
                # It costs time, and time is what is asked.
                found = replace(found, spills=0, stack_bytes=0)
            wrong += faults(v, a, found, None)
    return wrong


def format_table(table: dict[str, Any]) -> str:
    """Markdown: one row a variant, each figure for the architectures in turn."""
    lines = [
        f"Compiled with Triton {table['triton']} for {', '.join(f'sm_{a}' for a in table['architectures'])}.",
        "",
        "| kernel | registers | shared bytes | spills | 128-bit loads of all | matrix instructions |",
        "|---|---|---|---|---|---|",
    ]
    for name, by_architecture in table["variants"].items():
        rows = [Resources(**by_architecture[f"sm_{a}"]) for a in table["architectures"]]
        cells = [
            " / ".join(str(r.registers) for r in rows),
            " / ".join(str(r.shared_bytes) for r in rows),
            " / ".join(str(r.spills) for r in rows),
            " / ".join(f"{r.wide_loads} of {r.loads}" for r in rows),
            " / ".join(str(r.matrix) for r in rows),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _read(asm: dict[str, Any], shared_bytes: int, specialised_lengths: int) -> tuple[Resources, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", cubin)
        # Without the analysis of data flow, which takes a third of the time and changes no line of it.
        code = _run(tools / "nvdisasm", "-c", "-ndf", cubin)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK, received {usage[:500]!r}")
    # An instruction line: /*0a30*/  @!P0 LDG.E.128.CONSTANT R4, ...
    opcodes = Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code))
    # Checks of tensor memory that ptxas adds for sm_100, one trap each in a function of its own.
    guardrails = len(re.findall(r"^\$__internal\S*_guardrail_trap_\S*:", code, re.MULTILINE))
    # Bits of tensor memory that ptxas takes and hands back on sm_100, in shared memory: no sums.
    allocations = opcodes["ATOMS.OR"] + opcodes["ATOMS.AND"]
    written = len(re.findall(r"^\s*(?:@!?%\w+\s+)?(?:atom|red)\.", asm["ptx"], re.MULTILINE))

    def count(families: tuple[str, ...], suffix: str = "") -> int:
        return sum(
            n for op, n in opcodes.items() if op.split(".")[0] in families and suffix in [*op.split("."), ""]
        )

    found = Resources(
        registers=int(match[1]),
        stack_bytes=int(match[2]),
        shared_bytes=shared_bytes,
        spills=count(("STL", "LDL")),
        loads=count(_LOADS),
        wide_loads=count(_LOADS, "128"),
        wide_stores=count(("STG",), "128"),
        matrix=count(_MATRIX),
        traps=count(("BPT",)) - guardrails,
        atomics=max(written, count(_ATOMICS) - allocations),
        narrow_offsets=len(narrow_offsets(asm["ttir"])),
        specialised_lengths=specialised_lengths,
    )
    return found, code


def _run(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tim_kernels.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="record the table in kernels/results")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--common", action="store_true", help="leave out what few recipes launch")
    parser.add_argument(
        "--candidates", action="store_true", help="compile what `bench --tune` times, for sm_80 and sm_90"
    )
    parser.add_argument(
        "--limits", action="store_true", help="print static bounds instead, for sm_90 or sm_80"
    )
    parser.add_argument(
        "--architectures",
        type=int,
        nargs="+",
        choices=ARCHITECTURES,
        default=list(ARCHITECTURES),
        help="compile for these alone",
    )
    arguments = parser.parse_args()
    if arguments.write and arguments.architectures != list(ARCHITECTURES):
        parser.error("--write records all architectures")
    if arguments.write and arguments.common:
        parser.error("--write records all variants")
    if arguments.write and not RECORD.parent.is_dir():
        parser.error("--write: the record is kernels/results of a checkout, and this is an installed copy")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("TRITON_INTERPRET is set: unset it to compile kernels", file=sys.stderr)
        return 2
    if arguments.limits:
        from tim_kernels import limits

        chosen = [90] if arguments.architectures == list(ARCHITECTURES) else arguments.architectures
        if arguments.write or arguments.json or not set(chosen) <= limits.DEVICES.keys():
            parser.error(f"--limits goes with --architectures of {sorted(limits.DEVICES)} alone")
        print("\n\n".join(limits.format_limits(compile_limits(a), limits.DEVICES[a]) for a in chosen))
        return 0
    from tim_kernels.shipped import candidates, variants

    if arguments.candidates:
        if arguments.write:
            parser.error("--candidates: nothing of it goes on record")
        chosen = arguments.architectures
        table = compile_all(WITHOUT_SPILLS if chosen == list(ARCHITECTURES) else chosen, candidates())
        wrong = candidate_faults(table)
        print(json.dumps(table) if arguments.json else format_table(table))
        print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
        return 1 if wrong else 0
    chosen = [v for v in variants() if not (arguments.common and v.is_seldom)]
    table = compile_all(arguments.architectures, chosen)
    if arguments.write:
        RECORD.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table) if arguments.json else format_table(table))
    # An installed copy has no record; compared with itself, a table still shows what is wrong in it.
    wrong = all_faults(table, read_record() if RECORD.exists() else table)
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    # Whoever reads the table may leave (`... | head`); then this ends as any program of a pipe does.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
