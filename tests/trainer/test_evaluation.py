"""Evaluation while training: the numbers of the CLI, the same after a resume, refused at the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.cases import run_cases
from tests.trainer.conftest import Groups
from tests.trainer.ranks import lines_without_clock, recipe, run_ranks
from tim_ds.errors import ConfigError
from tim_ds.eval import nfe
from tim_ds.eval.benchmark_cli import DpgOptions, run_dpg
from tim_ds.eval.generate import Sampling
from tim_ds.eval.results import read_rows


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, shards: Path, poisoned_shards: Path
) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("evaluation")
    case = "train_with_evaluations"
    results = run_ranks(
        run_cases, (case,), folder, shards, poisoned_shards, world_size=2, out=folder / "out", timeout_s=300
    )
    return folder / case, results[0][case]


def evaluations(run: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line["evaluation"] for line in lines_without_clock(run) if "evaluation" in line}


def test_scores_are_logged_and_are_those_of_the_evaluation_itself(
    found: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    """ZeRO-3 on two ranks against the export, in one process."""
    folder, facts = found
    logged = evaluations(folder / "whole")
    assert logged.keys() == {2, 4}
    sets = {"nfe/seen", "nfe/held_back", "resolution/8x8", "dpg/8x8"}
    assert {name.rsplit("/", 2)[0] for name in logged[4]} == sets
    settings = nfe.Settings(steps=(1,), num_seen=65, num_held_back=17)
    evaluation = nfe.run(
        [(None, folder / "whole" / "export")], Path(facts["data"]), tmp_path, settings, progress=False
    )
    for name, scores in evaluation.rows[0].scores.items():
        for key in ("frechet_distance", "digit_accuracy", "prompt_accuracy"):
            # Weights that two ranks gather are the exported ones: the same pictures, up to float32 sums.
            assert logged[4][f"nfe/{name}/1_steps/{key}"] == pytest.approx(getattr(scores, key), rel=1e-3)
    options = DpgOptions(
        out=tmp_path / "dpg",
        export=folder / "whole" / "export",
        questions=folder / "dpg_bench.csv",
        vqa=str(folder / "vilt"),
        num=1,
        sampling=Sampling(size="8x8", num_steps=1),
        progress=False,
    )
    [row] = run_dpg(options)
    assert row.scores == {key: logged[4][f"dpg/8x8/1_steps/{key}"] for key in row.scores}
    drawn = folder / "whole" / "evaluations" / "dpg_8x8" / "steps_0001" / "pictures"
    for name in ("dog", "cat", "car"):
        ours, theirs = (
            np.asarray(Image.open(place / name / "00000.png")).astype(int)
            for place in (drawn, tmp_path / "dpg" / "pictures")
        )
        # Weights that two ranks gather are the exported ones: a value may cross a rounding edge.
        assert np.abs(ours - theirs).max() <= 1 and ours.std() > 1
    assert logged[2] != logged[4]
    board = EventAccumulator(str(folder / "whole" / "tensorboard"))
    board.Reload()
    scalars = board.Scalars("evaluation/nfe/seen/1_steps/frechet_distance")
    assert [event.step for event in scalars] == [2, 4]
    assert [event.step for event in board.Images("evaluation/resolution/8x8/1_steps")] == [2, 4]


def test_a_benchmark_leaves_the_rows_of_every_step(found: tuple[Path, dict[str, str]]) -> None:
    """The rows of `launch/evaluate.py`, and on the disk the pictures of one evaluation alone."""
    folder, _ = found
    for run in ("whole", "resumed"):
        place = folder / run / "evaluations" / "dpg_8x8"
        rows = read_rows(place / "results.json", "dpg")
        assert [row.label for row in rows] == ["step 2", "step 4"]
        assert [row.made_by["step"] for row in rows if row.made_by] == [2, 4]
        assert all(row.nfe == 1 and row.num_pictures == 3 and "transformers" in row.versions for row in rows)
        assert "step 4" in (place / "table.md").read_text() and (place / "steps_0001.png").stat().st_size > 0
        assert len(list(place.rglob("*/0*.png"))) == 3 and not list(place.rglob("cache"))


def test_a_failing_evaluation_does_not_end_the_run(found: tuple[Path, dict[str, str]]) -> None:
    folder, _ = found
    lines = [line for line in lines_without_clock(folder / "failing") if "evaluation" in line]
    told = {line["step"]: line.get("failed", {}).get("dpg/8x8/1_steps") for line in lines}
    assert told == {
        1: "RuntimeError: out of memory",
        2: "ValueError: a scorer with a flaw",
        3: "OSError: [Errno 28] No space left on device",
        4: None,
    }
    assert "dpg/8x8/1_steps/overall" in lines[3]["evaluation"] and not lines[0]["evaluation"]
    rows = read_rows(folder / "failing" / "evaluations" / "dpg_8x8" / "results.json", "dpg")
    assert [row.label for row in rows] == ["step 4"]
    board = EventAccumulator(str(folder / "failing" / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("evaluation/failures")] == [1, 1, 1, 0]


def test_ranks_that_draw_together_leave_together_and_train_on(found: tuple[Path, dict[str, str]]) -> None:
    """ZeRO-3; what rank 1 raised in the middle of a forward costs pictures and scores, no bit of the run."""
    folder, _ = found
    lines = [line for line in lines_without_clock(folder / "in_step") if "evaluation" in line]
    assert [line.get("failed") for line in lines] == [
        {"dpg/8x8/1_steps": "RuntimeError: out of memory"},
        None,
    ]
    assert "dpg/8x8/1_steps/overall" in lines[1]["evaluation"]
    runs = [folder / "in_step", folder / "untroubled"]
    sheets = [sorted(path.name for path in (run / "previews").iterdir()) for run in runs]
    assert sheets[0] == sheets[1][1:] and len(sheets[1]) == 2
    troubled, untroubled = (
        [line for line in lines_without_clock(run) if "evaluation" not in line] for run in runs
    )
    assert troubled == untroubled and len(troubled) == 2


def test_an_evaluation_is_given_up_where_the_run_must_stop(found: tuple[Path, dict[str, str]]) -> None:
    """Scoring that would never end, and a signal to rank 0 meanwhile: the run saves."""
    folder, _ = found
    lines = lines_without_clock(folder / "stopping")
    assert [line["failed"] for line in lines if "failed" in line] == [
        {"dpg/8x8/1_steps": "given up, because the run was asked to stop"}
    ] * len([line for line in lines if "evaluation" in line])
    steps = [line["step"] for line in lines if "evaluation" in line]
    assert 1 <= len(steps) <= 2 and list((folder / "stopping" / "checkpoints").glob(f"*{steps[-1]}"))


def test_a_resumed_run_logs_the_same(found: tuple[Path, dict[str, str]]) -> None:
    folder, _ = found
    whole, resumed = (lines_without_clock(folder / name) for name in ("whole", "resumed"))
    assert whole == resumed and sum("evaluation" in line for line in whole) == 2


def test_training_does_not_notice(found: tuple[Path, dict[str, str]], groups: Groups) -> None:
    folder, _ = found
    plain = Path(groups.results(2, "train_every_stage")[0]["zero3"])
    without = [line for line in lines_without_clock(folder / "whole") if "evaluation" not in line]
    assert without == lines_without_clock(plain)


def test_missing_data_end_the_run_before_its_first_step(found: tuple[Path, dict[str, str]]) -> None:
    folder, facts = found
    assert "manifest.json: not found; build the data with" in facts["refused"]
    assert lines_without_clock(folder / "refused") == []
    assert facts["unscored"].startswith("train.evaluation.benchmarks[0]: --vqa ")
    assert facts["unscored"].endswith("no such folder of a model")
    assert lines_without_clock(folder / "unscored") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("every_steps: -1", "train.evaluation.every_steps: expected 0 or more, received -1"),
        ("kinds: [geneval]", "train.evaluation.kinds: expected some of nfe, resolution"),
        ("kinds: []", "train.evaluation.kinds: expected some of nfe, resolution"),
        ("num_steps: [0]", "train.evaluation.num_steps: expected numbers of at least 1"),
        ("sizes: [8x8]", "train.evaluation.sizes, scorer: belong to prompts_file"),
        ("prompts_file: a.txt", "train.evaluation.prompts_file: needs sizes and a scorer"),
        (
            "benchmarks: [{kind: dpg, size: 8x8}, {kind: dpg, size: 8x8}]",
            "train.evaluation.benchmarks: expected each kind and size once, received dpg_8x8, dpg_8x8",
        ),
        ("benchmarks: [{kind: imagenet, size: 8x8}]", "benchmarks.count: needed by imagenet"),
        ("benchmarks: [{kind: dpg, size: 8x8, num: 0}]", "benchmarks.num: expected at least 1, received 0"),
        (
            "prompts_file: a.txt, sizes: [8x8], scorer: 'a:b'",
            "train.evaluation.kinds: prompts_file belongs to 'resolution' alone",
        ),
    ],
)
def test_contradictions_are_named(settings: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(Path("shards"), f"train.evaluation={{{settings}}}")
    assert message in str(caught.value)


def test_the_default_evaluates_nothing() -> None:
    settings = recipe(Path("shards")).train.evaluation
    assert settings.every_steps == 0 and replace(settings, every_steps=5).kinds == ("nfe",)
