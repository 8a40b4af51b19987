from __future__ import annotations

import pytest

from tests.trainer.conftest import Groups
from tim_ds.trainer.config import TrainConfig
from tim_ds.trainer.ema import Ema

CASES = [f"zero{stage} fp32" for stage in range(4)] + ["zero1 bf16", "zero3 bf16"]


@pytest.mark.parametrize("case", CASES)
def test_the_sharded_average_is_the_average_of_the_whole_masters(groups: Groups, case: str) -> None:
    for found in groups.results(2, "average_by_hand"):
        assert found[case]["error"] == 0.0
        assert found[case]["moved"] > 1e-3
        assert found[case]["dtypes"] == {"torch.float32"}


@pytest.mark.parametrize("case", CASES)
def test_each_rank_averages_its_own_pieces_from_stage_1_on(groups: Groups, case: str) -> None:
    first, second = (found[case] for found in groups.results(2, "average_by_hand"))
    if case.startswith("zero0"):
        assert first["elements"] == second["elements"] == first["parameters"]
    else:
        assert first["elements"] + second["elements"] == first["parameters"]
        assert max(first["elements"], second["elements"]) < 0.6 * first["parameters"]


BORROWED = [f"zero{stage} threshold None" for stage in range(3)]
BORROWED += [f"zero3 threshold {threshold}" for threshold in (0, 100_000)]


@pytest.mark.parametrize("case", BORROWED)
def test_sampling_from_the_average_leaves_no_trace_in_training(groups: Groups, case: str) -> None:
    for found in groups.results(2, "borrow_average"):
        assert found[case]["error"] == 0.0
        assert found[case]["size"] > 1e-3
        assert found[case]["masters_equal"]


def test_warm_up_shortens_the_memory_of_the_first_steps() -> None:
    config = TrainConfig(steps=1, ema_decay=0.99, ema_warmup=True)
    ema = Ema.__new__(Ema)
    ema._decay, ema._warmup = config.ema_decay, config.ema_warmup
    assert [ema.decay_at(n) for n in (1, 2, 10)] == [2 / 11, 3 / 12, 11 / 20]
    assert ema.decay_at(10_000) == 0.99
