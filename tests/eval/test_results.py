"""Result rows, the log of scores, kept arrays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tim_ds.errors import RequestError
from tim_ds.eval.results import ResultRow, ScoreLog, add_row, kept_arrays, read_rows, versions

ROW = ResultRow(
    evaluation="geneval",
    title="GenEval",
    label="tim",
    pictures="pictures",
    pictures_sha256="a" * 64,
    num_pictures=4,
    made_by={"nfe": 4, "num_steps": 4},
    scorer={"protocol": 1},
    scores={"overall": 0.5},
    details={},
    versions={"torch": "2"},
    device="cpu",
)


def test_a_row_replaces_the_one_of_the_same_pictures_and_scorer(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    add_row(path, ROW)
    add_row(path, replace(ROW, scores={"overall": 0.6}))
    assert [row.scores["overall"] for row in read_rows(path, "geneval")] == [0.6]
    add_row(path, replace(ROW, pictures_sha256="b" * 64, made_by={"nfe": 1, "num_steps": 1}))
    rows = add_row(path, replace(ROW, scorer={"protocol": 2}))
    assert [row.nfe for row in rows] == [1, 4, 4]
    assert read_rows(path, "geneval") == rows


def test_results_of_another_benchmark_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    add_row(path, ROW)
    with pytest.raises(RequestError, match="results of 'geneval', expected 'dpg'"):
        add_row(path, replace(ROW, evaluation="dpg"))
    path.write_text("{}")
    with pytest.raises(RequestError, match="not the results of this evaluation"):
        read_rows(path, "geneval")


def test_versions_name_what_is_installed() -> None:
    found = versions(("no-such-library",))
    assert {"tim_ds", "torch", "numpy", "python"} <= found.keys() and "no-such-library" not in found


class TestScoreLog:
    def test_scores_come_back_after_an_interruption(self, tmp_path: Path) -> None:
        log = ScoreLog(tmp_path, "dpg", {"a": 1})
        log.add("x.png", [["yes", "no"]])
        log.add("日.png", None)
        assert ScoreLog(tmp_path, "dpg", {"a": 1}).done == {"x.png": [["yes", "no"]], "日.png": None}

    def test_a_line_cut_short_is_dropped_and_made_again(self, tmp_path: Path) -> None:
        log = ScoreLog(tmp_path, "dpg", {"a": 1})
        log.add("x", 1)
        log.add("y", 2)
        log.path.write_bytes(log.path.read_bytes()[:-3])
        again = ScoreLog(tmp_path, "dpg", {"a": 1})
        assert again.done == {"x": 1}
        again.add("y", 3)
        assert ScoreLog(tmp_path, "dpg", {"a": 1}).done == {"x": 1, "y": 3}

    def test_scores_of_another_setting_never_meet(self, tmp_path: Path) -> None:
        ScoreLog(tmp_path, "dpg", {"a": 1}).add("x", 1)
        other = ScoreLog(tmp_path, "dpg", {"a": 2})
        assert other.done == {}
        other.add("x", 2)
        assert ScoreLog(tmp_path, "dpg", {"a": 1}).done == {"x": 1}

    def test_a_file_whose_head_says_otherwise_is_not_believed(self, tmp_path: Path) -> None:
        log = ScoreLog(tmp_path, "dpg", {"a": 1})
        log.add("x", 1)
        lines = log.path.read_text().splitlines()
        log.path.write_text("\n".join([json.dumps({"a": 2}), *lines[1:]]) + "\n")
        assert ScoreLog(tmp_path, "dpg", {"a": 1}).done == {}


def test_arrays_are_made_once_and_again_when_damaged(tmp_path: Path) -> None:
    path, made = tmp_path / "cache" / "features.npz", []

    def make() -> dict[str, NDArray[Any]]:
        made.append(1)
        return {"pool": np.arange(6.0).reshape(2, 3)}

    for _ in range(2):
        np.testing.assert_array_equal(kept_arrays(path, make)["pool"], np.arange(6.0).reshape(2, 3))
    assert made == [1]
    path.write_bytes(path.read_bytes()[:-30])
    np.testing.assert_array_equal(kept_arrays(path, make)["pool"], np.arange(6.0).reshape(2, 3))
    assert made == [1, 1]
