"""A signal on any rank stops all of them after the same step, saved, and the run continues to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.trainer.ranks import engine_file, free_port, lines_without_clock, run_ranks, start_rank
from tests.trainer.stopping import press_twice, train_main, train_signalled
from tests.trainer.test_resume import files_of
from tim_ds.trainer import signals as signals_module
from tim_ds.trainer.checkpoint import find_checkpoints
from tim_ds.trainer.signals import AT_ONCE, STOPPED, StopSignals, ended, launchers


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), (2, 3)])
def test_a_stopped_run_says_so_and_ends_equal_to_the_bit(
    tmp_path: Path, shards: Path, world_size: int, stage: int
) -> None:
    engine = engine_file(tmp_path, stage)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    codes = run_ranks(train_main, whole, engine, shards, world_size=world_size, out=tmp_path / "out")
    assert codes == [0] * world_size
    signals = {1: [(signal.SIGINT, 2, 0), (signal.SIGUSR1, 6, 0)], 2: [(signal.SIGTERM, 2, 1)]}
    stopped_at = []
    for number, step, rank in signals[world_size]:
        out = tmp_path / f"out{number}"
        codes = run_ranks(
            train_signalled, number, step, rank, broken, engine, shards, world_size=world_size, out=out
        )
        checkpoint = find_checkpoints(broken / "checkpoints")[0]
        stopped_at.append(checkpoint.step)
        if step < 6:
            assert codes == [STOPPED] * world_size
            said = (out / "output_0.txt").read_text()
            assert f"saved after step {checkpoint.step} ({number.name} on rank {rank})" in said
        else:
            assert codes == [0], "a run that was asked to stop in its last step is finished"
    # One rank knows at the end of its own step, two agree on the next one.
    assert stopped_at == ([2, 6] if world_size == 1 else [3])
    if stopped_at[-1] < 6:
        codes = run_ranks(train_main, broken, engine, shards, world_size=world_size, out=tmp_path / "last")
        assert codes == [0] * world_size
    assert lines_without_clock(broken) == lines_without_clock(whole) != []
    assert files_of(broken / "export") == files_of(whole / "export") != {}
    last = Path("checkpoints") / "step_000000006"
    assert files_of(broken / last) == files_of(whole / last) != {}


def test_loader_processes_outlive_the_signal(tmp_path: Path, shards: Path) -> None:
    run = tmp_path / "run"
    codes = run_ranks(
        train_signalled,
        signal.SIGUSR1,
        2,
        0,
        run,
        engine_file(tmp_path, 1),
        shards,
        "data.workers=2",
        world_size=1,
        out=tmp_path / "out",
    )
    assert codes == [STOPPED], (tmp_path / "out" / "output_0.txt").read_text()
    assert find_checkpoints(run / "checkpoints")[0].step == 2


def test_a_second_press_ends_the_run_at_once(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    arguments = (tmp_path / "run", engine_file(tmp_path, 1), shards)
    process = start_rank(press_twice, arguments, 0, 1, free_port(), out)
    process.join(timeout=60)
    assert process.exitcode == AT_ONCE
    assert not find_checkpoints(tmp_path / "run" / "checkpoints")


def within(seconds: float, happened: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.01)
    return happened()


def test_launchers_are_known_above_a_rank_and_missed_when_they_end(tmp_path: Path) -> None:
    """As deepspeed's: a program, which starts a module, which starts the rank. All are bash here."""
    (tmp_path / "deepspeed").write_text('bash "$1" deepspeed.launcher.launch "$2" & wait')
    (tmp_path / "module").write_text('sleep 60 & echo $$ $! > "$2.part"; mv "$2.part" "$2"; wait')
    told = tmp_path / "told"
    runner = subprocess.Popen(["bash", tmp_path / "deepspeed", tmp_path / "module", told])
    assert within(20, told.exists)
    module, rank = map(int, told.read_text().split())
    try:
        above = launchers(rank)
        assert above == [module, runner.pid], "nothing beyond the program: that may be any shell"
        assert ended(above, rank) is None
        assert launchers(module) == [runner.pid] and launchers(runner.pid) == []
        runner.kill()
        assert within(20, lambda: ended(above, rank) == runner.pid)
        os.kill(module, signal.SIGKILL)
        assert within(20, lambda: ended(above, rank) == module)
    finally:
        for process in (module, rank):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        runner.kill()
        runner.wait()


@pytest.mark.parametrize(("session", "counts"), [("sshd: me@notty", True), ("sshd: me@pts/0", False)])
def test_on_a_host_of_several_the_connection_is_part_of_the_launcher(
    tmp_path: Path, session: str, counts: bool
) -> None:
    """pdsh comes without a terminal. Who types commands into one may leave."""
    (tmp_path / "session").write_text(
        'bash -c \'bash "$0" deepspeed.launcher.launch "$1"; :\' "$1" "$2" & wait'
    )
    (tmp_path / "module").write_text('sleep 60 & echo $$ $PPID $! > "$2.part"; mv "$2.part" "$2"; wait')
    told = tmp_path / "told"
    named = ["bash", "-c", 'exec -a "$0" bash "$@"', session]
    sshd = subprocess.Popen([*named, tmp_path / "session", tmp_path / "module", told])
    assert within(20, told.exists)
    module, shell, rank = map(int, told.read_text().split())
    try:
        above = launchers(rank)
        assert above == ([module, shell, sshd.pid] if counts else [module])
        sshd.kill()
        sshd.wait()
        assert ended(above, rank) == (sshd.pid if counts else None), "the shell is still there"
    finally:
        for process in (module, shell, rank):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        sshd.kill()
        sshd.wait()


@pytest.mark.parametrize("there", [True, False])
def test_a_launcher_that_ends_asks_the_run_to_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    parent = os.getppid() if there else 2**22 + 1
    monkeypatch.setattr(signals_module, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(signals_module, "launchers", lambda: [parent])
    with StopSignals().installed() as signals:
        assert within(0.2 if there else 20, lambda: signals.requested) is not there
    if not there:
        assert signals.reason == "end of the launcher"
        said = (
            f"the launcher (process {parent}) has ended: the run stops after this step or the next, and saves"
        )
        assert said in capsys.readouterr().err
