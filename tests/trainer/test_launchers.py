"""Runs under each launcher, on CPU. What a machine may not have (hosts behind pdsh, Slurm) is stood in for
here by a script of a few lines that does what it does: it starts the same command for each host or task.
`test_ssh.py` and `test_slurm.py` have the programs themselves."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trainer.ranks import free_port
from tests.trainer.test_launch import ROOT, TRAIN, clean_environment, write_recipe
from tim_ds.trainer.checkpoint import find_checkpoints
from tim_ds.trainer.metrics import read_metrics
from tim_ds.trainer.signals import STOPPED

ENGINE = str(ROOT / "ds_configs" / "cpu_smoke.json")

PDSH = """#!/bin/bash
# pdsh -S -f 1024 -w host,host COMMAND: here every host is this one; %n is the number of the host.
while [ "$1" != -w ]; do shift; done
IFS=, read -ra hosts <<< "$2"
shift 2
for number in "${!hosts[@]}"; do
    bash -c "${*//%n/$number}" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""

SRUN = """#!/bin/bash
# srun OPTIONS COMMAND: two tasks; the second is signalled after the first step of the first job.
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 "$@" & pids+=($!)
done
if [ ! -e "$STATE/signalled" ]; then
    touch "$STATE/signalled"
    until [ -s "$RUN/metrics.jsonl" ] || ! kill -0 "${pids[1]}"; do sleep 0.05; done
    kill -USR1 "${pids[1]}"
fi
code=0
for pid in "${pids[@]}"; do wait "$pid"; this=$?; [ $this -gt $code ] && code=$this; done
exit $code
"""

SCONTROL = """#!/bin/bash
case $1 in
    show) echo 127.0.0.1 ;;
    requeue) echo "requeue $2" >> "$STATE/scontrol" ;;
esac
"""

SQUEUE = """#!/bin/bash
echo "${STATE_OF_JOB:-RUNNING None}"
"""


def _programs(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in whose path these programs come first."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = clean_environment()
    return {**environment, "PATH": f"{folder}{os.pathsep}{environment['PATH']}"}


def _has_stepped(run: Path) -> bool:
    """The file alone is made before the first step."""
    log = run / "metrics.jsonl"
    return log.exists() and log.stat().st_size > 0


def _torchrun(recipe: Path, run: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        *more,
        # Without it torchrun takes --run for the beginning of an option of its own.
        "--",
        TRAIN,
        str(recipe),
        "--ds",
        ENGINE,
        "--run",
        str(run),
    ]


def test_torchrun_trains_on_two_ranks_and_passes_a_signal_on(tmp_path: Path, shards: Path) -> None:
    recipe, run = write_recipe(tmp_path, shards), tmp_path / "run"
    command = [*_torchrun(recipe, run, f"--master_port={free_port()}"), "train.steps=10000"]
    process = subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 240
    while not _has_stepped(run) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    step = find_checkpoints(run / "checkpoints")[0].step
    assert 0 < step < 10000, said[-3000:]
    assert "SIGTERM: the run stops after this step or the next, and saves" in said
    assert [line["step"] for line in read_metrics(run)] == list(range(1, step + 1))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["deepspeed", "its launcher of the ranks"])
def test_a_run_whose_launcher_ends_saves_and_leaves(tmp_path: Path, shards: Path, which: str) -> None:
    recipe, run = write_recipe(tmp_path, shards), tmp_path / "run"
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), TRAIN]
    command += [str(recipe), "--ds", ENGINE, "--run", str(run), "train.steps=100000"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, env=clean_environment(), stderr=said, stdout=said)
        end = time.monotonic() + 240
        while not _has_stepped(run) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        if which == "deepspeed":
            process.send_signal(signal.SIGTERM)
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
        process.wait(timeout=60)
        # The launcher is gone; rank 0 holds the folder's lock as long as it lives.
        with (run / ".lock").open("w") as lock:
            while time.monotonic() < end + 60:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.05)
    # It lets go of the lock before its last words.
    while "The same command continues it" not in (text := (tmp_path / "said").read_text()):
        assert time.monotonic() < end + 60, text[-3000:]
        time.sleep(0.05)
    step = find_checkpoints(run / "checkpoints")[0].step
    assert 0 < step < 100000, text[-3000:]
    assert text.count("has ended: the run stops after this step or the next, and saves") == 2
    assert "(end of the launcher on rank " in text
    assert [line["step"] for line in read_metrics(run)] == list(range(1, step + 1))


@pytest.mark.slow
def test_a_hostfile_of_two_hosts_is_one_run_of_two_ranks(tmp_path: Path, shards: Path) -> None:
    recipe, run = write_recipe(tmp_path, shards), tmp_path / "run"
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    command = ["deepspeed", "--hostfile", str(tmp_path / "hosts"), "--no_ssh_check"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), TRAIN, str(recipe)]
    command += ["--ds", ENGINE, "--run", str(run), "train.steps=2"]
    environment = _programs(tmp_path / "bin", pdsh=PDSH)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert [line["step"] for line in read_metrics(run)] == [1, 2], done.stderr[-3000:]
    assert find_checkpoints(run / "checkpoints")[0].manifest["world_size"] == 2
    assert done.returncode == 0


@pytest.mark.slow
def test_torchrun_on_two_nodes_is_one_run_of_four_ranks(tmp_path: Path, shards: Path) -> None:
    recipe, run, port = write_recipe(tmp_path, shards), tmp_path / "run", free_port()
    nodes = [
        subprocess.Popen(
            [
                *_torchrun(
                    recipe,
                    run,
                    "--nnodes=2",
                    f"--node_rank={node}",
                    "--master_addr=127.0.0.1",
                    f"--master_port={port}",
                ),
                "train.steps=2",
            ],
            env=clean_environment(),
        )
        for node in range(2)
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert find_checkpoints(run / "checkpoints")[0].manifest["world_size"] == 4


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (STOPPED, "RUNNING None", True),
        (STOPPED, "COMPLETING TimeLimit", True),
        # Cancelled, or requeued from outside.
        (STOPPED, "COMPLETING None", False),
        (STOPPED, "PENDING BeginTime", False),
        # Slurm does not answer.
        (STOPPED, "", True),
        # SIGTERM while Python starts, SIGKILL, a mistake of the user, the end.
        (143, "RUNNING None", True),
        (137, "RUNNING None", False),
        (2, "RUNNING None", False),
        (0, "RUNNING None", False),
    ],
)
@pytest.mark.parametrize("in_array", [False, True])
def test_the_slurm_script_requeues_what_it_may(
    tmp_path: Path, code: int, state: str, requeued: bool, in_array: bool
) -> None:
    srun = f'#!/bin/bash\necho "$@" > "$STATE/srun"\nexit {code}\n'
    environment = _programs(tmp_path / "bin", srun=srun, scontrol=SCONTROL, squeue=SQUEUE)
    environment |= {"STATE": str(tmp_path), "STATE_OF_JOB": state or " ", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
    if in_array:
        environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    script = str(ROOT / "launch" / "slurm" / "train.sbatch")
    done = subprocess.run(
        ["bash", script, "recipe", "engine", str(tmp_path / "run")], env=environment, timeout=60, check=False
    )
    assert done.returncode == code
    # srun does not take it from sbatch.
    assert "--cpus-per-task=12" in (tmp_path / "srun").read_text().split()
    told = tmp_path / "scontrol"
    # The number of an array is the number of one of its elements, too.
    job = "7_3" if in_array else "7"
    assert (told.read_text() if told.exists() else "") == (f"requeue {job}\n" if requeued else "")


@pytest.mark.slow
def test_the_slurm_script_requeues_a_stopped_run_until_it_is_finished(tmp_path: Path, shards: Path) -> None:
    recipe, run = write_recipe(tmp_path, shards), tmp_path / "run"
    script = str(ROOT / "launch" / "slurm" / "train.sbatch")
    environment = _programs(tmp_path / "bin", srun=SRUN, scontrol=SCONTROL, squeue=SQUEUE)
    environment |= {"STATE": str(tmp_path), "RUN": str(run), "SLURM_JOB_NODELIST": "n[1-2]"}
    codes, steps = [], []
    # Job numbers decide the port.
    for job, wanted in ((free_port() - 15_000, 10_000), (free_port() - 15_000, None)):
        target = wanted or steps[-1] + 1
        command = ["bash", script, str(recipe), ENGINE, str(run), f"train.steps={target}"]
        job_environment = {**environment, "SLURM_JOB_ID": str(job)}
        done = subprocess.run(
            command, env=job_environment, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        codes.append(done.returncode)
        steps.append(find_checkpoints(run / "checkpoints")[0].step)
        if wanted:
            assert (tmp_path / "scontrol").read_text() == f"requeue {job}\n", done.stderr[-3000:]
    assert codes == [STOPPED, 0]
    assert 0 < steps[0] < 10_000 and steps[1] == steps[0] + 1
    assert len((tmp_path / "scontrol").read_text().splitlines()) == 1, "a finished run is not requeued"
    wrong = subprocess.run(
        ["bash", script, str(recipe), ENGINE, str(run), "train.stepz=1"],
        env={**environment, "SLURM_JOB_ID": "7"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert wrong.returncode == 2
    assert len((tmp_path / "scontrol").read_text().splitlines()) == 1, "nor one that cannot begin"
