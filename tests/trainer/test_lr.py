from __future__ import annotations

import pytest

from tim_ds.trainer.config import OptimizerConfig
from tim_ds.trainer.lr import learning_rate


def rates(config: OptimizerConfig, total: int) -> list[float]:
    return [learning_rate(config, n, total) for n in range(total)]


def test_constant_without_warm_up_is_the_full_rate_from_the_first_step() -> None:
    assert rates(OptimizerConfig(lr=2.0), 3) == [2.0, 2.0, 2.0]


def test_warm_up_rises_linearly_and_spends_no_step_at_zero() -> None:
    assert rates(OptimizerConfig(lr=2.0, warmup_steps=4), 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_cosine_falls_from_the_full_rate_to_its_share_at_the_last_step(warmup: int) -> None:
    config = OptimizerConfig(lr=2.0, schedule="cosine", warmup_steps=warmup, final_lr_share=0.1)
    found = rates(config, 9)
    top = max(warmup - 1, 0)
    assert found[top] == 2.0
    assert found[-1] == pytest.approx(0.2, rel=1e-12)
    assert all(a > b for a, b in zip(found[top:], found[top + 1 :], strict=False))
    # Half-way down in steps is half-way down in rate.
    assert learning_rate(config, (top + 8) // 2, 9) == pytest.approx(1.1) or (top + 8) % 2


def test_the_rate_stays_at_its_end_beyond_the_last_step() -> None:
    config = OptimizerConfig(lr=2.0, schedule="cosine", final_lr_share=0.5)
    assert learning_rate(config, 50, 10) == pytest.approx(1.0)
