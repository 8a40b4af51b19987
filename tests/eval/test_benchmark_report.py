"""The report of a benchmark: what the table says, what the plot leaves out, which pictures are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.eval.test_results import ROW
from tests.eval.tiny_scorers import write_random_picture
from tim_ds.eval import benchmark_report
from tim_ds.eval.benchmark_report import samples_sheet, table
from tim_ds.eval.generate import picture_set
from tim_ds.eval.results import Column, SheetItem, spread

COLUMNS = [
    Column("overall", "overall", percent=True, plotted=True),
    Column("fid", "FID", is_lower_better=True),
    Column("never", "never"),
]


def test_every_row_is_a_line_with_its_making() -> None:
    making = {"num_steps": 4, "nfe": 8, "cfg_scale": 2.5, "size": "1024x2560"}
    rows = [
        replace(ROW, made_by=making, scores={"overall": 0.7612, "fid": 5.28431}),
        replace(ROW, label="others", made_by=None, scores={"overall": 0.5, "fid": None}),
    ]
    lines = table(rows, COLUMNS, notes="Said below.").splitlines()
    assert lines[0] == "GenEval" and lines[-1] == "Said below."
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert cells == [
        ["network", "size", "steps", "nfe", "cfg", "pictures", "overall", "FID"],
        ["tim", "1024x2560", "4", "8", "2.5", "4", "76.12", "5.284"],
        ["others", "-", "-", "-", "-", "4", "50.00", "-"],
    ]


def test_a_plot_is_made_of_rows_whose_evaluations_are_known(tmp_path: Path) -> None:
    unknown = replace(ROW, made_by=None)
    known = replace(ROW, made_by={"nfe": 8, "size": "8x8"})
    paths = benchmark_report.write([unknown], COLUMNS, tmp_path / "a", notes="")
    assert [path.name for path in paths] == ["results.json", "table.md"]
    paths = benchmark_report.write([unknown, known], COLUMNS, tmp_path / "b", notes="")
    assert [path.name for path in paths] == ["results.json", "table.md", "scores.png"]
    one, two = (
        benchmark_report.plot(rows, COLUMNS)
        for rows in ([known], [known, replace(known, made_by={"nfe": 2, "size": "8x8"})])
    )
    assert not np.array_equal(one, two), "the second point shows"


@pytest.mark.parametrize(
    ("count", "wanted", "places"), [(1, 6, [0]), (3, 6, [0, 1, 2]), (11, 3, [0, 5, 10]), (5, 1, [0])]
)
def test_shown_places_are_spread_over_all(count: int, wanted: int, places: list[int]) -> None:
    assert spread(count, wanted) == places


def test_a_wrong_picture_gets_a_red_frame(tmp_path: Path) -> None:
    for n in range(2):
        write_random_picture(tmp_path / f"{n}.png", n, grey=True)
    pictures = picture_set(tmp_path, ["0.png", "1.png"], progress=False)
    right, wrong = (
        samples_sheet(pictures, [SheetItem("a", (0, 1), (False, mark))], title="t", footnote="")
        for mark in (False, True)
    )
    red = np.array([0xD1, 0x49, 0x5B])
    assert not (right == red).all(axis=-1).any() and (wrong == red).all(axis=-1).any()
