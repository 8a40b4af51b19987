"""The launch scripts: what their commands print, write and refuse."""

from __future__ import annotations

import os
import re
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.networks import write_tiny_export
from tim_ds.eval import cli
from tim_ds.pipeline import TiMPipeline, read_settings

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("launch") / "export")


@pytest.fixture(scope="module")
def sample() -> Callable[[list[str]], int]:
    return runpy.run_path(str(ROOT / "launch" / "sample.py"))["main"]


class TestSample:
    def test_pictures_are_those_of_the_pipeline(
        self, export: Path, sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--export", str(export), "--prompt", "a three", "--prompt", "a one above a two"]
        words += [
            "--size",
            "8x8",
            "--size",
            "16x8",
            "--num",
            "2",
            "--steps",
            "3",
            "--cfg",
            "2",
            "--seed",
            "5",
        ]
        assert sample([*words, "--out", str(tmp_path / "out")]) == 0
        captions = ["a three", "a three", "a one above a two", "a one above a two"]
        expected = TiMPipeline.from_pretrained(export)(
            captions, ["8x8", "8x8", "16x8", "16x8"], num_steps=3, cfg_scale=2.0, seeds=5
        )
        paths = sorted((tmp_path / "out").glob("0*.png"))
        assert len(paths) == 4
        for path, image, caption, seed in zip(paths, expected.pixels, captions, range(5, 9), strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(path))[..., None], image)
            settings = read_settings(path)
            assert (settings["prompt"], settings["seed"], settings["nfe"]) == (caption, seed, 6)
        printed = capsys.readouterr().out
        assert all(str(path) in printed for path in (*paths, tmp_path / "out" / "grid.png"))
        assert "4 pictures, 6 network evaluations and" in printed and "ms each" in printed
        assert read_settings(tmp_path / "out" / "grid.png")["num_steps"] == 3

    def test_prompts_come_from_a_file(self, export: Path, sample: Any, tmp_path: Path) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a three\n\n  日本 \n", encoding="utf-8")
        words = ["--export", str(export), "--prompts-file", str(prompts), "--size", "8x8"]
        assert sample([*words, "--out", str(tmp_path / "out")]) == 0
        stored = [read_settings(path)["prompt"] for path in sorted((tmp_path / "out").glob("0*.png"))]
        assert stored == ["a three", "日本"]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--size", "9x8"], "nearest that fit: 8x8 or 12x8"),
            (["--size", "8x8", "--steps", "0"], "num_steps: expected at least 1, received 0"),
            (["--size", "8x8", "--size", "8x8"], "--size: expected 1, one a prompt, received 2"),
            (["--size", "8x8", "--num", "0"], "--num: expected at least 1, received 0"),
            (["--size", "8x8", "--cfg", "nan"], "sampler.cfg_scale: expected 0 or more, received nan"),
            (["--size", "8x8", "--device", "abacus"], "device: abacus: not usable here: "),
            (["--size", "8x8", "--device", "cuda:99"], "device: cuda:99: not usable here: "),
        ],
    )
    def test_bad_requests_write_nothing(
        self,
        export: Path,
        sample: Any,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        words: list[str],
        message: str,
    ) -> None:
        out = tmp_path / "out"
        assert sample(["--export", str(export), "--prompt", "a", *words, "--out", str(out)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err and captured.err.startswith("error: ")
        assert not out.exists()

    def test_empty_prompt_files_and_missing_exports_are_refused(
        self, export: Path, sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "empty.txt").write_text("\n \n")
        out = ["--size", "8x8", "--out", str(tmp_path / "out")]
        assert sample(["--export", str(export), "--prompts-file", str(tmp_path / "empty.txt"), *out]) == 2
        assert "expected at least one prompt, received none" in capsys.readouterr().err
        assert sample(["--export", str(export), "--prompts-file", str(tmp_path / "no.txt"), *out]) == 2
        assert "no.txt: cannot be read" in capsys.readouterr().err
        assert sample(["--export", str(tmp_path / "none"), "--prompt", "a", *out]) == 2
        assert "none: not there; expected an export folder, a run" in capsys.readouterr().err

    def test_a_folder_that_cannot_be_written_is_refused_before_any_picture_is_made(
        self,
        export: Path,
        sample: Any,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(TiMPipeline, "__call__", lambda *_, **__: pytest.fail("sampled"))
        words = ["--export", str(export), "--prompt", "a", "--size", "8x8", "--out"]
        (tmp_path / "file").touch()
        for out in (tmp_path / "file", tmp_path / "file" / "inside"):
            assert sample([*words, str(out)]) == 2
            assert f"{tmp_path / 'file'} is not a folder" in capsys.readouterr().err
        monkeypatch.setattr("tim_ds.pipeline.files.os.access", lambda path, mode: False)
        assert sample([*words, str(tmp_path / "new" / "deeper")]) == 2
        assert f"{tmp_path} cannot be written to" in capsys.readouterr().err

    def test_an_evaluation_too_refuses_such_a_folder_before_any_picture_is_made(
        self, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").touch()
        assert cli.main(["nfe", str(export), "--data", "none", "--out", str(tmp_path / "file")]) == 2
        assert f"{tmp_path / 'file'} is not a folder" in capsys.readouterr().err

    def test_pictures_are_not_overwritten(
        self, export: Path, sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--export", str(export), "--prompt", "a", "--size", "8x8", "--out", str(tmp_path)]
        (tmp_path / "grid.png").write_bytes(b"mine")
        assert sample(words) == 2
        assert "grid.png: not a picture that can be read" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
        assert (tmp_path / "grid.png").read_bytes() == b"mine"


def test_evaluate_runs_as_a_script_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "evaluate.py"), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "nfe" in done.stdout


class TestQuickstart:
    """The script itself, with recorders in place of `python` and `deepspeed`."""

    @pytest.fixture
    def start(self, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
        root = tmp_path / "repository"
        (root / "launch").mkdir(parents=True)
        (root / "launch" / "quickstart.sh").write_bytes((ROOT / "launch" / "quickstart.sh").read_bytes())
        programs = tmp_path / "programs"
        programs.mkdir()
        for name in ("python", "deepspeed"):
            program = programs / name
            program.write_text(
                "#!/bin/sh\n"
                f'echo "$PWD: {name} $*" >> {tmp_path}/record\n'
                'case "$*" in *"${FAIL:-nothing}"*) exit 3;; esac\n'
            )
            program.chmod(0o755)

        def run(
            *, path: str = f"{programs}:/usr/bin:/bin", **environment: str
        ) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["bash", str(root / "launch" / "quickstart.sh")],
                cwd="/",
                env={"PATH": path, **environment},
                capture_output=True,
                text=True,
                timeout=60,
            )

        return run

    def test_runs_every_stage_from_the_repository_root(self, start: Any, tmp_path: Path) -> None:
        with socket.socket() as other_run:
            other_run.bind(("127.0.0.1", 0))
            other_run.listen()
            taken = other_run.getsockname()[1]
            done = start(PORT=str(taken))
        assert done.returncode == 0, done.stderr
        flow_port, tim_port = (int(found) for found in re.findall(r"--master_port (\d+)", done.stdout))
        assert taken < flow_port < tim_port
        root = tmp_path / "repository"

        def train(port: int, name: str) -> str:
            return (
                f"deepspeed --num_gpus 1 --master_port {port} launch/train.py launch/recipes/{name}.yaml "
                f"--ds ds_configs/cpu_smoke.json --run runs/{name} data.shards=runs/handwriting"
            )

        commands = [
            "python -m data_pipeline.handwriting --out runs/handwriting",
            train(flow_port, "handwriting_flow"),
            train(tim_port, "handwriting_tim"),
            "python launch/evaluate.py nfe runs/handwriting_flow/export --label flow matching"
            " --data runs/handwriting --out runs/handwriting_nfe",
            "python launch/evaluate.py nfe runs/handwriting_tim/export"
            " --baseline runs/handwriting_flow/export"
            " --label TiM --baseline-label flow matching --data runs/handwriting"
            " --out runs/handwriting_nfe",
        ]
        record = (tmp_path / "record").read_text().splitlines()
        # The two trainings run side by side, and the baseline is scored beside the longer one.
        assert sorted(record) == sorted(f"{root}: {command}" for command in commands)
        assert record[0].endswith(commands[0]) and record[-1].endswith(commands[-1])
        places = [record.index(f"{root}: {commands[i]}") for i in (1, 3)]
        assert places == sorted(places)
        # Each is printed as it would be typed, and the end says where to look.
        for command in commands:
            typed = command.replace("flow matching", "flow\\ matching")
            assert f"$ {typed}\n" in done.stdout
        for place in (
            "table.md",
            "quality.png",
            "results.json",
            "tensorboard --logdir runs",
            "launch/sample.py",
        ):
            assert place in done.stdout.split("== done")[1]

    def test_settings_come_from_the_environment(self, start: Any, tmp_path: Path) -> None:
        assert start(RUNS="/data/my runs", PROCESSES="2", ENGINE="mine.json").returncode == 0
        record = (tmp_path / "record").read_text()
        assert re.search(r"deepspeed --num_gpus 2 --master_port \d+ launch/train.py", record)
        assert "--ds mine.json --run /data/my runs/handwriting_tim" in record
        assert "runs/handwriting_tim " not in record.replace("/data/my runs", "")

    @pytest.mark.parametrize("failing", ["data_pipeline.handwriting", "handwriting_tim.yaml"])
    def test_stops_at_the_first_failure(self, start: Any, tmp_path: Path, failing: str) -> None:
        done = start(FAIL=failing)
        assert done.returncode == 3
        assert "--baseline" not in (tmp_path / "record").read_text()
        assert "== done" not in done.stdout

    def test_says_why_the_baseline_failed(self, start: Any, tmp_path: Path) -> None:
        done = start(FAIL="handwriting_flow.yaml")
        assert done.returncode == 1
        assert "its whole output is in runs/handwriting_flow.log" in done.stderr
        assert "launch/evaluate.py" not in (tmp_path / "record").read_text()

    def test_a_failure_ends_the_baseline(self, start: Any, tmp_path: Path) -> None:
        begun, ended = tmp_path / "begun", tmp_path / "ended"
        (tmp_path / "programs" / "deepspeed").write_text(
            "#!/bin/sh\n"
            'case "$*" in *handwriting_tim.yaml*)\n'
            f"    while [ ! -f {begun} ]; do sleep 0.02; done; exit 3;;\n"
            "esac\n"
            "sleep 30 & sleeper=$!\n"
            f"trap 'kill $sleeper; touch {ended}; exit' TERM\n"
            f"touch {begun}; wait\n"
        )
        assert start().returncode == 3
        deadline = time.monotonic() + 10
        while not ended.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ended.exists()

    def test_says_what_to_install(self, start: Any) -> None:
        done = start(path="/usr/bin:/bin")
        assert done.returncode == 1
        assert "run 'make quickstart', which installs it" in done.stderr
