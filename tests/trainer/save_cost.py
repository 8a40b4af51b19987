"""What a save costs the step, and what goes on behind it.

    python -m tests.trainer.save_cost --folder DIR [--share 0.25] [--ranks 8] [--unprepared] [--window 1]

The state of the 865M model (float32 master, two averages of AdamW, one averaged copy), or a share of it,
split among ranks of one host that all save at once, is saved three times. Before that the memory of the
copies is made beside steps, as a run does after its first one; or it is not, and the first save has to. A
step here is a matrix product, an average of weights and small calls from Python, on one thread, so that it
feels what the other thread takes: cores, caches, bandwidth, locks. After each step the ranks look after the
checkpoint, as those of a run do.

The whole model's state and its copies are 28 GB. With `--window` the tensors of the state lie over each
other in a window of that many GiB, which a host with half the memory can hold: every byte of the copies is
there, is written and goes to the disk, and as many are read, from a window that no cache holds.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.trainer.ranks import run_ranks
from tim_ds.config.load import load_recipe
from tim_ds.model.export_folder import meta_network
from tim_ds.trainer.checkpoint import Piece
from tim_ds.trainer.checkpoint_folder import CheckpointFolder
from tim_ds.trainer.engine import start_world, stop_world

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "t2i_xl.yaml"
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema.ema")
STEPS = 40
SAVES = 3

Timed = tuple[float, float]
"""Seconds of the clock, and of the thread's own core: what other processes take is not in the latter."""


def timed(action: Callable[[], object]) -> Timed:
    start, busy = time.perf_counter(), time.thread_time()
    action()
    return time.perf_counter() - start, time.thread_time() - busy


def build_state(sizes: Mapping[str, int], window: int, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """A rank's state: tensors of their own, or one after the other around a window of so many elements."""
    if not window:
        return {kind: {name: torch.ones(n, device=device) for name, n in sizes.items()} for kind in KINDS}
    room, end = torch.ones(max(window, *sizes.values()), device=device), 0
    state: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for values in state.values():
        for name, n in sizes.items():
            start = end if end + n <= len(room) else 0
            values[name], end = room[start : start + n], start + n
    return state


def measure(place: Path, share: float, prepared: bool, window: int) -> dict[str, Any]:
    """What one rank sees; called by all."""
    world = start_world()
    network = meta_network(load_recipe(RECIPE).model)
    own = share / world.size
    sizes = {name: max(1, round(own * p.numel())) for name, p in network.named_parameters()}
    state = build_state(sizes, window // world.size, world.device)
    weight, master, average, small = (
        torch.rand(1024, 1024),
        torch.rand((1 << 24) // world.size),
        torch.rand((1 << 24) // world.size),
        torch.rand(8),
    )

    def pieces() -> Iterator[Piece]:
        for kind, values in state.items():
            for name, value in values.items():
                yield Piece(kind, name, 0, value)

    def step() -> None:
        torch.mm(weight, weight)
        average.lerp_(master, 0.01)
        for _ in range(2000):
            small.add_(1.0)

    folder = CheckpointFolder(place, world, keep=1)
    found: dict[str, Any] = {"elements": sum(sizes.values()), "device": world.device.type}
    world.barrier()
    found["alone"] = [timed(step) for _ in range(STEPS)]
    if prepared:
        start = time.perf_counter()
        folder.prepare(pieces(), {})
        thread, found["making"] = folder._host._thread, []
        assert thread is not None
        while any(world.gather(thread.is_alive())):
            found["making"].append(timed(step))
        found["made"] = time.perf_counter() - start
        found["after"] = [timed(step) for _ in range(STEPS)]
    found["saves"] = []
    for number in range(1, SAVES + 1):
        world.barrier()
        start, beside, looks = time.perf_counter(), [], []
        manifest = {"progress": {"step": number}, "world_size": world.size}
        held = timed(partial(folder.start, number, pieces(), {}, manifest))
        while folder._writing is not None:
            beside.append(timed(step))
            looks.append(timed(folder.settle))
        found["saves"].append((held, time.perf_counter() - start, beside, looks))
    found["from_disk"] = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    start = time.perf_counter()
    assert folder.newest() is not None
    found["checked"] = time.perf_counter() - start
    stop_world(world)
    return found


def told(name: str, steps: Sequence[Timed]) -> str:
    if not steps:
        return f"{name}: none"
    wall, core = ([1e3 * part for part in parts] for parts in zip(*steps, strict=True))
    return (
        f"{name}: {len(steps)} of {statistics.mean(wall):.1f} ms in the mean, {max(wall):.1f} at most; "
        f"{statistics.mean(core):.1f} ms of their core"
    )


def _over(ranks: Sequence[float]) -> str:
    low, high = min(ranks), max(ranks)
    return f"{low:.2f}" if len(ranks) == 1 else f"{low:.2f} to {high:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.trainer.save_cost", description="Time checkpoints of the ranks of one host."
    )
    parser.add_argument("--folder", type=Path, required=True, help="where to write; emptied afterwards")
    parser.add_argument("--share", type=float, default=0.25, help="of the model, over all ranks")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--unprepared", action="store_true", help="leave the memory to the first save")
    parser.add_argument(
        "--window", type=float, default=0.0, metavar="GIB", help="memory of the state, which lies over itself"
    )
    options = parser.parse_args()
    place = options.folder / "save_cost"
    shutil.rmtree(place, ignore_errors=True)
    with tempfile.TemporaryDirectory() as out:
        ranks = run_ranks(
            measure,
            place,
            options.share,
            not options.unprepared,
            round(options.window * 2**28),
            world_size=options.ranks,
            out=Path(out),
        )
    shutil.rmtree(place)

    def every(key: str) -> list[Timed]:
        return [step for rank in ranks for step in rank[key]]

    elements = sum(rank["elements"] for rank in ranks)
    device = ranks[0]["device"]
    print(
        f"{elements:,} parameters, {16 * elements / 1e9:.2f} GB on {len(ranks)} ranks, {device}; "
        f"load average {os.getloadavg()[0]:.1f}; {sum(r['from_disk'] for r in ranks)} pages read from a disk"
    )
    print(told("steps before", every("alone")))
    if not options.unprepared:
        print(f"memory: there after {_over([rank['made'] for rank in ranks])} s")
        print(told("steps beside", every("making")), told("steps after", every("after")), sep="\n")
    for number in range(SAVES):
        saves = [rank["saves"][number] for rank in ranks]
        print(
            f"save {number + 1}: the step waits {_over([held[0] for held, *_ in saves])} s "
            f"({_over([held[1] for held, *_ in saves])} s of its core), "
            f"the disk {_over([written for _, written, *_ in saves])} s"
        )
        print(told("  steps beside", [step for *_, steps, _ in saves for step in steps]))
        print(told("  looks", [look for *_, looks in saves for look in looks]))
    checked = _over([rank["checked"] for rank in ranks])
    print(f"checksums of one checkpoint at the start of a run: {checked} s")


if __name__ == "__main__":
    main()
