"""Learning-rate schedules as pure functions of the number of optimiser steps already applied."""

from __future__ import annotations

import math

from tim_ds.trainer.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, applied_steps: int, total_steps: int) -> float:
    """Learning rate of the next optimiser step.

    Warm-up is linear: step n of w has n / w of the full rate, so that no step is spent at zero. `cosine`
    then falls from the full rate, at the last step of the warm-up, to `final_lr_share` of it at the last
    step of the run.

    Args:
        applied_steps: optimiser steps applied so far; skipped ones do not count.
        total_steps: of the run.
    """
    if applied_steps + 1 < config.warmup_steps:
        return config.lr * (applied_steps + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start = max(config.warmup_steps - 1, 0)
    done = min((applied_steps - start) / max(total_steps - 1 - start, 1), 1.0)
    share = config.final_lr_share
    return config.lr * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * done)))
