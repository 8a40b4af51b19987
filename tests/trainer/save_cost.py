"""What a save costs the step, and what goes on behind it.

    python -m tests.trainer.save_cost --folder /data/scratch [--share 0.25] [--unprepared]

One rank's state of the 865M model (float32 master, two averages of AdamW, one averaged copy), or a share of
it, is saved twice. Before that the memory of the copy is made beside steps, as a run does after its first
one; or it is not, and the first save has to. A step here is a matrix product, an average of weights and small
calls from Python, on one thread, so that it feels what the other thread takes: cores, caches, bandwidth,
locks.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tim_ds.config.load import load_recipe
from tim_ds.model.export_folder import meta_network
from tim_ds.trainer.checkpoint import CheckpointFolder, Piece
from tim_ds.trainer.world import World

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "t2i_xl.yaml"
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema.ema")
STEPS = 40


def step(weight: Tensor, master: Tensor, average: Tensor, small: Tensor) -> tuple[float, float]:
    """Seconds of one step, and of its core: what other processes take is not in the latter."""
    start, busy = time.perf_counter(), time.thread_time()
    torch.mm(weight, weight)
    average.lerp_(master, 0.01)
    for _ in range(2000):
        small.add_(1.0)
    return time.perf_counter() - start, time.thread_time() - busy


def told(name: str, steps: list[tuple[float, float]]) -> str:
    wall, core = ([1e3 * part for part in parts] for parts in zip(*steps, strict=True))
    return (
        f"{name}: {len(steps)} steps of {statistics.mean(wall):.1f} ms in the mean, {max(wall):.1f} at most; "
        f"{statistics.mean(core):.1f} ms of its core"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.trainer.save_cost", description="Time a checkpoint of one rank."
    )
    parser.add_argument("--folder", type=Path, required=True, help="where to write; emptied afterwards")
    parser.add_argument("--share", type=float, default=0.25, help="of the model's parameters")
    parser.add_argument("--unprepared", action="store_true", help="leave the memory to the first save")
    options = parser.parse_args()
    network = meta_network(load_recipe(RECIPE).model)
    sizes = {name: max(1, round(options.share * p.numel())) for name, p in network.named_parameters()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = {kind: {name: torch.ones(n, device=device) for name, n in sizes.items()} for kind in KINDS}

    def pieces() -> Iterator[Piece]:
        for kind, values in state.items():
            for name, value in values.items():
                yield Piece(kind, name, 0, value)

    numel = sum(sizes.values())
    place = options.folder / "save_cost"
    folder = CheckpointFolder(place, World(device=device), keep=1)
    print(f"{numel:,} parameters, {16 * numel / 1e9:.2f} GB, {torch.get_num_threads()} thread, {device.type}")
    if not options.unprepared:
        stepped = torch.rand(1024, 1024), torch.rand(1 << 24), torch.rand(1 << 24), torch.rand(8)
        alone = [step(*stepped) for _ in range(STEPS)]
        start = time.perf_counter()
        folder.prepare(pieces(), {})
        asked = time.perf_counter() - start
        thread, beside = folder._host._thread, []
        assert thread is not None
        while thread.is_alive():
            beside.append(step(*stepped))
        made = time.perf_counter() - start
        print(f"memory: asked for in {1e3 * asked:.1f} ms, there after {made:.2f} s")
        print(told("before", alone), told("beside", beside), sep="\n")
        print(told("after", [step(*stepped) for _ in range(STEPS)]))
    for number in (1, 2):
        start, busy = time.perf_counter(), time.thread_time()
        folder.start(number, pieces(), {}, {"progress": {"step": number}, "world_size": 1})
        held, busy = time.perf_counter() - start, time.thread_time() - busy
        folder.settle(wait=True)
        written = time.perf_counter() - start
        print(
            f"save {number}: the step waits {held:.2f} s ({busy:.2f} s of its core), the disk {written:.2f} s"
        )
    start = time.perf_counter()
    found = folder.newest()
    assert found is not None
    print(f"checksums of one checkpoint at the start of a run: {time.perf_counter() - start:.2f} s")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
