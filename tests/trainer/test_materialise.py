"""Under ZeRO-3 a network is made piece by piece, and begins with the same bits as under any other stage."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.conftest import Groups


@pytest.mark.parametrize("start", ["fresh", "exported"])
def test_every_stage_begins_with_the_same_bits(groups: Groups, start: str) -> None:
    for found in groups.results(2, "begin_everywhere"):
        reference = found[f"{start} fp32 0"]
        assert max(float(value.abs().max()) for value in reference.values()) > 0.1
        for case in (f"{start} fp32 {stage}" for stage in (1, 2, 3)):
            assert reference.keys() == found[case].keys()
            assert all(torch.equal(value, found[case][name]) for name, value in reference.items()), case
        for case in (f"{start} bf16 {stage}" for stage in (1, 2, 3)):
            # The master of a bfloat16 weight begins as that weight.
            rounded = {name: value.bfloat16().float() for name, value in reference.items()}
            assert all(torch.equal(value, found[case][name]) for name, value in rounded.items()), case


def test_fresh_and_exported_weights_differ(groups: Groups) -> None:
    found = groups.results(2, "begin_everywhere")[0]
    fresh, exported = found["fresh fp32 0"], found["exported fp32 0"]
    assert any(not torch.equal(fresh[name], exported[name]) for name in fresh)


def test_a_run_splits_its_weights_before_there_is_an_engine(groups: Groups) -> None:
    """DeepSpeed would split a whole network too."""
    for found in groups.results(2, "gather_little"):
        assert found["split"] == [False, False, True], "stages 1, 2 and 3"


@pytest.mark.parametrize("start", ["fresh", "exported"])
def test_no_rank_holds_more_than_its_pieces_and_one_parameter(groups: Groups, start: str) -> None:
    for found in groups.results(2, "hold_little"):
        held = found[start]
        assert held["questions"] == 2 * found["parameters"], "network and teacher"
        # Network and teacher, halved among two ranks, each piece padded to whole elements.
        pieces = found["model"] + 8 * found["parameters"]
        assert 0.9 * found["model"] < held["end"] < 1.05 * pieces
        # A parameter while it is made: its value and the parameter around it, which share memory.
        assert held["peak"] <= 1.05 * pieces + 2 * found["largest"]
        assert held["peak"] < 1.5 * found["model"], "two whole networks would be twice the model"
