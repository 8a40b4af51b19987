"""Drawing by all ranks together, and who leaves it."""

from __future__ import annotations

from tests.trainer.conftest import Groups


def test_ranks_leave_a_drawing_together_wherever_one_of_them_fails(groups: Groups) -> None:
    """Two ranks at ZeRO-3, some parameters split and some whole; from the first operation to the last."""
    told, others = groups.results(2, "leave_drawings")
    assert told["told"] == others["told"] and len(told["told"]) >= 15
    moments = [int(problem.removeprefix("RuntimeError: at operation ")) for _, problem in told["told"]]
    assert all(result is None for result, _ in told["told"])
    assert moments == sorted(set(moments)) and moments[0] == 1
    for found in (told, others):
        # Later pictures and steps are those of ranks that never failed, and nothing is left on the modules.
        assert found["equal"] and found["masters_equal"] and found["hooks"] == 0
