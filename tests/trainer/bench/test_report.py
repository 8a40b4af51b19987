"""What is printed and stored: every claim beside its goal, and none from a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.bench.recipes import TEXT, recipe
from tim_ds.errors import RequestError
from tim_ds.trainer.bench import report
from tim_ds.trainer.bench.measure import Refusal, Row

GIB = 2**30
ABOUT: dict[str, Any] = {
    "gpu": "a GPU", "torch": "2.0", "commit": "abc", "date": "2020-01-01", "recipe": "t2i_xl", "command": "x",
}  # fmt: skip


def row(implementation: Any, objective: Any, p50: float, *, size: str = "1024", **changes: Any) -> Row:
    values: dict[str, Any] = dict(
        size=size, implementation=implementation, objective=objective, images=32, tokens=32768, p20=0.9 * p50,
        p50=p50, p80=1.1 * p50, repetitions=5, peak_bytes=40 * GIB, model_flops=int(1e14),
        executed_flops=int(1.2e14), mfu=0.4, loss_error=1e-6, gradient_error=1e-5, timed_error=1e-3,
        prepare_s=1.0, paths={}, allocator_retries=0,
    )  # fmt: skip
    return Row(**{**values, **changes})


FOUND: list[Row | Refusal] = [
    row("ours", "flow matching", 800.0),
    row("ours", "dde", 1000.0, peak_bytes=41 * GIB, executed_flops=int(1.5e14)),
    row("ours", "paired", 900.0, peak_bytes=43 * GIB),
    row("baseline", "dde", 1900.0, loss_error=None, gradient_error=None),
    row("baseline, compiled", "dde", 980.0, loss_error=None, gradient_error=None, allocator_retries=2),
    Refusal("1024", "baseline", "flow matching", "out of memory", "CUDA out of memory"),
    row("ours", "flow matching", 300.0, size="256"),
]


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_goals_stand_beside_what_was_measured() -> None:
    text = report.goals(FOUND)
    for expected in (
        "| 1024: images a second, ours with dde over baseline | >= 1.8x | 1.900x | yes | - |",
        "| 1024: images a second, ours with paired over baseline | >= 1.8x | 2.111x | yes | - |",
        "| 1024: images a second, ours with dde over baseline, compiled | >= 1.1x | 0.980x | no | - |",
        "| 1024: time of a step with dde over flow matching | <= 1.33x | 1.250x | yes | 1.250x |",
        "| 1024: time of a step with paired over flow matching | <= 1.25x | 1.125x | yes | 1.000x |",
        "| 256: time of a step with dde over flow matching | <= 1.22x | not measured | - | - |",
        "| 256: time of a step with paired over flow matching | <= 1.14x | not measured | - | - |",
        "| 1024: peak memory with dde over flow matching | <= 1.05x | 1.025x | yes | - |",
        "| 1024: peak memory with paired over flow matching | <= 1.05x | 1.075x | no | - |",
    ):
        assert expected in text.splitlines()
    assert len(text.splitlines()) == 2 + len(report.GOALS)
    # Nothing measured, nothing reached.
    assert report.goals([]).count("not measured") == len(report.GOALS)
    without_memory = [replace(one, peak_bytes=None) for one in FOUND if isinstance(one, Row)]
    assert lines_of(report.goals(without_memory), "| 1024: peak memory with dde")[0].endswith(
        "| not measured | - | - |"
    )


def test_the_table_compares_like_with_like() -> None:
    table = report.table(FOUND)
    heads = table.splitlines()[0].count("|")
    assert all(line.count("|") == heads for line in table.splitlines())
    assert len(table.splitlines()) == 2 + 6
    (dde,) = lines_of(table, "| 1024 | ours | dde")
    expected = (
        "| 1000.00 (900.00, 1100.00) | 32.00 | 1.90x | 1.250 | 40.0% | 41.00 GiB | 1e-06, 1e-05, 1e-03 |"
    )
    assert dde.endswith(expected)
    (flow,) = lines_of(table, "| 1024 | ours | flow")
    # The baseline's flow matching had no memory: there is nothing to compare with.
    assert "| 40.00 |  | 1.000 |" in flow
    (compiled,) = lines_of(table, "| 1024 | baseline, compiled | dde")
    assert "2 allocator retries" in compiled and "| -, -, 1e-03 |" in compiled


def test_a_page_names_what_is_missing() -> None:
    page = report.page(ABOUT, FOUND)
    assert "- 1024, baseline, flow matching: out of memory: CUDA out of memory" in page
    assert "- gpu: a GPU" in page and "Goals, set before any measurement" in page
    assert report.NOT_A_CLAIM not in page


def test_a_page_of_a_cpu_judges_no_goal() -> None:
    page = report.page({**ABOUT, "gpu": None}, FOUND)
    assert page.index(report.NOT_A_CLAIM) < page.index("| 1024 |")
    assert "set before" not in page and "yes" not in page


def test_results_are_stored_and_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    report.store(path, ABOUT, FOUND)
    rows_first = sorted(FOUND, key=lambda one: isinstance(one, Refusal))
    assert report.load(path) == (ABOUT, rows_first)
    assert report.earlier(path, {**ABOUT, "date": "later", "command": "y"}) == rows_first
    with pytest.raises(RequestError, match="measured elsewhere: commit abc, here other; store to another"):
        report.earlier(path, {**ABOUT, "commit": "other"})
    path.write_text("{}")
    with pytest.raises(RequestError, match=r"step\.json: not results of this benchmark"):
        report.load(path)


def test_a_later_result_replaces_an_earlier_one_but_not_for_lack_of_time() -> None:
    again = row("ours", "dde", 990.0)
    late = Refusal("1024", "ours", "paired", "no time", "0 s left")
    crowded = Refusal("1024", "baseline", "dde", "out of memory", "CUDA out of memory")
    mended = row("baseline", "flow matching", 1500.0)
    found = {one.key: one for one in report.merged(FOUND, [again, late, crowded, mended])}
    assert len(found) == len(FOUND)
    for one in (again, crowded, mended):
        assert found[one.key] is one
    assert found[late.key] is FOUND[2]


def test_the_plot_is_drawn_where_there_are_rows(tmp_path: Path) -> None:
    assert not report.plot(ABOUT, FOUND[5:6], tmp_path / "none.png")
    assert report.plot(ABOUT, FOUND, tmp_path / "step.png")
    assert [p.name for p in tmp_path.iterdir()] == ["step.png"]


def test_settings_and_machine_are_told() -> None:
    settings = recipe(TEXT)
    about = report.where(
        settings, torch.device("cpu"), engine="plain", backend="inductor", text_tokens=5, command=["a", "b"]
    )
    assert about["gpu"] is None and about["torch"] == torch.__version__ and about["command"] == "a b"
    assert about["engine"] == "plain" and about["tokens_per_pack"] == 64 and about["text_tokens"] == 5
    assert set(report.MAY_DIFFER) < set(about)


def test_without_a_gpu_operations_are_counted_and_nothing_is_timed() -> None:
    settings = recipe(TEXT)
    text = report.without_gpu(settings, {"64": [((64, 64), 4)]}, 5)
    assert text.startswith("No CUDA device here: nothing is timed.")
    (line,) = lines_of(text, "| 64 | 4 | 16 |")
    flow, dde, paired = line.split("|")[4:7]
    assert " ms" not in text and "images/s" not in text
    assert 1.0 < float(paired.strip(" x")) < float(dde.strip(" x")) < 1.34 and float(flow) >= 0
