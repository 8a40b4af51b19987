"""Exponential moving average of the weights: float32, sharded like the optimiser, exact.

Every rank averages the pieces whose masters it updates, so an update costs no communication and nothing is
ever rounded to bfloat16, in which a decay of 0.9999 would not move a weight at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from tim_ds.trainer.engine import Engine


def decay_at(applied_steps: int, decay: float, *, warmup: bool) -> float:
    """Decay of the update that follows optimiser step number `applied_steps` (the first is 1)."""
    return min(decay, (1 + applied_steps) / (10 + applied_steps)) if warmup else decay


class Ema:
    """The average, begun as a copy of the masters (as the authors begin theirs)."""

    def __init__(self, engine: Engine, *, decay: float, warmup: bool = False) -> None:
        self._engine = engine
        self._decay = decay
        self._warmup = warmup
        self._masters = [shard.master for shard in engine.shards]
        self.values: dict[str, Tensor] = {shard.name: shard.master.clone() for shard in engine.shards}
        """One flat tensor a shard, by name."""

    @torch.no_grad()
    def update(self, applied_steps: int) -> None:
        """ema <- ema + (1 - decay) (master - ema). Call it after an applied step, and only then."""
        if self._masters:
            weight = 1.0 - decay_at(applied_steps, self._decay, warmup=self._warmup)
            # The fused form of a loop over the pieces.
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                list(self.values.values()), self._masters, weight
            )

    def full(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors by name, a few at a time. Called by all ranks, which all receive them."""
        return self._engine.full(self.values)

    def applied(self) -> AbstractContextManager[nn.Module]:
        """The root module with the averaged weights, on all ranks; the trained ones return to the bit."""
        return self._engine.weights(self.values)

    def write_into(self, targets: dict[str, nn.Parameter]) -> None:
        """Copy the average into frozen parameters (the teacher), given by the name of the trained one."""
        self._engine.write(self.values, targets)
