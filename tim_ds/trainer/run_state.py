"""What a checkpoint holds of a run, out of it and back into it, whatever ranks and stage wrote it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import version

import torch

from tim_ds import __version__
from tim_ds.trainer.checkpoint import Checkpoint, Piece
from tim_ds.trainer.ema import Ema, piece_kind
from tim_ds.trainer.engine import STATE_KEYS, Engine
from tim_ds.trainer.loop import Progress
from tim_ds.trainer.metrics import Sums


def state_pieces(engine: Engine, ema: Ema) -> Iterator[Piece]:
    """What a checkpoint holds of this rank: masters, AdamW's averages and the EMAs."""
    if engine.zero_stage == 0 and not engine.world.is_main:
        # Every rank has everything.
        return
    for shard in engine.shards:
        yield Piece("master", shard.name, shard.start, shard.master)
        for kind, value in engine.optimizer_state(shard).items():
            yield Piece(kind, shard.name, shard.start, value)
    yield from ema.pieces()


def restore(checkpoint: Checkpoint, engine: Engine, ema: Ema, sums: Sums) -> Progress:
    """Put a checkpoint's state into engine, average and sums, whatever ranks and stage wrote it."""
    for shard in engine.shards:
        checkpoint.fill("master", shard.name, shard.start, shard.master)
        for name, values in ema.averages.items():
            checkpoint.fill(piece_kind(name), shard.name, shard.start, values[shard.name])
        state = engine.optimizer_state(shard)
        for kind in STATE_KEYS:
            checkpoint.fill(kind, shard.name, shard.start, state[kind])
    engine.optimizer_steps = checkpoint.manifest["optimizer_steps"]
    engine.publish()
    world = engine.world
    ranks = checkpoint.manifest["world_size"]
    if ranks == world.size:
        sums.load_state(checkpoint.own(world.rank))
    elif world.is_main:
        # Other ranks than those that counted: their sums are added up here.
        sums.add_states([checkpoint.own(rank) for rank in range(ranks)])
    return Progress(**checkpoint.manifest["progress"])


def versions() -> dict[str, str]:
    """Of what wrote it."""
    return {
        "tim_ds": __version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }
