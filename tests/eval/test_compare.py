"""Finished evaluations side by side: which rows are compared, the tables, the plot, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tim_ds.errors import RequestError
from tim_ds.eval import compare, nfe
from tim_ds.eval.handwriting import Scores


def row(weights: str, steps: int, distance: float, accuracy: float, label: str, **identity: Any) -> nfe.Row:
    scores = Scores(
        num_pictures=800,
        num_digit_cells=1600,
        frechet_distance=distance,
        frechet_floor=0.25,
        prompt_accuracy=accuracy,
        digit_accuracy=accuracy,
        digit_accuracy_by_digit={},
        count_accuracy=1.0,
        position_accuracy=None,
        num_position_pictures=0,
    )
    common = {"protocol": nfe.PROTOCOL, "prompts_sha256": "p", "scans_sha256": "s"}
    return nfe.Row(
        label=label,
        identity={**common, "weights_sha256": weights, "num_steps": steps, **identity},
        model=label,
        export="export",
        recipe_sha256=None,
        step=1,
        nfe=steps,
        seconds=1.0,
        seconds_per_picture=0.001,
        scores={"seen": scores},
        reader_accuracy=0.98,
        versions={},
        device="cpu",
    )


def stored(folder: Path, *rows: nfe.Row) -> str:
    folder.mkdir()
    (folder / nfe.RESULTS_NAME).write_text(json.dumps({"rows": [asdict(r) for r in rows]}))
    return str(folder)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Two runs of one setting, and one run of another in a folder that holds a second network."""
    a = stored(tmp_path / "a", row("a", 32, 0.5, 0.9, "run_a"), row("a", 1, 0.7, 0.8, "run_a"))
    b = stored(tmp_path / "b", row("b", 1, 0.9, 0.7, "run_b"), row("b", 32, 0.6, 1.0, "run_b"))
    c = stored(tmp_path / "c", row("c", 1, 0.75, 0.85, "noisy"), row("d", 1, 5.0, 0.1, "other"))
    return [f"exact={a},{b}", f"noisy={c}"]


def test_a_setting_holds_its_runs_by_step(words: list[str]) -> None:
    exact, noisy = compare.read_settings(words)
    assert exact.steps == (1, 32) and noisy.steps == (1,)
    np.testing.assert_array_equal(exact.distance, [[0.7, 0.5], [0.9, 0.6]])
    np.testing.assert_array_equal(exact.accuracy, [[0.8, 0.9], [0.7, 1.0]])
    np.testing.assert_array_equal(noisy.distance, [[0.75]])


def test_the_command_writes_mean_and_range(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert compare.main([*words, "--out", str(out)]) == 0
    text = (out / compare.TABLE_NAME).read_text()
    assert text in capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert lines[2] == ["exact", "2", "0.800 (0.700-0.900)", "0.550 (0.500-0.600)"]
    assert lines[3] == ["noisy", "1", "0.750", "-"]
    assert lines[6] == ["exact", "2", "75.0 (70.0-80.0)", "95.0 (90.0-100.0)"]
    with Image.open(out / compare.PLOT_NAME) as picture:
        assert np.asarray(picture).std() > 0


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (["exact"], "is written LABEL=FOLDER"),
        (["third={a}"], "holds the same weights as exact="),
        (["exact={e}"], "label 'exact' is given twice"),
        (["third={c}"], "holds noisy, other, not third"),
        (["third={e}"], "prompts_sha256 differ"),
        (["third={f}"], "no step count in common"),
        (["third={missing}"], "no finished rows"),
        (["third={g}"], "rows of several weights"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    words: list[str],
    changed: list[str],
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored(tmp_path / "e", row("e", 1, 0.7, 0.8, "e", prompts_sha256="others"))
    first = stored(tmp_path / "f1", row("f1", 1, 0.7, 0.8, "f"))
    second = stored(tmp_path / "f2", row("f2", 2, 0.7, 0.8, "f"))
    stored(tmp_path / "g", row("g1", 1, 0.7, 0.8, "g"), row("g2", 2, 0.7, 0.8, "g"))
    places = {name: str(tmp_path / name) for name in ("a", "c", "e", "g", "missing")}
    places["f"] = f"{first},{second}"
    more = [word.format(**places) for word in changed]
    with pytest.raises(RequestError, match=problem):
        compare.read_settings([*words, *more])
    assert compare.main([*words, *more, "--out", str(tmp_path / "out")]) == 2
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()
