"""What a save costs the step, and what goes on behind it.

    python -m tests.trainer.save_cost --folder /data/scratch [--share 0.25]

One rank's state of the 865M model (float32 master, two averages of AdamW, one averaged copy), or a share of
it, is saved twice: the second save finds its host memory there, as every save of a run but the first does.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch

from tim_ds.config.load import load_recipe
from tim_ds.model.export_folder import meta_network
from tim_ds.trainer.checkpoint import CheckpointFolder, Piece
from tim_ds.trainer.world import World

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "t2i_xl.yaml"
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema.ema")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a checkpoint of one rank.")
    parser.add_argument("--folder", type=Path, required=True, help="where to write; emptied afterwards")
    parser.add_argument("--share", type=float, default=0.25, help="of the model's parameters")
    options = parser.parse_args()
    network = meta_network(load_recipe(RECIPE).model)
    sizes = {name: max(1, round(options.share * p.numel())) for name, p in network.named_parameters()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = {kind: {name: torch.ones(n, device=device) for name, n in sizes.items()} for kind in KINDS}
    numel = sum(sizes.values())
    place = options.folder / "save_cost"
    folder = CheckpointFolder(place, World(device=device), keep=1)
    print(f"{numel:,} parameters, {16 * numel / 1e9:.2f} GB, {torch.get_num_threads()} thread, {device.type}")
    for step in (1, 2):
        pieces = (Piece(k, name, 0, value) for k, values in state.items() for name, value in values.items())
        start, busy = time.perf_counter(), time.thread_time()
        folder.start(step, pieces, {}, {"progress": {"step": step}, "world_size": 1})
        held, busy = time.perf_counter() - start, time.thread_time() - busy
        folder.settle(wait=True)
        written = time.perf_counter() - start
        print(
            f"save {step}: the step waits {held:.2f} s ({busy:.2f} s of its core), the disk {written:.2f} s"
        )
    start = time.perf_counter()
    found = folder.newest()
    assert found is not None
    print(f"checksums of one checkpoint at the start of a run: {time.perf_counter() - start:.2f} s")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
