"""The order of measurement on a new GPU: parts that fail or hang cost no other its turn."""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tim_ds.trainer.bench.__main__ import main as step_bench
from tim_kernels.bench.__main__ import main as kernels_bench

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def first_light() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_light", ROOT / "launch" / "first_light.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_part_that_fails_or_hangs_costs_no_other_its_turn(first_light, tmp_path):
    # The second starts a process of its own, which has to end with it.
    hangs = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('child', child.pid, flush=True); time.sleep(60)"
    )
    found_both = "from importlib.util import find_spec as f; assert f('tim_ds') and f('tim_kernels')"
    codes = {"fails": "print('why'); raise SystemExit(3)", "hangs": hangs, "works": found_both}
    limits = {"fails": 30, "hangs": 3, "works": 60}
    chosen = [first_light.Part(name, ("-c", code), 1, limits[name], "x.json") for name, code in codes.items()]
    begin = time.monotonic()
    outcomes = first_light.run(chosen, tmp_path, 100.0)
    assert time.monotonic() - begin < 55
    assert [o.exit_code for o in outcomes] == [3, None, 0]
    log = (tmp_path / "log.txt").read_text()
    assert "why" in log and "== works: python -c" in log
    (child,) = re.findall(r"^child (\d+)$", log, re.MULTILINE)
    assert not _runs(int(child))
    rows = (tmp_path / "summary.md").read_text().splitlines()
    assert rows[2].startswith("| fails | failed (exit code 3) |")
    assert rows[3].startswith("| hangs | ended at its limit | 3 |")
    assert rows[4].startswith("| works | passed |")


def _runs(process: int) -> bool:
    """Whether it does; one that has ended and that nobody waits for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_without_time_no_part_is_begun(first_light, tmp_path):
    part = first_light.Part("one", ("-c", "raise SystemExit(1)"), 1, 9)
    (outcome,) = first_light.run([part], tmp_path, first_light.LEAST_SECONDS - 1)
    assert outcome.exit_code is None and "no time was left" in (tmp_path / "summary.md").read_text()


def test_every_part_is_a_command_that_this_repository_understands(first_light, tmp_path, monkeypatch, capsys):
    """Without a GPU both benchmarks read their options, measure nothing and say so; tests are there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(ROOT)
    found = {part.name: part for part in first_light.parts(tmp_path)}
    assert list(found)[:2] == ["trials", "parity"] and len(found) == len(first_light.parts(tmp_path))
    benchmarks = {"tim_kernels.bench": kernels_bench, "tim_ds.trainer.bench": step_bench}
    seen = []
    for part in found.values():
        assert part.expected_s <= part.limit_s
        for word in part.arguments:
            assert not word.startswith(("tests/", "launch/")) or (ROOT / word).exists(), word
        if part.arguments[1] in benchmarks:
            seen.append(part.name)
            assert benchmarks[part.arguments[1]](list(part.arguments[2:])) == 2, part.name
    assert seen == ["kernels", "tiles", "step", "compiled", "sizes"] and "othing" in capsys.readouterr().err
    assert sum(part.expected_s for part in found.values()) < 2000


def test_without_a_gpu_it_says_so_and_runs_nothing(first_light, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert first_light.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device here" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert first_light.main(["--list", "--only", "tiles", "step"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["tiles", "step"]
