from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.recipes import TEXT, recipe
from tim_ds.config.check import main
from tim_ds.config.load import parse_recipe
from tim_ds.config.recipe import recipe_hash

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(TEXT)
    return str(tmp_path / "small.yaml")


def test_output_is_the_resolved_recipe_under_its_hash(path: str, capsys: pytest.CaptureFixture[str]):
    assert main([path, "train.steps=11"]) == 0
    output = capsys.readouterr().out
    changed = recipe("train.steps=11")
    assert parse_recipe(output) == changed
    assert output.splitlines()[1] == f"# hash {recipe_hash(changed)}"
    assert output.splitlines()[2].startswith("# parameters ")


def test_projector_that_nothing_trains_is_mentioned(path: str, capsys: pytest.CaptureFixture[str]):
    assert main([path, "model.z_dim=8", "model.encoder_depth=1"]) == 0
    assert "nothing trains the projector" in capsys.readouterr().out
    assert main([path]) == 0
    assert "nothing trains" not in capsys.readouterr().out


def test_quiet_is_one_line_a_recipe(path: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--quiet", path, path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{path}: fine, ")


def test_wrong_recipe_fails_and_the_right_one_is_still_printed(path: str, capsys: pytest.CaptureFixture[str]):
    wrong = Path(path).with_name("wrong.yaml")
    wrong.write_text(TEXT.replace("depth", "dept"))
    assert main([str(wrong), path]) == 2
    captured = capsys.readouterr()
    assert f"{wrong}: wrong\n  model.dept: unknown key; did you mean 'depth'?" in captured.err
    assert parse_recipe(captured.out) == recipe()


def test_call_without_a_file_is_a_usage_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["train.steps=3"])
    assert caught.value.code == 2
    assert "no recipe file" in capsys.readouterr().err


def test_check_needs_neither_torch_nor_numpy():
    recipes = sorted(str(path) for path in (ROOT / "launch" / "recipes").glob("*.yaml"))
    assert recipes
    program = (
        "import sys\n"
        "from tim_ds.config.check import main\n"
        "status = main(['--quiet', *sys.argv[1:]])\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'transformers', 'webdataset', 'triton'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else status)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *recipes], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(recipes)
