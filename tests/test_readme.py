"""The commands that the READMEs show are ones that the programs take."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tim_ds.compat import __main__ as compat
from tim_ds.config import check
from tim_ds.config.load import load_recipe
from tim_ds.errors import TimError
from tim_ds.eval import cli, sample
from tim_ds.trainer import cli as training
from tim_ds.trainer.bench import __main__ as step_bench
from tim_ds.trainer.engine import read_engine_file

ROOT = Path(__file__).parents[1]
READMES = sorted(
    path for path in ROOT.rglob("README.md") if not any(part.startswith(".") for part in path.parts)
)
PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "launch/train.py": training.main,
    "launch/sample.py": sample.main,
    "launch/evaluate.py": cli.main,
    "tim_ds.compat": compat.main,
    "tim_ds.config.check": check.main,
    "tim_ds.trainer.bench": step_bench.main,
}


class Understood(TimError):
    """Raised in place of the work, once the arguments were taken."""


def commands() -> Iterator[tuple[Path, list[str]]]:
    """Every command line in the fenced blocks of the READMEs, continued lines joined."""
    for readme in READMES:
        for block in re.findall(r"^```\w*\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("python ", "deepspeed ")):
                    yield readme, shlex.split(line.replace("[section.key=value ...]", ""), comments=True)


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    found = next((i for i, word in enumerate(words) if word in PROGRAMS), None)
    return None if found is None else (words[found], words[found + 1 :])


COMMANDS = [
    pytest.param(*found, id=f"{readme.relative_to(ROOT)}: {' '.join(words)[:60]}")
    for readme, words in commands()
    if (found := program_of(words)) is not None
]


def test_commands_were_found_for_every_program() -> None:
    assert {parameter.values[0] for parameter in COMMANDS} == set(PROGRAMS)


@pytest.mark.parametrize(("program", "words"), COMMANDS)
def test_a_shown_command_is_taken(
    program: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def understood(*_: object, **__: object) -> None:
        raise Understood("the arguments are understood")

    def looked_at(recipe_file: str, overrides: list[str], engine_file: Path, *_: object, **__: object) -> int:
        load_recipe(recipe_file, overrides)
        read_engine_file(engine_file)
        print("the arguments are understood", file=sys.stderr)
        return 0

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(training, "start_world", understood)
    monkeypatch.setattr(training, "check", looked_at)
    monkeypatch.setattr(sample, "_sample", understood)
    monkeypatch.setattr(step_bench, "_run", understood)
    monkeypatch.setattr(step_bench, "_render", understood)
    monkeypatch.setattr(compat, "import_weights", understood)
    monkeypatch.setattr(compat, "export_weights", understood)
    for name, evaluation in cli.EVALUATIONS.items():
        monkeypatch.setitem(cli.EVALUATIONS, name, evaluation._replace(run=understood))
    words = [word.replace("RECIPE", "launch/recipes/t2i_xl.yaml") for word in words]
    if program == "tim_ds.config.check":
        files = [word for word in words if word.endswith(".yaml") and "*" not in word]
        overrides = [word for word in words if "=" in word]
        for file in files:
            load_recipe(file, overrides)
        return
    PROGRAMS[program](words)
    assert "the arguments are understood" in capsys.readouterr().err
