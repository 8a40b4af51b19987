"""What the trainer's tests share. Fixtures import what they need themselves: tests of what does without
DeepSpeed run where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

POISONED_SAMPLE = 17
OF_THEIR_OWN = ("continue_elsewhere", "train_with_evaluations", "train_every_combination")
"""Cases that their tests start by themselves."""


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.trainer.ranks import write_data

    return write_data(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def poisoned_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes, with one sample so large that its loss overflows float32."""
    from tests.trainer.ranks import write_data

    return write_data(tmp_path_factory.mktemp("data") / "poisoned", poison={POISONED_SAMPLE: 1e25})


class Groups:
    """Results of `cases.py` on one and on two ranks: each group is started once, when first asked for."""

    def __init__(self, folder: Path, shards: Path, poisoned: Path) -> None:
        self.folder = folder
        self._data = (shards, poisoned)
        self._results: dict[int, list[dict]] = {}

    def folder_of(self, world_size: int, case: str) -> Path:
        return self.folder / str(world_size) / case

    def results(self, world_size: int, case: str) -> list:
        """What the case returned on each rank."""
        from tests.trainer.cases import CASES, run_cases
        from tests.trainer.ranks import run_ranks

        if world_size not in self._results:
            one_rank_is_enough = ("train_every_stage", "meet_poison")
            every = tuple(name for name in CASES if name not in OF_THEIR_OWN)
            cases = every if world_size > 1 else one_rank_is_enough
            folder = self.folder / str(world_size)
            self._results[world_size] = run_ranks(
                run_cases, cases, folder, *self._data, world_size=world_size, out=folder / "out"
            )
        return [result[case] for result in self._results[world_size]]


@pytest.fixture(scope="session")
def groups(tmp_path_factory: pytest.TempPathFactory, shards: Path, poisoned_shards: Path) -> Groups:
    return Groups(tmp_path_factory.mktemp("groups"), shards, poisoned_shards)
