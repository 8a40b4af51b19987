"""`launch/slurm/train.sbatch` under Slurm itself: two nodes that are namespaces of this machine, on CPU. What
cannot be seen here: GPUs, NCCL, PMIx, Slurm's accounting, and cgroups as keepers of processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.cluster import (
    SLURM,
    Slurm,
    environment_of,
    needs,
    ranks_of,
    slurm_cluster,
    within,
)
from tests.trainer.test_launch import ROOT, write_recipe
from tim_ds.trainer.checkpoint import find_checkpoints
from tim_ds.trainer.metrics import read_metrics
from tim_ds.trainer.signals import STOPPED

pytestmark = [pytest.mark.slow, needs(SLURM)]

ENGINE = ROOT / "ds_configs" / "cpu_smoke.json"
ENDLESS = "train.steps=1000000"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "slurm" in request.fixturenames:
        slurm = request.getfixturevalue("slurm")
        slurm.run("scancel", "--user=root")
        slurm.run("scancel", "--user=root", "--signal=KILL", "--full")
        assert within(90, lambda: not slurm.run("squeue", "--noheader"))


def _steps(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run)] if (run / "metrics.jsonl").exists() else []


def _trains(slurm: Slurm, job: str, run: Path, after: int = 0) -> None:
    assert within(300, lambda: _steps(run)[-1:] > [after]), slurm.log(job)


def _saved(run: Path) -> int:
    """The step of the newest checkpoint, which is that of the last line, too."""
    step = find_checkpoints(run / "checkpoints")[0].step
    assert _steps(run) == list(range(1, step + 1))
    return step


def test_the_job_is_told_before_its_time_ends_and_goes_on_until_it_is_finished(
    slurm: Slurm, tmp_path: Path, shards: Path
) -> None:
    recipe, run = write_recipe(tmp_path, shards), tmp_path / "run"
    text = recipe.read_text()
    recipe.write_text(text.replace("steps: 4", "steps: 1000000"))
    # Slurm counts in minutes, and signals up to a minute early.
    job = slurm.submit(recipe, ENGINE, run, options=["--time=3", "--signal=USR1@75"])
    _trains(slurm, job, run)
    ranks = ranks_of(run)
    environments = [environment_of(pid) for pid in ranks.values()]
    assert [e["SLURMD_NODENAME"] for e in environments] == ["node1", "node2"]
    assert {e["MASTER_ADDR"] for e in environments} == {"node1"}
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["0,1"] * 2, (
        "all of the node's, for each task"
    )
    assert [len(os.sched_getaffinity(pid)) for pid in ranks.values()] == [2, 2], "--cpus-per-task"
    told = slurm.comes_to(job, "PENDING", seconds=240)
    assert told["Restarts"] == "1"
    assert "SIGUSR1: the run stops" in slurm.log(job) and "stopped and saved; requeued" in slurm.log(job)
    assert "Slurm did not requeue it" not in slurm.log(job)
    stopped_at = _saved(run)
    recipe.write_text(text.replace("steps: 4", f"steps: {stopped_at + 2}"))
    # It would wait for two minutes; at once, the nodes still refuse what they have just ended.
    slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now+10")
    told = slurm.comes_to(job, "COMPLETED")
    assert told["Restarts"] == "1" and told["ExitCode"] == "0:0"
    assert f"finished at step {stopped_at + 2}" in slurm.log(job)
    assert _saved(run) == stopped_at + 2
    assert find_checkpoints(run / "checkpoints")[0].manifest["world_size"] == 2


def test_at_the_time_limit_what_was_saved_is_requeued(slurm: Slurm, tmp_path: Path, shards: Path) -> None:
    run = tmp_path / "run"
    # Slurm signals at the end alone, once with CONT, and then waits half a minute before it kills.
    options = ["--time=2", "--signal=CONT@1"]
    job = slurm.submit(write_recipe(tmp_path, shards), ENGINE, run, ENDLESS, options=options)
    _trains(slurm, job, run)
    told = slurm.comes_to(job, "PENDING")
    assert told["Restarts"] == "1" and "DUE TO TIME LIMIT" in slurm.log(job)
    assert _saved(run) > 0


def test_cancelled_it_saves_and_stays_away_and_an_array_requeues_one_element(
    slurm: Slurm, tmp_path: Path, shards: Path
) -> None:
    """Two jobs in a row of one run. The second has the number of the array itself."""
    recipe, run = write_recipe(tmp_path, shards), tmp_path / "run"
    array = slurm.submit(recipe, ENGINE, run, ENDLESS, options=["--array=0-1%1"])
    _trains(slurm, array, run)
    slurm.run("scancel", f"{array}_0")
    told = slurm.comes_to(f"{array}_0", "CANCELLED")
    assert "not requeued: Slurm has it as COMPLETING" in slurm.log(array)
    assert told["Restarts"] == "0"
    first = find_checkpoints(run / "checkpoints")[0].step
    _trains(slurm, array, run, after=first)
    assert slurm.job(f"{array}_1")["JobId"] == array
    slurm.run("scancel", "--signal=TERM", f"{array}_1")
    assert slurm.comes_to(f"{array}_1", "PENDING")["Restarts"] == "1"
    assert _saved(run) > first > 0
    told = slurm.job(f"{array}_0")
    assert (told["JobState"], told["Restarts"]) == ("CANCELLED", "0"), "what a user cancelled came back"


def test_a_job_that_must_not_be_requeued_says_so(slurm: Slurm, tmp_path: Path, shards: Path) -> None:
    """How a run is ended for good with all the time that it needs (launch/README.md)."""
    run = tmp_path / "run"
    job = slurm.submit(write_recipe(tmp_path, shards), ENGINE, run, ENDLESS)
    _trains(slurm, job, run)
    slurm.run("scontrol", "update", f"JobId={job}", "Requeue=0")
    slurm.run("scancel", "--signal=USR1", job)
    told = slurm.comes_to(job, "FAILED")
    assert told["ExitCode"] == f"{STOPPED}:0" and told["Restarts"] == "0"
    assert "Slurm did not requeue it; the same command continues the run" in slurm.log(job)
    assert _saved(run) > 0


def test_preempted_with_a_grace_time_it_saves_and_is_requeued(
    slurm: Slurm, tmp_path: Path, shards: Path
) -> None:
    run = tmp_path / "run"
    job = slurm.submit(write_recipe(tmp_path, shards), ENGINE, run, ENDLESS)
    _trains(slurm, job, run)
    slurm.run(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"
    )
    told = slurm.comes_to(job, "PENDING")
    assert told["Restarts"] == "1" and "SIGTERM: the run stops" in slurm.log(job)
    assert _saved(run) > 0


def test_signalled_while_python_starts_it_is_requeued(slurm: Slurm, tmp_path: Path, shards: Path) -> None:
    run = tmp_path / "run"
    job = slurm.submit(write_recipe(tmp_path, shards), ENGINE, run, ENDLESS)
    assert within(300, lambda: bool(ranks_of(run))), slurm.log(job)
    slurm.run("scancel", "--signal=TERM", job)
    assert slurm.comes_to(job, "PENDING")["Restarts"] == "1"
    assert "stopped before it began; requeued" in slurm.log(job)
    assert not run.exists()


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_a_killed_rank_is_named_and_the_job_comes_back_if_it_had_saved(
    slurm: Slurm, tmp_path: Path, shards: Path, with_checkpoint: bool
) -> None:
    run = tmp_path / "run"
    every = 5 if with_checkpoint else 1_000_000
    arguments = [ENDLESS, f"train.checkpoint.every_steps={every}", "--dead-after", "6"]
    job = slurm.submit(write_recipe(tmp_path, shards), ENGINE, run, *arguments)
    _trains(slurm, job, run)
    if with_checkpoint:
        assert within(300, lambda: bool(find_checkpoints(run / "checkpoints"))), slurm.log(job)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    killed = time.monotonic()
    assert within(60, lambda: not ranks_of(run)), slurm.log(job)
    # 6 s and up to 15; the rest is for a machine that has other work.
    assert time.monotonic() - killed < 6 + 15 + 15
    told = slurm.comes_to(job, "PENDING" if with_checkpoint else "FAILED")
    log = slurm.log(job)
    assert "error (rank 0): no sign of life for 6 s: rank 1 (process " in log and "on node2)" in log
    if with_checkpoint:
        assert told["Restarts"] == "1" and "; requeued" in log
    else:
        assert told["ExitCode"] == "137:0", (
            "128 and the number of the signal: the largest of the ranks' codes"
        )
        assert "ended with exit code 137 without a new checkpoint; not requeued" in log


def test_tasks_that_nobody_made_ranks_are_refused(slurm: Slurm, tmp_path: Path, shards: Path) -> None:
    """Each would be a run of its own, in the same folder."""
    command = [
        "python",
        "launch/train.py",
        write_recipe(tmp_path, shards),
        "--ds",
        ENGINE,
        "--run",
        tmp_path / "r",
    ]
    with pytest.raises(AssertionError, match="SLURM_STEP_NUM_TASKS says that 2 processes") as refused:
        slurm.run("srun", "--nodes=2", "--ntasks-per-node=1", *command)
    assert "exit code 2" in str(refused.value)
    assert not (tmp_path / "r").exists()


def test_a_node_that_is_switched_off_is_named_and_the_job_is_requeued(tmp_path: Path, shards: Path) -> None:
    recipe, run = write_recipe(tmp_path, shards), tmp_path / "run"
    with slurm_cluster(tmp_path / "slurm") as slurm:
        job = slurm.submit(
            recipe, ENGINE, run, ENDLESS, "train.checkpoint.every_steps=5", "--dead-after", "6"
        )
        _trains(slurm, job, run)
        assert within(300, lambda: bool(find_checkpoints(run / "checkpoints"))), slurm.log(job)
        slurm.cluster.cut("node2")
        slurm.cluster.end("node2")
        told = slurm.comes_to(job, "PENDING")
        assert told["Restarts"] == "1"
        log = slurm.log(job)
        assert "error (rank 0): no sign of life for 6 s: rank 1 (process " in log and "on node2)" in log
