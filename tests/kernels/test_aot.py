"""Every shipped kernel compiles for the GPUs it is meant for, and to what it is meant to.

Compilation happens in a process of its own, because this one may interpret kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.launches import record_launches
from tim_kernels import aot
from tim_kernels.bench.cases import cases
from tim_kernels.shipped import Variant, candidates, variants

ROOT = Path(__file__).parents[2]


def _compiled(*architectures: int, options: tuple[str, ...] = ()) -> dict[str, Any]:
    done = _python("-m", "tim_kernels.aot", "--json", *options, "--architectures", *map(str, architectures))
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def _python(*arguments: str, interpret: str = "0") -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": paths}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return _compiled(80, 90, options=("--common",))


def test_no_kernel_spills_traps_or_outgrows_its_record(table):
    assert table["variants"].keys() == {v.name for v in variants() if not v.is_seldom}
    assert aot.all_faults(table, aot.read_record()) == []


def test_the_table_describes_real_machine_code(table):
    """Guards the reading of the disassembly: no kernel can do without loads and registers."""
    for name, by_architecture in table["variants"].items():
        assert by_architecture.keys() == {"sm_80", "sm_90"}
        for found in (aot.Resources(**r) for r in by_architecture.values()):
            assert 16 <= found.registers <= 255, name
            assert 0 <= found.wide_loads <= found.loads > 0, name
    assert sum(r["sm_80"]["wide_stores"] for r in table["variants"].values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_every_kernel_works_everywhere(architecture):
    """Also those of few recipes, and sm_100."""
    table = _compiled(architecture)
    assert table["variants"].keys() == {v.name for v in variants()}
    assert aot.all_faults(table, aot.read_record()) == []


_COPIES = """
import re
from tim_kernels import aot
from tim_kernels.shipped import variants
(v,) = (v for v in variants() if v.name == %r)
for is_aligned in (True, False):
    found, code = aot.disassemble(v, 90, is_aligned=is_aligned)
    print(len(re.findall(r"\\bLDGSTS", code)), found.wide_loads, found.stack_bytes)
"""


def test_rows_of_16_bits_at_odd_addresses_are_not_copied_asynchronously():
    """Such a copy takes 32 bits at least, from an address that 4 divides: a view need not have one."""
    name = "modulated_layer_norm/forward: width 1152, stream bf16, h bf16, with residual"
    done = _python("-c", _COPIES % name)
    assert done.returncode == 0, done.stderr
    aligned, unaligned = (list(map(int, line.split())) for line in done.stdout.splitlines())
    assert aligned[0] > 0 and aligned[1] > 0 and unaligned == [0, 0, 0]


@pytest.mark.slow
def test_every_schedule_that_is_timed_can_run():
    done = _python("-m", "tim_kernels.aot", "--candidates", "--json")
    assert done.stdout, done.stderr
    table = json.loads(done.stdout)
    assert table["variants"].keys() == {v.name for v in candidates()} and table["architectures"] == [80, 90]
    assert aot.candidate_faults(table) == []


def test_a_launch_finds_what_was_compiled_ahead(tmp_path):
    """What fills Triton's cache for `bench --tune` has the key under which the launcher looks."""
    done = _python("-m", "tests.kernels.compiled_ahead", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"ahead": 2, "launched": 2}


GOOD = aot.Resources(
    registers=64,
    stack_bytes=0,
    shared_bytes=16,
    spills=0,
    loads=9,
    wide_loads=6,
    wide_stores=2,
    matrix=0,
    traps=0,
    atomics=0,
    narrow_offsets=0,
    specialised_lengths=0,
)
BAD = {
    "spill": ({"spills": 3}, "3 spills"),
    "stack": ({"stack_bytes": 8}, "8 bytes of stack"),
    "empty body": ({"loads": 0, "traps": 1}, "no working body: 0 loads, 1 traps"),
    "narrow loads": ({"wide_loads": 4}, "4 loads of 128 bits, expected at least 5"),
    "fewer wide loads": ({"wide_loads": 5}, "5 loads of 128 bits, on record 6"),
    "fewer wide stores": ({"wide_stores": 0}, "0 stores of 128 bits, on record 2"),
    "atomics": ({"atomics": 1}, "1 atomics: its sums would differ from run to run"),
    "more shared memory": ({"shared_bytes": 1041}, "1041 bytes of shared memory, on record 16"),
    "no tensor cores": ({"matrix": 0}, "no matrix instructions"),
    "32-bit rows": ({"narrow_offsets": 2}, "2 products in 32 bits on the way to an address"),
    "recompilation": ({"specialised_lengths": 1}, "1 lengths are not in do_not_specialize"),
    "growth": ({"registers": 73}, "73 registers, on record 64"),
    "shared memory": (
        {"shared_bytes": 227 * 1024 + 1},
        "232449 bytes of shared memory, ",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_each_fault_is_found(change, message):
    variant = Variant("op", "label", None, {}, {}, 4, wide_loads=5, matrix="matrix" in change)
    # What is a fault whatever is on record is looked for without one.
    recorded = GOOD if "on record" in message else None
    (fault,) = aot.faults(variant, 90, replace(GOOD, **change), recorded)
    assert fault.startswith("op/label, sm_90: ") and message in fault


def test_growth_within_the_margin_and_spills_beyond_the_two_architectures_pass():
    variant = Variant("op", "label", None, {}, {}, 4, wide_loads=5)
    grown = replace(GOOD, registers=72, shared_bytes=16 + 1024, wide_loads=7, wide_stores=3, matrix=1)
    assert aot.faults(variant, 90, grown, GOOD) == []
    assert aot.faults(variant, 100, replace(GOOD, spills=3), GOOD) == []
    assert aot.faults(variant, 90, replace(GOOD, registers=200), None) == []


WORSE = {
    "registers": 9,
    "shared_bytes": 200 * 1024 - 16,
    "wide_loads": -1,
    "wide_stores": -1,
    "matrix": -1,
}


def test_a_kernel_worse_than_on_record_is_found_for_every_shipped_variant():
    """Of the real record: a figure made a little worse is a fault, where the compiler is the record's."""
    record = aot.read_record()
    compared = Counter()
    for v in variants():
        recorded = aot.Resources(**record["variants"][v.name]["sm_90"])
        assert aot.faults(v, 90, recorded, recorded) == []
        for name, change in WORSE.items():
            then = getattr(recorded, name)
            if then + change < 0:
                continue
            worse = replace(recorded, **{name: then + change})
            assert any(f"on record {then}" in fault for fault in aot.faults(v, 90, worse, recorded)), v.name
            assert not any("on record" in fault for fault in aot.faults(v, 90, worse, None)), v.name
            compared[name] += 1
    assert all(compared[name] >= 6 for name in WORSE)


_MUTANTS = """
import json, sys
import triton
import triton.language as tl
from tim_kernels import aot
from tim_kernels.shipped import Variant

@triton.jit
def copy_kernel(x_ptr, out_ptr, row_ptr, row_size, D: tl.constexpr, HOW: tl.constexpr):
    column = tl.arange(0, 128)
    row = tl.load(row_ptr + tl.program_id(0) * 3)
    wide = row.to(tl.int64)
    x = tl.load(x_ptr + wide * D + column)
    at = wide * D
    if HOW == "dense rows":
        at = row * D
    elif HOW == "rows of a size":
        at = row * row_size
    elif HOW == "widened too late":
        at = (row * D).to(tl.int64)
    elif HOW == "cut":
        at = (wide * D).to(tl.int32)
    elif HOW == "counter":
        for i in range(row):
            tl.store(out_ptr + i * D + column, x)
    elif HOW == "add":
        tl.atomic_add(out_ptr + column, x)
    elif HOW == "lock":
        x += tl.atomic_cas(out_ptr.to(tl.pointer_type(tl.int32)), 0, 1)
    tl.store(out_ptr + at + tl.program_id(1) * 128 + column, x)

types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "row_ptr": "*i32", "row_size": "i32"}
found = {}
for how in sys.argv[1:]:
    variant = Variant("op", how, copy_kernel, types, {"D": 128, "HOW": how}, 4, 0)
    of, _ = aot.disassemble(variant, 90)
    found[how] = [of.narrow_offsets, of.atomics > 0]
print(json.dumps(found))
"""


def test_narrow_offsets_and_atomics_of_mutants_are_found(tmp_path):
    """The interpreter runs programs one by one: repeated runs agree there, whatever a kernel adds to."""
    narrow = ("dense rows", "rows of a size", "widened too late", "cut", "counter")
    # Triton reads a kernel's source from its file.
    script = tmp_path / "mutants.py"
    script.write_text(_MUTANTS)
    done = _python(str(script), "none", *narrow, "add", "lock")
    assert done.returncode == 0, done.stderr
    expected = {
        "none": [0, False],
        **{how: [1, False] for how in narrow},
        "add": [0, True],
        "lock": [0, True],
    }
    assert json.loads(done.stdout) == expected


def test_another_compiler_may_spill_a_few_registers_and_no_more():
    variant = Variant("op", "label", None, {}, {}, 4, wide_loads=5)
    few, many = (replace(GOOD, spills=n // 2, stack_bytes=n) for n in (16, 24))
    assert aot.faults(variant, 90, few, None, same_compiler=False) == []
    (fault,) = aot.faults(variant, 90, many, None, same_compiler=False)
    assert "12 spills, 24 bytes of stack" in fault


def test_variants_missing_from_the_record_or_left_in_it_are_faults():
    table = {
        "triton": "0",
        "architectures": list(aot.ARCHITECTURES),
        "variants": {v.name: {f"sm_{a}": asdict(GOOD) for a in aot.ARCHITECTURES} for v in variants()},
    }
    first = variants()[0].name
    record = {**table, "variants": {**table["variants"], "gone": {}}}
    del record["variants"][first]
    wrong = aot.all_faults(table, record)
    assert sum(f"{first}, sm_" in w and "not on record" in w for w in wrong) == len(aot.ARCHITECTURES)
    assert sum(w.startswith("gone: on record but not shipped") for w in wrong) == 1


def test_the_shipped_variants_are_those_that_the_ops_launch(device, monkeypatch):
    """Each variant is compared with real launches of its op: types, absent tensors, blocks and warps."""
    launches = record_launches(device, monkeypatch)
    for variant in variants():
        assert any(launch.is_of(variant) for launch in launches), variant.name
    for launch in launches:
        assert any(launch.is_of(variant) for variant in variants()), launch


def test_no_length_makes_triton_compile_again():
    """Packs of other numbers of tokens, segments and chunks find their kernels compiled."""
    done = _python("-m", "tests.kernels.dry_run")
    assert done.returncode == 0, done.stderr
    compilations = json.loads(done.stdout)
    kernels = {f"{v.kernel.fn.__module__}.{v.kernel.fn.__name__}" for v in variants()}
    assert compilations["first"].keys() == kernels
    assert compilations["all"] == compilations["first"]


@pytest.mark.slow
def test_a_compiled_model_would_hold_the_kernels_of_every_op_in_one_graph():
    """torch.compile on a GPU, up to its launches: another version of it may not follow our code."""
    done = _python("-m", "tests.kernels.traced")
    assert done.returncode == 0, done.stderr
    launched = json.loads(done.stdout)
    expected = {case.name: case.op.endswith("_jvp") for case in cases() if case.op != "varlen_attention"}
    assert launched.keys() == expected.keys()
    for name, is_tangent in expected.items():
        assert launched[name].count("jvp_kernel" if is_tangent else "forward_kernel") == 1, name
        assert ("backward_kernel" in launched[name]) != is_tangent, name


def test_compiling_under_the_interpreter_is_refused():
    done = _python("-m", "tim_kernels.aot", interpret="1")
    assert done.returncode == 2 and "unset it to compile kernels" in done.stderr
