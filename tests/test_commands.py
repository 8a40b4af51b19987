"""How every command line ends: what the user can put right, and a reader of the output who leaves."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from data_pipeline.command import READER_LEFT, USER_ERROR, command

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "launch" / "recipes" / "handwriting_tim.yaml")

MISTAKES = {
    "launch.train": ["nowhere.yaml", "--ds", "nowhere.json", "--run", "run"],
    "launch.sample": ["--export", "nowhere", "--prompt", "a three", "--size", "8x8", "--out", "out"],
    "launch.evaluate": ["nfe", "nowhere", "--data", "nowhere", "--out", "out"],
    "launch.first_light": ["--only", "nothing"],
    "tim_ds.config.check": ["nowhere.yaml"],
    "tim_ds.compat.__main__": ["import", "nowhere.bin", "--out", "out"],
    "tim_ds.eval.compare": ["label=nowhere", "--out", "out"],
    "tim_ds.eval.protocols": ["imagenet", "nowhere"],
    "tim_ds.objective.derivative_error": ["nowhere"],
    "tim_ds.trainer.bench.__main__": ["--render", "nowhere.json"],
    "tim_ds.trainer.export": ["nowhere", "--out", "out"],
    "tim_ds.trainer.memory": [RECIPE, "--ds", "nowhere.json", "--gpus", "1"],
    "tim_ds.trainer.pieces": ["nowhere.yaml", "--ds", "nowhere.json", "--out", "out"],
    "tim_ds.trainer.post_hoc": ["nowhere", "--sigma-rel", "0.1"],
    "tim_ds.trainer.report": ["nowhere"],
    "tim_ds.trainer.scaling": [
        *("nowhere.yaml", "--ds", "nowhere.json", "--gpus", "1", "--mfu", "0.4", "--peak-tflops", "1"),
        *("--intra-gbs", "1", "--inter-gbs", "1", "--overlap", "0"),
    ],
    "data_pipeline.bench": ["resume", "nowhere"],
    "data_pipeline.handwriting": ["--out", "out", "--phrasings", "shouted"],
    "data_pipeline.handwriting_words": ["--rename", "five", "--out", "out"],
    "data_pipeline.index": ["nowhere"],
    "data_pipeline.inspect": ["nowhere"],
    "data_pipeline.prepare": ["nowhere", "--out", "out", "--autoencoder", "pixels", "--condition", "class"],
    "tim_kernels.aot": ["--architectures", "1"],
    "tim_kernels.bench.__main__": ["--append"],
}
"""A mistake on the command line of each."""


def commands() -> Iterator[str]:
    """Every module that is a command."""
    for package in ("launch", "tim_ds", "data_pipeline", "kernels/tim_kernels"):
        base = (ROOT / package).parent
        for path in sorted((ROOT / package).rglob("*.py")):
            if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8"):
                yield ".".join(path.relative_to(base).with_suffix("").parts)


def test_every_command_is_tried() -> None:
    assert set(commands()) == MISTAKES.keys() and len(MISTAKES) > 20


def main_of(name: str) -> Callable[..., int]:
    return importlib.import_module(name).main


@pytest.mark.parametrize("name", MISTAKES)
def test_what_the_user_can_put_right_ends_with_2_and_a_message(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *MISTAKES[name]])
    try:
        status = main_of(name)(*([] if name == "tim_kernels.aot" else [MISTAKES[name]]))
    except SystemExit as ended:
        status = ended.code
    printed, told = capsys.readouterr()
    assert status == USER_ERROR, told
    assert printed == "" and told.strip() and "Traceback" not in told
    assert [word for word in ("nowhere", "nothing", "shouted", "five", "1", "--out") if word in told]


@pytest.mark.parametrize("name", [name for name in MISTAKES if not name.startswith("tim_kernels")])
def test_every_command_ends_as_all_do(name: str) -> None:
    ends = command()(len)  # type: ignore[arg-type]  # only its code is looked at
    assert main_of(name).__code__ is ends.__code__


@command(ValueError)
def chatters(arguments: Sequence[str] | None = None) -> int:
    """Prints as much as it is told to; then, what else it is told."""
    count, *rest = arguments or ["0"]
    for _ in range(int(count)):
        print("a line of the table")
    if rest == ["exit"]:
        sys.exit(0)
    if rest:
        raise {"value": ValueError, "pipe": BrokenPipeError, "key": KeyError}[rest[0]](rest[0])
    return 1


@pytest.mark.parametrize("words", [["1"], ["100000"], ["1", "value"], ["1", "exit"]])
def test_a_reader_who_leaves_ends_a_command_without_a_word(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noticed while it prints, or with the last of what it printed."""
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patched, os.fdopen(writer, "w") as output:
        patched.setattr(sys, "stdout", output)
        assert chatters(words) == READER_LEFT
        # Nobody minds what is written later, by the interpreter at its end.
        print("more", file=output, flush=True)
    assert capsys.readouterr() == ("", "")


def test_other_endings_stay_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert chatters(["2"]) == 1 and capsys.readouterr() == (2 * "a line of the table\n", "")
    assert chatters(["0", "value"]) == USER_ERROR and capsys.readouterr() == ("", "error: value\n")
    with pytest.raises(KeyError):
        chatters(["0", "key"])
    # Of another pipe than the output.
    with pytest.raises(BrokenPipeError):
        chatters(["0", "pipe"])


def into_nobody(module: str, *words: str) -> tuple[int, str]:
    """Exit status, as a shell has it, and messages of a command whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            # argparse passes over what it cannot write at once, and ends with 0.
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )
    finally:
        os.close(writer)
    return done.returncode % 256 if done.returncode >= 0 else 128 - done.returncode, done.stderr


def test_a_process_ends_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert into_nobody("tim_ds.config.check", RECIPE) == (READER_LEFT, "")
    assert into_nobody("tim_ds.config.check", "--help") == (READER_LEFT, "")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["tim_kernels.aot", "tim_kernels.bench"])
def test_a_process_of_the_kernels_ends_so(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert into_nobody(module, "--help") == (READER_LEFT, "")
