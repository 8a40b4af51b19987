"""A cluster on one machine: hosts with names, network cards and processes of their own that share the disk,
and on them sshd or Slurm. They are namespaces of this machine, joined by a bridge. Nothing of the machine
itself is changed, and when this process ends, for whatever reason, they end with all that runs on them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.test_launch import ROOT, clean_environment

NODES = ("node1", "node2")
"""Where ranks run. Commands are given on `login`, the first host."""

SSH = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "ip": "iproute2",
    "pkill": "procps",
}
SLURM = {"sbatch": "slurm-wlm", "slurmctld": "slurm-wlm", "munged": "munge", "ip": "iproute2"}
"""Programs and the Debian packages that hold them."""

_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_ADDRESSES = {name: f"10.77.0.{number}" for number, name in enumerate(("login", *NODES), start=1)}
_ALONE = ("unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
# The first process of a host, which ends with the pipe from this process; the kernel then ends the rest.
_FIRST = """
mount -t tmpfs run /run && mkdir /run/sshd && mount --bind "$1/hosts" /etc/hosts && hostname "$0" &&
ip link set lo up && echo up && read -r _
"""


def needs(programs: Mapping[str, str]) -> pytest.MarkDecorator:
    """Skips a test where programs are absent, naming the packages."""
    absent = {package for program, package in programs.items() if shutil.which(program, path=_PATH) is None}
    if absent:
        return pytest.mark.skipif(True, reason=f"not installed: apt-get install {' '.join(sorted(absent))}")
    return pytest.mark.skipif(os.geteuid() != 0, reason="only root can make hosts of this machine's own")


class Host:
    """A host whose first process is `pid`, as this machine counts."""

    def __init__(self, pid: int, environment: Mapping[str, str]) -> None:
        self.pid = pid
        self.environment = environment

    def start(self, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
        """A command on this host, in the repository's root. Signals go to `child` of what is returned."""
        there = ["nsenter", "--target", str(self.pid), "--all", "env", f"--chdir={ROOT}"]
        return subprocess.Popen(
            [*there, *map(str, command)], env=self.environment, text=True, stdin=subprocess.DEVNULL, **options
        )

    def run(self, *command: str | Path, timeout_s: float = 120.0) -> str:
        """What a command printed."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        printed, _ = process.communicate(timeout=timeout_s)
        if process.returncode:
            raise AssertionError(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{printed}")
        return printed


class Cluster:
    """Hosts by name: `login` and `NODES`."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {**clean_environment(), **environment}
        self.environment["PATH"] += os.pathsep + "/usr/sbin:/sbin"
        self._processes: list[subprocess.Popen[str]] = []
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Cluster:
        names = [f"{address} {name}\n" for name, address in _ADDRESSES.items()]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        try:
            for name in _ADDRESSES:
                self.hosts[name] = self._make_host(name)
            self.login.run("ip", "link", "add", "bridge", "type", "bridge")
            self.login.run("ip", "address", "add", f"{_ADDRESSES['login']}/24", "dev", "bridge")
            self.login.run("ip", "link", "set", "bridge", "up")
            for name in NODES:
                self._connect(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_host(self, name: str) -> Host:
        first = subprocess.Popen(
            [*_ALONE, "bash", "-c", _FIRST, name, self.folder],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._processes.append(first)
        assert first.stdout is not None and first.stdout.readline() == "up\n", f"{name} was not made"
        return Host(child(first), self.environment)

    def _connect(self, name: str) -> None:
        """A cable from the host's card to the bridge, where its end has the host's name."""
        host = self.hosts[name]
        self.login.run("ip", "link", "add", name, "type", "veth", "peer", "name", "card")
        self.login.run("ip", "link", "set", name, "master", "bridge", "up")
        # Only here, where this machine's processes are seen, has the host's first one this number.
        network = ["nsenter", "--target", str(self.login.pid), "--net"]
        subprocess.run([*network, "ip", "link", "set", "card", "netns", str(host.pid)], check=True)
        host.run("ip", "address", "add", f"{_ADDRESSES[name]}/24", "dev", "card")
        host.run("ip", "link", "set", "card", "up")

    @property
    def login(self) -> Host:
        return self.hosts["login"]

    def start(self, host: str, *command: str | Path) -> None:
        """A daemon, in the foreground; what it says goes into a file."""
        with (self.folder / f"{Path(command[0]).name}-{host}.said").open("w") as said:
            self._processes.append(self.hosts[host].start(command, stdout=said, stderr=said))

    def cut(self, name: str) -> None:
        """Pull a host's cable: its connections stay open and say nothing more."""
        self.login.run("ip", "link", "set", name, "down")

    def limit(self, name: str, mbit: float) -> None:
        """Let a host send no more than so many million bits a second."""
        # What waits is kept: a queue that drops would slow down large messages more than small ones.
        limit = ["rate", f"{mbit}mbit", "burst", "128kb", "limit", "64mb"]
        self.hosts[name].run("tc", "qdisc", "replace", "dev", "card", "root", "tbf", *limit)

    def end(self, name: str) -> None:
        """Switch a host off."""
        os.kill(self.hosts[name].pid, signal.SIGKILL)

    def close(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()


@contextmanager
def ssh_cluster(folder: Path) -> Iterator[Cluster]:
    """sshd on the nodes, and a key that login has and they know."""
    cluster = Cluster(folder, DS_ENV_FILE=str(folder / "for_ranks"))
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "for_ranks").write_text("OMP_NUM_THREADS=1\n")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/key.pub\nPidFile none\n"
        "PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/key\nUserKnownHostsFile {folder}/known\nStrictHostKeyChecking no\n"
        "BatchMode yes\nLogLevel ERROR\n"
    )
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NODES))
    with cluster:
        cluster.login.run("mount", "--bind", folder / "ssh_config", "/etc/ssh/ssh_config")
        for name in NODES:
            cluster.start(name, "/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config")
        for name in NODES:
            assert within(60, lambda name=name: _answers(cluster, "ssh", name, "true")), name
        yield cluster


_SLURM_CONF = """
ClusterName=tests
SlurmctldHost=login
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
TaskPluginParam=Cores
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmdTimeout=30
ReturnToService=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
NodeName=node[1-2] CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


class Slurm:
    """Slurm with two nodes of two cores and two GPUs, the GPUs being files that are devices in name."""

    def __init__(self, cluster: Cluster) -> None:
        self._login = cluster.login
        self.cluster = cluster

    def run(self, *command: str | Path) -> str:
        return self._login.run(*command).strip()

    def submit(self, *arguments: str | Path, options: Sequence[str] = ()) -> str:
        """`train.sbatch` with one rank on each node; the number of the job."""
        mine = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=2"]
        log = f"--output={self.cluster.folder}/%A.log"
        script = ROOT / "launch" / "slurm" / "train.sbatch"
        return self.run("sbatch", "--parsable", *mine, "--time=30", log, *options, script, *arguments)

    def log(self, job: str) -> str:
        path = self.cluster.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job or an element of an array."""
        told = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def comes_to(self, job: str, *states: str, seconds: float = 300.0) -> dict[str, str]:
        """What Slurm says of a job once it is in one of the states."""
        last: dict[str, str] = {}

        def look() -> bool:
            last.update(self.job(job))
            return last["JobState"] in states

        assert within(seconds, look), f"job {job} is {last['JobState']}, not {states}\n{self.log(job)}"
        return last


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """munged, slurmctld on login, slurmd on the nodes."""
    cluster = Cluster(folder, SLURM_CONF=str(folder / "slurm.conf"))
    (folder / "slurm.conf").write_text(_SLURM_CONF.format(folder=folder))
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-1]\n")
    for number in range(2):
        # What /dev/null is: Slurm asks that there be a device.
        os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    munge = {name: folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
    options = ["--key-file", key, "--socket", munge["socket"], "--pid-file", munge["pid"]]
    options += ["--log-file", munge["log"], "--seed-file", munge["seed"]]
    with cluster:
        cluster.start("login", "munged", "--force", "--foreground", *options)
        assert within(60, munge["socket"].exists), "munged does not run"
        cluster.start("login", "slurmctld", "-D")
        for name in NODES:
            cluster.start(name, "slurmd", "-D", "-N", name)
        slurm = Slurm(cluster)
        assert within(120, lambda: _idle(cluster)), cluster.login.run("sinfo", "-N")
        yield slurm


def _answers(cluster: Cluster, *command: str) -> bool:
    try:
        cluster.login.run(*command)
    except AssertionError:
        return False
    return True


def _idle(cluster: Cluster) -> bool:
    asked = ("sinfo", "--noheader", "--partition=all", "--format=%t")
    return _answers(cluster, *asked) and cluster.login.run(*asked).split() == ["idle"]


def ranks_of(run: Path) -> dict[int, int]:
    """The processes of a run's ranks, as this machine counts."""
    found: dict[int, tuple[int, int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            environment = environment_of(int(folder.name))
            trains = any(argument.endswith(b"launch/train.py") for argument in arguments[:4])
            if trains and os.fsencode(run) in arguments and "RANK" in environment:
                began = int((folder / "stat").read_text().rpartition(")")[2].split()[19])
                candidate = (began, int(folder.name))
                rank = int(environment["RANK"])
                # The processes of its loader look the same, but came later.
                found[rank] = min(candidate, found.get(rank, candidate))
    return {rank: pid for rank, (_, pid) in sorted(found.items())}


def environment_of(pid: int) -> dict[str, str]:
    raw = Path(f"/proc/{pid}/environ").read_bytes()
    return dict(os.fsdecode(entry).split("=", 1) for entry in raw.split(b"\0") if b"=" in entry)


def child(process: subprocess.Popen[Any]) -> int:
    """The process that a started one has in turn started, as this machine counts."""
    found: list[str] = []

    def look() -> bool:
        found[:] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return bool(found)

    assert within(60, look), f"process {process.pid} started none"
    return int(found[0])


def within(seconds: float, happened: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not (done := happened()) and time.monotonic() < end:
        time.sleep(0.1)
    return done
