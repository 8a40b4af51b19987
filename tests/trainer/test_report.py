from __future__ import annotations

import fcntl
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.ranks import recipe
from tim_ds.config.load import dump
from tim_ds.config.recipe import to_dict
from tim_ds.errors import TimError
from tim_ds.pipeline import write_png
from tim_ds.trainer.charts import (
    MAX_POINTS,
    Point,
    Series,
    labels,
    line_chart,
    number,
    stacked_chart,
    thinned,
    ticks,
)
from tim_ds.trainer.checkpoint import Piece
from tim_ds.trainer.checkpoint_folder import CheckpointFolder
from tim_ds.trainer.events import Events
from tim_ds.trainer.metrics import METRICS_FILE, NUM_BINS, MetricsLog
from tim_ds.trainer.report import _seconds_of, main, render
from tim_ds.trainer.run_record import read_run
from tim_ds.trainer.world import World

VOID = {"meta", "img", "circle", "path", "br"}


class Page(HTMLParser):
    """Elements of a page; asserts that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or tag == "path":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write_run(folder: Path, *, steps: int = 20, finished: bool = False, phases: bool = True) -> Path:
    settings = recipe(
        Path("data"), f"train.steps={steps}", "train.preview={prompts: [a <b>cat], sizes: [4x6]}"
    )
    log = MetricsLog(folder, tokens_per_pack=24, start_step=0)
    for step in range(1, steps + 1):
        if step == 5:
            log.skipped(step, "loss is not finite", [f"shard-0:<i>{n}</i>" for n in range(9)])
            continue
        means: dict[str, Any] = {
            "loss": 2.0 / step,
            "denoising": 1.0 / step,
            "directional": 0.0,
            "alignment": 0.0,
            "denoising_by_t": [1.0 / (step + i) for i in range(NUM_BINS - 1)] + [None],
            "denoising_by_interval": [None] * NUM_BINS,
            "grad_norm": 1.0,
            "images": 4,
            "tokens": 90,
            "packs": 4,
            "replaced": 1,
            "flops": {"model": 1e9, "executed": 1e9},
        }
        times = {"forward": 1e-6, "backward": 2e-6, "data_wait": 1e-7} if phases else {}
        log.log(
            step,
            means,
            lr=1e-3,
            applied_steps=step,
            skipped_steps=int(step > 5),
            phases={name: {"mean": t, "max": t} for name, t in times.items()},
            retries=int(phases and step == 7),
        )
    log.close()
    (folder / "recipe.yaml").write_text(dump(settings))
    (folder / "engine.json").write_text("{}")
    for step in (10, 20):
        sheet = np.full((30, 40, 3), 255, np.uint8)
        write_png(folder / "previews" / f"step_{step:09d}.png", sheet, {"step": step, "num_steps": [1, 4]})
    manifest = {"progress": {"step": 10}, "world_size": 2, "zero_stage": 3, "recipe": to_dict(settings)}
    manifest["versions"] = {"torch": "2.13"}
    pieces = iter([Piece("master", "w", 0, torch.zeros(9))])
    CheckpointFolder(folder / "checkpoints", World(), keep=2).save(10, pieces, {}, manifest)
    if finished:
        (folder / "export").mkdir()
        export = {"step": steps, "source": {"average": "main"}}
        (folder / "export" / "export.json").write_text(json.dumps(export))
    return folder


def test_a_page_is_whole_in_itself_and_can_be_read_aloud(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=True)
    nfe = run / "nfe"
    nfe.mkdir()
    (nfe / "results.json").write_text("{}")
    (nfe / "table.md").write_text("| steps | <score> |\n")
    write_png(nfe / "quality.png", np.zeros((9, 9, 3), np.uint8), {})
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    page = Page(text)
    # Nothing is fetched: pictures are in the page, links stay on it.
    assert "http" not in text and not page.all("link") and not page.all("script")
    assert len(page.all("img")) == 3
    for image in page.all("img"):
        assert (image["src"] or "").startswith("data:image/png;base64,") and len(image["alt"] or "") > 10
    assert any("columns: a <b>cat" in (image["alt"] or "") for image in page.all("img"))
    charts = page.all("svg")
    assert len(charts) >= 12 and all(len(chart["aria-label"] or "") > 20 for chart in charts)
    assert any((chart["aria-label"] or "").startswith("Requests made again") for chart in charts)
    assert all(a["href"] == "#main" or a["href"][1:] in text for a in page.all("a") if a["href"])
    assert all("tabindex" in d for d in page.all("div") if d.get("class") == "scroll")
    for part in (
        "finished at step 20",
        "small",
        "<score>",
        "Step 10 rows: 1, 4 sampling steps",
        "Skipped steps (1)",
        "shard-0:<i>0</i>",
        "and 3 more",
        "step_000000010",
        "torch 2.13",
        "average main",
        "tokens_per_pack: 24",
    ):
        assert part in page.text, part


def write_events(run: Path) -> None:
    """Begun, two saves refused, stopped by a signal; continued, killed, continued."""
    events = Events(run)
    events.add("began", 0, ranks=2, zero_stage=3)
    events.add("save failed", 8, reason="no space on <disk>")
    events.add("save left out", 9, reason="step 8 is still being written")
    events.add("saved again", 10, reason="after 1 that failed")
    events.add("stopped", 12, reason="stopped and saved after step 12 (SIGTERM on rank 1)")
    events.add("continued", 12, ranks=4, zero_stage=3)
    events.add("continued", 10, ranks=1, zero_stage=1, reason="rank_00000.safetensors: damaged")
    events.close()


def test_interruptions_are_marked_in_the_charts_and_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "events.jsonl").open("w") as file:
        file.write('not a line\n{"event": "began"}\n')
    write_events(run)
    page = Page(render([read_run(run)]))
    for part in (
        "save failed",
        "no space on <disk>",
        "SIGTERM on rank 1",
        "ranks: 4, ZeRO stage 3",
        "rank_00000.safetensors: damaged; the process before left no word",
        "Skipped steps (1)",
        "tick from below: skipped step",
    ):
        assert part in page.text, part
    assert page.text.count("left no word") == 1, "the one that was stopped said so"
    loss = next(c for c in page.all("svg") if (c["aria-label"] or "").startswith("Loss, unweighted"))
    assert (loss["aria-label"] or "").endswith("Marked: continuations 2, failed saves 2, skipped steps 1")
    charts = page.all("svg")
    marks = [line for line in page.all("line") if (line.get("class") or "").startswith("mark ")]
    # A tick for each failed save and skipped step, a line for each continuation.
    assert len(marks) == 5 * sum("Marked: " in (c["aria-label"] or "") for c in charts) >= 5 * 12
    for mark in marks:
        assert 0 <= float(mark["y1"] or "nan") < float(mark["y2"] or "nan") <= 216


def test_a_run_that_nothing_happened_to_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "No events.jsonl" in Page(render([read_run(run)])).text
    events = Events(run)
    events.add("began", 0, ranks=1, zero_stage=1)
    events.add("finished", 20)
    page = Page(render([read_run(run)]))
    assert "begun once, and every save went well" in page.text and "what happened" not in page.text.lower()


def test_what_a_broken_run_lacks_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", phases=False)
    for path in (run / "checkpoints" / "step_000000010").iterdir():
        path.unlink()
    for path in (run / "previews").iterdir():
        path.unlink()
    (run / "recipe.yaml").write_text("name: x\ntrain: {ema_decay: 0.9}\n")
    with (run / METRICS_FILE).open("a") as file:
        file.write('{"step": 21, "lo')
    (run / "engine.json").unlink()
    text = Page(render([read_run(run)])).text
    for part in (
        "stopped at step 20, last line",
        "none of its checkpoints can be read",
        "No previews were drawn",
        "recipe.yaml is of another version",
        "engine.json (No such file",
        "export (written when a run ends)",
        "No run recorded the phases",
    ):
        assert part in text, part


def test_a_folder_that_only_has_a_recipe_is_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(recipe(Path("data"))))
    record = read_run(tmp_path)
    assert record.status == "stopped at step 0 of 4"
    assert "No curve: no line was written" in Page(render([record])).text
    with pytest.raises(TimError, match="not the folder of a run"):
        read_run(tmp_path / "nowhere")
    assert main([str(tmp_path / "nowhere")]) == 2


def test_a_run_that_holds_its_lock_is_running(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        record = read_run(run)
    assert record.status == "running, at step 20 of 20"
    assert not any("export" in part for part in record.missing)
    assert read_run(run).status.startswith("stopped at step 20 of 20, last line ")


def test_several_runs_share_their_charts(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name)) for name in ("one", "two")]
    page = Page(render(runs, max_previews=1))
    assert "small (one)" in page.text and "small (two)" in page.text
    loss = next(c for c in page.all("svg") if (c["aria-label"] or "").startswith("Loss, unweighted"))
    assert "(one): from 1 at step 1 to 0.05 at step 20" in (loss["aria-label"] or "")
    assert "(two): from 1" in (loss["aria-label"] or "")
    assert page.text.count("1 of 2 sheets") == 2 and len(page.all("img")) == 2


def curve(*values: float) -> Series:
    return Series("x", tuple(Point(i + 1, v) for i, v in enumerate(values)), "c0")


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 17.0), (1e-5, 3e-5), (0.0, 1e9), (99.2, 99.9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 7
    room = 1e-6 * (high - low)
    assert all(low - room <= tick <= high + room for tick in found)
    assert np.ptp(np.diff(found)) < room
    assert all(len(number(tick)) <= 7 for tick in found)


@pytest.mark.parametrize(
    ("low", "high"), [(1.332, 1.342), (400_010.0, 400_060.0), (1000.2, 1002.3), (2e-5, 2.002e-5), (0.0, 1.0)]
)
def test_ticks_of_a_narrow_range_are_told_apart(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    told = labels(found)
    assert len(set(told)) == len(found) >= 4
    assert all(len(label) <= 9 for label in told)
    assert number(9999.7) == "10000"
    assert labels([0.0, 0.25, 0.5]) == ["0", "0.25", "0.5"]


def test_a_long_curve_is_thinned_to_means_and_keeps_its_end() -> None:
    values = np.random.default_rng(0).random(5003)
    short = thinned(curve(*values))
    assert len(short.points) == MAX_POINTS and short.points[-1].step == 5003
    counts = np.diff([0, *(p.step for p in short.points)])
    # Means of runs of 12 or 13 values: the mean of all, weighted by their lengths.
    assert np.average([p.value for p in short.points], weights=counts) == pytest.approx(
        values.mean(), rel=1e-12
    )


def test_a_logarithmic_axis_is_named_and_only_taken_where_it_can_be() -> None:
    assert "(log)" in line_chart("Loss", [curve(1.0, 1e-3)], may_log=True)
    assert "(log)" not in line_chart("Loss", [curve(1.0, 0.5)], may_log=True)
    assert "(log)" not in line_chart("Loss", [curve(1.0, 0.0)], may_log=True)
    assert line_chart("Loss", [Series("x", (), "c0")]) == ""


@pytest.mark.parametrize("values", [(3.0,), (0.0, 0.0), (5.0, 5.0, 5.0)])
def test_curves_without_extent_are_drawn_inside_the_picture(values: tuple[float, ...]) -> None:
    page = Page(line_chart("x", [curve(*values)], from_zero=True))
    for text in page.all("text"):
        assert -1 <= float(text["x"] or "nan") <= 461 and 0 <= float(text["y"] or "nan") <= 251


def test_a_carried_derivative_has_its_share_of_the_operations() -> None:
    phases = {"forward_and_derivative": {"mean": 8.0, "max": 9.0}, "backward": {"mean": 4.0, "max": 4.0}}
    found = _seconds_of({"phases": phases, "derivative_share": 0.25})
    assert found == {"forward": 6.0, "counted_derivative": 2.0, "backward": 4.0}
    assert _seconds_of({"phases": phases}) == {"forward_and_derivative": 8.0, "backward": 4.0}


def test_shares_lie_on_each_other() -> None:
    page = Page(stacked_chart("Share", [curve(30.0, 40.0), curve(70.0, 60.0)]))
    first, second = (path["d"] or "" for path in page.all("path"))
    # The lower edge of the second is the upper edge of the first; 100 % is the top of the frame.
    top_of_first = [pair.split() for pair in first[1:-1].split("L")][:2]
    bottom_of_second = [pair.split() for pair in second[1:-1].split("L")][2:]
    assert top_of_first == bottom_of_second[::-1]
    assert [pair.split()[1] for pair in second[1:-1].split("L")][:2] == ["10.0", "10.0"]
