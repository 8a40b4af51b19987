"""Running averages of the weights: float32, sharded like the optimiser, exact.

Every rank averages the pieces whose masters it updates, so an update costs no communication and nothing is
ever rounded to bfloat16, in which a decay of 0.9999 would not move a weight at all. However many averages a
run keeps, they read the same local masters; one of them is used for samples, export and guided targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from tim_ds.trainer.checkpoint import Piece
from tim_ds.trainer.config import EmaConfig
from tim_ds.trainer.ema_profiles import decay_at
from tim_ds.trainer.engine import Engine


def piece_kind(name: str) -> str:
    """What the pieces of the average `name` are called in a checkpoint."""
    return f"ema.{name}"


class Ema:
    """The averages, each begun as a copy of the masters (as the authors begin theirs)."""

    def __init__(self, engine: Engine, config: EmaConfig) -> None:
        self._engine = engine
        self._config = config
        self._masters = [shard.master for shard in engine.shards]
        self.averages: dict[str, dict[str, Tensor]] = {
            average.name: {shard.name: shard.master.clone() for shard in engine.shards}
            for average in config.averages
        }
        """By name of the average, then one flat tensor a shard, by name."""

    @property
    def values(self) -> dict[str, Tensor]:
        """The average in use: one flat tensor a shard, by name."""
        return self.averages[self._config.used.name]

    @torch.no_grad()
    def update(self, applied_steps: int) -> None:
        """ema <- ema + (1 - decay) (master - ema). Call it after an applied step, and only then."""
        if not self._masters:
            return
        for average in self._config.averages:
            # The fused form of a loop over the pieces.
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                list(self.averages[average.name].values()),
                self._masters,
                1.0 - decay_at(applied_steps, average),
            )

    def pieces(self, *, power_only: bool = False) -> Iterator[Piece]:
        """The averages of this rank's shards: all, for a checkpoint; power functions, for a snapshot."""
        for average in self._config.averages:
            if power_only and average.sigma_rel is None:
                continue
            for shard in self._engine.shards:
                value = self.averages[average.name][shard.name]
                yield Piece(piece_kind(average.name), shard.name, shard.start, value)

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors of the average in use, a module's at a time, each good until the next is asked for.
        All ranks call it, and all receive them."""
        return self._engine.full(self.values)

    def applied(self) -> AbstractContextManager[nn.Module]:
        """The root module with the average in use, on all ranks; the trained weights return to the bit."""
        return self._engine.weights(self.values)

    def write_into(self, targets: dict[str, nn.Parameter]) -> None:
        """Copy the average in use into frozen parameters (the teacher), by the name of the trained one."""
        self._engine.write(self.values, targets)
