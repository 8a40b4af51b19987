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
from tim_ds.eval.benchmarks import Scored
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


def test_numbers_of_two_scorers_stand_under_titles_of_their_own() -> None:
    made = {"nfe": 8, "size": "8x8", "num_steps": 4, "cfg_scale": 2.5}
    one = replace(ROW, made_by=made, scores={"overall": 0.5}, scorer={"vqa": {"name": "blip"}, "protocol": 1})
    two = replace(one, label="again")
    other = replace(one, title="GenEval; calibrated", scorer={"vqa": {"name": "b" * 64}, "protocol": 1})
    alike = table([one, two], COLUMNS, notes="")
    assert alike.startswith("GenEval\n") and alike.count("| network") == 1
    apart = table([one, two, other], COLUMNS, notes="")
    assert apart.startswith("A. GenEval (vqa.name blip)\n") and apart.count("| network") == 2
    assert "\nB. GenEval; calibrated (vqa.name bbbbbbbb)\n" in apart
    assert benchmark_report.plot([one, two, other], COLUMNS).shape[0] > 400


def test_shares_of_nothing_lie_at_the_foot_of_the_plot() -> None:
    nothing, little = (
        benchmark_report.plot(
            [replace(ROW, made_by={"nfe": n, "size": "8x8"}, scores={"overall": share}) for n in (1, 2)],
            COLUMNS,
        )
        for share in (0.0, 0.005)
    )
    blue = np.array([0x1F, 0x6F, 0xEB])
    feet = [np.flatnonzero((image == blue).all(axis=-1).sum(axis=1) > 200) for image in (nothing, little)]
    # The line of zeros is lower than that of half a per cent; both are above the legend.
    assert feet[0].max() > feet[1].max() and feet[0].max() < nothing.shape[0] - 60


def test_the_sheet_says_what_is_shown_and_single_pictures_fill_a_gallery(tmp_path: Path) -> None:
    for n in range(8):
        write_random_picture(tmp_path / f"{n}.png", n)
    pictures = picture_set(tmp_path, [f"{n}.png" for n in range(8)], progress=False)
    row = replace(ROW, made_by={"nfe": 8, "size": "8x8", "num_steps": 4, "cfg_scale": 2.5})

    def sheet(items: list[SheetItem]) -> np.ndarray:
        scored = Scored(scores={}, details={}, columns=COLUMNS, items=items, notes="")
        return benchmark_report.sheet_of(row, scored, pictures)

    singles = sheet([SheetItem(f"class {n}", (n,)) for n in range(8)])
    pairs = sheet([SheetItem("a", (0, 1)), SheetItem("b", (2, 3))])
    # Eight in one row of a contact sheet would be more than four times as wide as high.
    assert singles.shape[1] < 2 * singles.shape[0] and pairs.shape[0] > 300
