"""The command line: one error a mistake, every launcher, and a run that is finished stays finished."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.ranks import RECIPE, engine_file, free_port, recipe, run_ranks, write_data
from tim_ds.trainer.cli import main
from tim_ds.trainer.engine import start_world, stop_world
from tim_ds.trainer.metrics import read_metrics
from tim_ds.trainer.run import train

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")


def clean_environment() -> dict[str, str]:
    """As in a user's shell: this test may itself run under a launcher's variables."""
    mine = {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
    }
    kept = {name: value for name, value in os.environ.items() if name not in mine}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    modules = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**kept, "PATH": path, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1"}


def write_recipe(folder: Path, shards: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(RECIPE.replace("SHARDS", str(shards)))
    return path


@pytest.fixture
def files(tmp_path: Path, shards: Path) -> tuple[Path, Path, Path]:
    """Recipe, engine file, run folder."""
    return write_recipe(tmp_path, shards), engine_file(tmp_path, 1), tmp_path / "run"


def test_the_deepspeed_launcher_trains_on_two_ranks_and_the_same_command_says_so(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    recipe_file, _, run = files
    arguments = [
        TRAIN,
        str(recipe_file),
        "--ds",
        str(ROOT / "ds_configs" / "cpu_smoke.json"),
        "--run",
        str(run),
    ]
    port = str(free_port())
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", port, *arguments, "train.steps=2"]
    launched = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=300)
    # Judged by what was written: gloo may abort a process while the interpreter shuts down.
    assert [line["step"] for line in read_metrics(run)] == [1, 2], launched.stderr[-3000:]
    assert (run / "export" / "export.json").exists(), launched.stderr[-3000:]
    assert "finished at step 2. Weights:" in launched.stdout
    # One rank finds the checkpoint of two as good as its own.
    codes = run_ranks(main, [*arguments[1:], "train.steps=2"], world_size=1, out=tmp_path / "again")
    assert codes == [0]
    assert "finished at step 2, nothing to do" in (tmp_path / "again" / "output_0.txt").read_text()


def test_mistakes_before_the_ranks_meet_are_one_line_and_exit_code_2(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_file, engine, run = files
    wrong_engine = tmp_path / "wrong.json"
    wrong_engine.write_text('{"zero_optimisation": {}}')
    common = ["--local_rank=0", "--run", str(run)]
    for arguments, message in (
        ([str(recipe_file), "train.stepz=3", "--ds", str(engine)], "train.stepz: unknown key"),
        ([str(tmp_path / "none.yaml"), "--ds", str(engine)], "the recipe cannot be read"),
        ([str(recipe_file), "--ds", str(wrong_engine)], "did you mean 'zero_optimization'?"),
    ):
        assert main([*arguments, *common]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ") and message in printed.err
        assert len(printed.err.splitlines()) == 1
    assert not run.exists()


@pytest.mark.parametrize("count", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_nobody_made_ranks_are_refused(
    files: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    count: str,
) -> None:
    """`srun python launch/train.py`: each would be a run of its own, in the same folder."""
    recipe_file, engine, run = files
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(count, "2")
    assert main([str(recipe_file), "--ds", str(engine), "--run", str(run)]) == 2
    assert f"{count} says that 2 processes were started together, but RANK" in capsys.readouterr().err
    assert not run.exists()


def _alone(folder: Path, shards: Path) -> dict[str, object]:
    """Mistakes that show when the run is assembled, in a process without a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    world = start_world()
    found: dict[str, object] = {
        # What start_world keeps from being compiled would be here.
        "shm_op": sys.modules["deepspeed.comm.comm"].cdb.shm_comm_op,
        "world": (world.rank, world.size),
    }
    zero1, zero3 = engine_file(folder, 1), engine_file(folder, 3)
    run = folder / "run"
    for name, overrides, engine in (
        ("width", ("model.text_dim=12", "data.text_encoder.width=12"), zero1),
        ("channels", ("model.in_channels=1", "data.autoencoder.factor=1"), zero1),
        ("budget", ("data.tokens_per_pack=5",), zero1),
        ("jvp", ("objective.derivative=jvp",), zero3),
        ("shards", (), zero1),
    ):
        try:
            train(recipe(folder / "none" if name == "shards" else shards, *overrides), run, engine, world)
        except ValueError as error:
            found[name] = (str(error), world.shared_error is error)
    run.mkdir(exist_ok=True)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            train(recipe(shards), run, zero1, world)
        except RuntimeError as error:
            found["lock"] = (str(error), world.shared_error is error)
    stop_world(world)
    found["stopped"] = not torch.distributed.is_initialized()
    return found


def test_what_does_not_go_together_is_refused_before_training(tmp_path: Path, shards: Path) -> None:
    (found,) = run_ranks(_alone, tmp_path, shards, world_size=1, out=tmp_path / "out")
    assert found["world"] == (0, 1) and found["stopped"]
    assert found["shm_op"] is None, "DeepSpeed would compile an operation when the process group starts"
    expected = {
        "width": "model.text_dim: 12, but the text states in",
        "channels": "model.in_channels: 1, but the latents in",
        "budget": "data.tokens_per_pack: sample 4, the largest, has 9 tokens",
        "jvp": "objective.derivative: 'jvp' cannot pass the hooks of ZeRO stage 3",
        "shards": "no index; prepare the data",
        "lock": "another process is training there",
    }
    for name, message in expected.items():
        text, is_shared = found[name]
        assert message in text and is_shared, (name, text)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_error_of_one_rank_is_told_with_its_number(tmp_path: Path) -> None:
    """Many samples are damaged after the index was built: the rank that reads them stops."""
    shards = write_data(tmp_path / "shards")
    shard = shards / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    middle = len(content) // 2
    content[2048:middle] = bytes(middle - 2048)
    shard.write_bytes(bytes(content))
    codes = run_ranks(
        _main_with, tmp_path, write_recipe(tmp_path, shards), world_size=1, out=tmp_path / "out", timeout_s=60
    )
    assert codes == [2]
    assert "error: " in (tmp_path / "out" / "output_0.txt").read_text()


def _main_with(folder: Path, recipe_file: Path) -> int:
    return main([str(recipe_file), "--ds", str(engine_file(folder, 1)), "--run", str(folder / "run")])
