"""`deepspeed --hostfile` through pdsh and sshd: two hosts that are namespaces of this machine, on CPU. What
cannot be seen here: GPUs and NCCL."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainer.cluster import (
    NODES,
    SSH,
    Cluster,
    child,
    environment_of,
    needs,
    ranks_of,
    ssh_cluster,
    within,
)
from tests.trainer.ranks import free_port
from tests.trainer.test_launch import TRAIN, write_recipe
from tests.trainer.test_launchers import ENGINE
from tim_ds.trainer.checkpoint import find_checkpoints
from tim_ds.trainer.metrics import read_metrics
from tim_ds.trainer.signals import STOPPED
from tim_ds.trainer.watch import LOST

pytestmark = [pytest.mark.slow, needs(SSH)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ssh_cluster(tmp_path_factory.mktemp("ssh")) as running:
        yield running


class Launched:
    """A run of one rank on each node, started on login by `deepspeed`."""

    def __init__(self, cluster: Cluster, recipe: Path, run: Path, *overrides: str) -> None:
        self.run = run
        self._said = run.with_suffix(".said")
        command = [
            "deepspeed",
            "--hostfile",
            str(cluster.folder / "hostfile"),
            "--master_port",
            str(free_port()),
        ]
        command += [TRAIN, str(recipe), "--ds", ENGINE, "--run", str(run), *overrides]
        with self._said.open("w") as said:
            self._process = cluster.login.start(command, stdout=said, stderr=said)
        self.pid = child(self._process)

    @property
    def said(self) -> str:
        return self._said.read_text()

    def wait(self, seconds: float = 300) -> int:
        return self._process.wait(timeout=seconds)

    def trains(self) -> None:
        assert within(300, lambda: self.steps() != [] or self._process.poll() is not None), self.said
        assert self._process.poll() is None, self.said
        assert sorted(ranks_of(self.run)) == [0, 1]

    def steps(self) -> list[int]:
        return [x["step"] for x in read_metrics(self.run)] if (self.run / "metrics.jsonl").exists() else []

    def leaves(self, seconds: float) -> None:
        assert within(seconds, lambda: not ranks_of(self.run)), self.said

    def saved(self) -> int:
        step = find_checkpoints(self.run / "checkpoints")[0].step
        assert self.steps() == list(range(1, step + 1))
        return step


@pytest.fixture
def launched(cluster: Cluster, tmp_path: Path, shards: Path) -> Launched:
    recipe = write_recipe(tmp_path, shards)
    run = Launched(cluster, recipe, tmp_path / "run", "train.steps=1000000", "--dead-after", "6")
    run.trains()
    return run


def test_two_hosts_are_one_run_of_two_ranks(cluster: Cluster, tmp_path: Path, shards: Path) -> None:
    run = Launched(cluster, write_recipe(tmp_path, shards), tmp_path / "run", "train.steps=40")
    run.trains()
    ranks = ranks_of(run.run)
    assert len({os.readlink(f"/proc/{pid}/ns/net") for pid in ranks.values()}) == 2
    # What deepspeed passes on of login's variables, and what a file adds to them (launch/README.md).
    assert [environment_of(pid)["OMP_NUM_THREADS"] for pid in ranks.values()] == ["1", "1"]
    assert run.wait() == 0, run.said
    assert run.saved() == 40
    assert find_checkpoints(run.run / "checkpoints")[0].manifest["world_size"] == 2
    assert "node1: " in run.said and "node2: " in run.said


@pytest.mark.parametrize("received", [signal.SIGTERM, signal.SIGINT])
def test_signalled_deepspeed_ends_the_launchers_of_all_hosts_and_the_run_saves(
    launched: Launched, received: signal.Signals
) -> None:
    os.kill(launched.pid, received)
    assert launched.wait() == 1
    launched.leaves(60)
    assert launched.saved() > 0


def test_a_signalled_rank_ends_the_run_saved_and_deepspeed_has_its_exit_code(launched: Launched) -> None:
    os.kill(ranks_of(launched.run)[1], signal.SIGUSR1)
    assert launched.wait() == STOPPED
    assert launched.saved() > 0
    assert "(SIGUSR1 on rank 1). The same command continues it" in launched.said


def test_a_lost_connection_ends_the_run_saved(launched: Launched) -> None:
    """As when login is switched off: deepspeed, pdsh and ssh are gone at once."""
    gone = [launched.pid]
    for pid in gone:
        # pdsh starts each ssh from a thread of its own.
        for thread in Path(f"/proc/{pid}/task").iterdir():
            gone += map(int, (thread / "children").read_text().split())
    assert len(gone) == 4, "deepspeed, pdsh, an ssh for each host"
    for pid in gone:
        os.kill(pid, signal.SIGKILL)
    launched.leaves(60)
    assert launched.saved() > 0


def test_a_killed_rank_is_named_and_ends_the_run_on_both_hosts(launched: Launched) -> None:
    os.kill(ranks_of(launched.run)[1], signal.SIGKILL)
    killed = time.monotonic()
    launched.leaves(60)
    # 6 s and up to 15; the rest is for a machine that has other work.
    assert time.monotonic() - killed < 6 + 15 + 15
    assert launched.wait() != 0
    assert re.search(
        r"error \(rank 0\): no sign of life for 6 s: rank 1 \(process \d+ on node2\)", launched.said
    )


def test_each_host_on_its_own_without_ssh(cluster: Cluster, tmp_path: Path, shards: Path) -> None:
    recipe, run = write_recipe(tmp_path, shards), tmp_path / "run"
    command = [
        "deepspeed",
        "--no_ssh",
        "--hostfile",
        str(cluster.folder / "hostfile"),
        "--master_addr",
        "node1",
    ]
    command += ["--master_port", str(free_port())]
    arguments = [TRAIN, str(recipe), "--ds", ENGINE, "--run", str(run), "train.steps=2"]
    started = [
        cluster.hosts[name].start([*command, "--node_rank", str(number), *arguments])
        for number, name in enumerate(NODES)
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert find_checkpoints(run / "checkpoints")[0].manifest["world_size"] == 2


@pytest.mark.parametrize(("cut", "named"), [("node2", "rank 1 (process "), ("node1", "host of rank 0")])
def test_a_host_that_vanishes_is_named_by_the_other(
    tmp_path: Path, shards: Path, cut: str, named: str
) -> None:
    """Its connections are not closed. Rank 0, on node1, holds the store that the ranks talk through."""
    recipe, run = write_recipe(tmp_path, shards), tmp_path / "run"
    with ssh_cluster(tmp_path / "ssh") as cluster:
        launched = Launched(cluster, recipe, run, "train.steps=1000000", "--dead-after", "6")
        launched.trains()
        other = ranks_of(run)[0 if cut == "node2" else 1]
        cluster.cut(cut)
        vanished = time.monotonic()
        assert within(60, lambda: not Path(f"/proc/{other}").exists()), launched.said
        # 6 s and up to 15; the rest is for a machine that has other work.
        assert time.monotonic() - vanished < 6 + 15 + 15
        mine = 0 if cut == "node2" else 1
        assert within(10, lambda: f"error (rank {mine}): " in launched.said), launched.said
        line = next(x for x in launched.said.splitlines() if f"error (rank {mine}): " in x)
        assert named in line, line
        assert f"exits with return code = {LOST}" in launched.said
