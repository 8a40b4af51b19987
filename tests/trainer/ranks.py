"""Runs functions on the ranks of a fresh process group, and builds the small runs that they train."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.index import build_index
from data_pipeline.schema import NULL_NAME, Sample
from data_pipeline.shards import write_shard
from tim_ds.config.load import parse_recipe
from tim_ds.config.recipe import Recipe
from tim_ds.trainer.metrics import read_metrics

SIZES = ((2, 2), (2, 3), (3, 2), (4, 2), (3, 3), (2, 4))
UNEVEN_SIZES = ((4, 5), (1, 1), (1, 1), (1, 2), (2, 1), (2, 2))
"""Packs of one large picture beside packs of many small ones."""
CHANNELS = 4
TEXT_WIDTH = 8

RECIPE = f"""
name: small
model:
  condition: text
  in_channels: {CHANNELS}
  hidden_size: 16
  depth: 2
  num_heads: 2
  text_dim: {TEXT_WIDTH}
  z_dim: null
objective:
  derivative: dde
  diffusion_share: 0.5
  diffusion_time: larger
  consistency_share: 0.1
  weight:
    adaptive_over: image
data:
  shards: SHARDS
  tokens_per_pack: 24
  packs_per_step: 4
  autoencoder: {{kind: pixels, factor: 2, channels: 1}}
  text_encoder: {{kind: words, width: {TEXT_WIDTH}}}
train:
  steps: 4
  log_every: 1
  ema:
    averages:
      - decay: 0.9
  optimizer: {{lr: 1e-2, warmup_steps: 2, grad_clip: 0.5}}
  checkpoint: {{every_steps: 100}}
"""


def recipe(shards: Path, *overrides: str) -> Recipe:
    return parse_recipe(RECIPE, [f"data.shards={shards}", *overrides])


def write_data(
    folder: Path,
    *,
    num_samples: int = 64,
    poison: Mapping[int, float] | None = None,
    sizes: Sequence[tuple[int, int]] = SIZES,
) -> Path:
    """Shards of random pictures and captions. `poison` sets the latents of some samples to one value."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number in range(num_samples):
        height, width = sizes[number % len(sizes)]
        latent = torch.randn(CHANNELS, height, width, generator=generator)
        states = torch.randn(1 + number % 3, TEXT_WIDTH, generator=generator)
        if poison and number in poison:
            latent.fill_(poison[number])
        samples.append(Sample(key=f"{number:04d}", latent=latent, states=states))
    write_shard(folder / "shard-000000.tar", samples)
    from safetensors.torch import save_file

    save_file({"states": torch.randn(1, TEXT_WIDTH, generator=generator)}, folder / NULL_NAME)
    build_index(folder, progress=False).save()
    return folder


def engine_file(folder: Path, stage: int, **zero: Any) -> Path:
    """An engine file for tests. Nothing is small enough to stay whole on every rank, as it would by
    default."""
    content: dict[str, Any] = {"zero_optimization": {"stage": stage, **zero}}
    if stage == 3:
        content["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)
    path = folder / f"zero{stage}{'_'.join(['', *sorted(zero)])}.json"
    path.write_text(json.dumps(content))
    return path


def lines_without_clock(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, less what no two runs share."""
    return [{key: value for key, value in line.items() if key != "speed"} for line in read_metrics(run)]


def free_port() -> int:
    """A port on which nobody listens, below those that the system hands out, so that nobody gets it by chance
    before it is used."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def context() -> Any:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.trainer.preload"])
    return server


def start_rank(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world_size: int, port: int, out: Path
) -> Any:
    process = context().Process(
        target=_rank_main, args=(function, arguments, rank, world_size, port, str(out)), daemon=False
    )
    process.start()
    return process


def run_ranks(
    function: Callable[..., Any], *arguments: Any, world_size: int, out: Path, timeout_s: float = 600.0
) -> list[Any]:
    """`function(*arguments)` on every rank of a new group; what each rank returned.

    Judged by what the ranks wrote: gloo may abort a process while the interpreter shuts down, after its work.
    """
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [start_rank(function, arguments, rank, world_size, port, out) for rank in range(world_size)]
    end = time.monotonic() + timeout_s
    try:
        while any(p.is_alive() for p in processes):
            failed = [r for r in range(world_size) if (out / f"error_{r}.txt").exists()]
            if failed or time.monotonic() > end:
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
                process.join()
    errors = [path.read_text() for path in sorted(out.glob("error_*.txt"))]
    if errors:
        raise AssertionError("\n".join(errors))
    missing = [r for r in range(world_size) if not (out / f"result_{r}.pickle").exists()]
    if missing:
        codes = [p.exitcode for p in processes]
        raise AssertionError(
            f"ranks {missing} of {world_size} gave no result in {timeout_s} s; exit codes {codes}"
        )
    return [pickle.loads((out / f"result_{r}.pickle").read_bytes()) for r in range(world_size)]


def _rank_main(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, world_size: int, port: int, out: str
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    folder = Path(out)
    log = (folder / f"output_{rank}.txt").open("w")
    sys.stdout = sys.stderr = log
    try:
        result = function(*arguments)
    except BaseException:
        (folder / f"error_{rank}.part").write_text(f"rank {rank}: {traceback.format_exc()}")
        os.replace(folder / f"error_{rank}.part", folder / f"error_{rank}.txt")
        raise
    (folder / f"result_{rank}.part").write_bytes(pickle.dumps(result))
    os.replace(folder / f"result_{rank}.part", folder / f"result_{rank}.pickle")
