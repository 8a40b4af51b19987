"""Quality against steps: rows, what decides their reuse, the report, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.handwriting import Settings as DataSettings
from data_pipeline.handwriting import build, compose, load_scans, parse
from tests.networks import export_of, write_tiny_export
from tim_ds.errors import CheckpointError, RequestError
from tim_ds.eval import cli, nfe, report
from tim_ds.pipeline import PipelineOutput, TiMPipeline

SEEN_LAYOUTS = {("row", 1), ("row", 2), ("row", 3), ("column", 2), ("column", 3), ("column", 4)}
SETTINGS = nfe.Settings(steps=(1, 3), num_seen=70, num_held_back=17)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nfe") / "data"
    build(folder, DataSettings(samples=4, factor=4, text_width=16), progress=False)
    return folder


@pytest.fixture
def exports(tmp_path: Path) -> list[tuple[str | None, Path]]:
    tim = write_tiny_export(tmp_path / "tim", export_of(name="tim"), seed=0)
    flow = write_tiny_export(tmp_path / "flow", export_of(name="flow", mode="diffusion"), seed=1)
    return [(None, tim), ("flow matching", flow)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(run, steps) of every call of a pipeline."""
    made: list[tuple[str, int]] = []
    real = TiMPipeline.__call__

    def counted(self: TiMPipeline, *args: Any, **options: Any) -> PipelineOutput:
        made.append((self.export.source.name, options["num_steps"]))
        return real(self, *args, **options)

    monkeypatch.setattr(TiMPipeline, "__call__", counted)
    return made


def run(exports: Any, data: Path, out: Path, settings: nfe.Settings = SETTINGS) -> nfe.Evaluation:
    return nfe.run(exports, data, out, settings, progress=False)


def stored(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["rows"]


def test_rows_say_what_was_measured_and_with_what(exports: Any, data: Path, tmp_path: Path) -> None:
    evaluation = run(exports, data, tmp_path / "out")
    assert [(row.label, row.num_steps, row.nfe) for row in evaluation.rows] == [
        ("tim", 1, 1),
        ("tim", 3, 3),
        ("flow matching", 1, 1),
        ("flow matching", 3, 3),
    ]
    assert [row.identity["mode"] for row in evaluation.rows] == ["transition"] * 2 + ["diffusion"] * 2
    rows = stored(tmp_path / "out")
    assert len(rows) == 4
    for row in rows:
        assert row["recipe_sha256"] == "f" * 64 and row["step"] == 7
        assert len(row["identity"]["weights_sha256"]) == 64
        assert {"tim_ds", "torch", "numpy", "scikit-learn"} <= row["versions"].keys()
        assert row["scores"]["seen"]["num_pictures"] == 70
        assert row["scores"]["held_back"]["num_digit_cells"] == 4 * 17
        assert row["seconds_per_picture"] > 0


def test_scores_are_those_of_the_stored_pictures(exports: Any, data: Path, tmp_path: Path) -> None:
    """Sampled again, picture by picture, and scored apart from the evaluation."""
    evaluation = run(exports, data, tmp_path / "out")
    row, samples = evaluation.rows[1], evaluation.samples[1]
    seen, held_back = evaluation.sets
    pipe = TiMPipeline.from_pretrained(exports[0][1])
    for i in (0, 7, 69):
        again = pipe(seen.captions[i], seen.prompts[i].size_px, num_steps=3, seeds=[seen.seeds[i]]).pixels[0]
        # Float32 sums of another batch may move a value across a rounding edge: one level.
        assert np.abs(samples["seen"][i].astype(int) - again).max() <= 1
    for prompts in (seen, held_back):
        assert evaluation.scorer.score(prompts.prompts, samples[prompts.name]) == row.scores[prompts.name]


def test_prompts_follow_the_data_and_the_held_back_shape(data: Path) -> None:
    seen, held_back = nfe.draw_prompt_sets(data, nfe.Settings())
    assert len(seen.prompts) == 800 and len(held_back.prompts) == 200
    assert {(p.orientation, len(p.cells)) for p in seen.prompts} == SEEN_LAYOUTS
    assert any(None in p.cells for p in seen.prompts)
    assert {(len(p.cells), p.orientation) for p in held_back.prompts} == {(4, "row")}
    for prompts in (seen, held_back):
        assert tuple(map(parse, prompts.captions)) == prompts.prompts
        assert len(set(prompts.seeds)) == len(prompts.seeds)
    again, _ = nfe.draw_prompt_sets(data, nfe.Settings())
    other, _ = nfe.draw_prompt_sets(data, nfe.Settings(seed=1))
    assert again == seen and other.prompts != seen.prompts


def test_finished_rows_are_not_sampled_again(exports: Any, data: Path, tmp_path: Path, calls: list) -> None:
    first = run(exports, data, tmp_path / "out")
    assert len(calls) == 4 * 2
    calls.clear()
    second = run(exports, data, tmp_path / "out")
    assert calls == []
    assert second.rows == first.rows
    for a, b in zip(first.samples, second.samples, strict=True):
        for name in a:
            for x, y in zip(a[name], b[name], strict=True):
                np.testing.assert_array_equal(x, y)


def test_more_steps_sample_only_what_is_new(exports: Any, data: Path, tmp_path: Path, calls: list) -> None:
    run(exports[:1], data, tmp_path / "out")
    calls.clear()
    evaluation = run(exports[:1], data, tmp_path / "out", replace(SETTINGS, steps=(1, 2)))
    assert set(calls) == {("tim", 2)}
    assert [row.num_steps for row in evaluation.rows] == [1, 2]
    # What was not asked for this time is kept.
    assert [row["identity"]["num_steps"] for row in stored(tmp_path / "out")] == [1, 2, 3]


def test_a_new_label_renames_finished_rows(exports: Any, data: Path, tmp_path: Path, calls: list) -> None:
    run(exports[:1], data, tmp_path / "out")
    calls.clear()
    evaluation = run([("TiM", exports[0][1])], data, tmp_path / "out")
    assert calls == [] and evaluation.labels == ["TiM"]
    assert {row["label"] for row in stored(tmp_path / "out")} == {"TiM"}


def test_other_weights_make_rows_anew(exports: Any, data: Path, tmp_path: Path, calls: list) -> None:
    run(exports, data, tmp_path / "out")
    calls.clear()
    changed = write_tiny_export(tmp_path / "trained_on", export_of(name="tim"), seed=5)
    run([(None, changed), exports[1]], data, tmp_path / "out")
    assert set(calls) == {("tim", 1), ("tim", 3)}
    assert len(stored(tmp_path / "out")) == 4, "rows of the old weights are gone"


@pytest.mark.parametrize(
    "change",
    [{"num_seen": 71}, {"num_held_back": 18}, {"seed": 1}, {"cfg_scale": 2.0}],
    ids=lambda c: next(iter(c)),
)
def test_other_settings_make_rows_anew(
    exports: Any, data: Path, tmp_path: Path, calls: list, change: dict[str, Any]
) -> None:
    settings = replace(SETTINGS, steps=(1,))
    run(exports[:1], data, tmp_path / "out", settings)
    calls.clear()
    evaluation = run(exports[:1], data, tmp_path / "out", replace(settings, **change))
    assert len(calls) == 2
    assert evaluation.rows[0].nfe == (2 if "cfg_scale" in change else 1)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_pictures_are_sampled_again(
    exports: Any, data: Path, tmp_path: Path, calls: list, damage: str
) -> None:
    run(exports[:1], data, tmp_path / "out")
    calls.clear()
    [path] = (tmp_path / "out" / "samples").glob("*_steps0003.npz")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    run(exports[:1], data, tmp_path / "out")
    assert set(calls) == {("tim", 3)}


def test_an_interruption_loses_one_row_at_most(
    exports: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list
) -> None:
    counted: Callable[..., PipelineOutput] = TiMPipeline.__call__

    def interrupted(self: TiMPipeline, *args: Any, **options: Any) -> PipelineOutput:
        if self.export.source.name == "flow" and options["num_steps"] == 3:
            raise KeyboardInterrupt
        return counted(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TiMPipeline, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(exports, data, tmp_path / "out")
    assert len(stored(tmp_path / "out")) == 3
    calls.clear()
    assert len(run(exports, data, tmp_path / "out").rows) == 4
    assert set(calls) == {("flow", 3)}


def test_a_perfect_network_gets_perfect_scores(
    exports: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline that pastes training scans: the whole chain from captions to accuracies."""
    train, _ = load_scans()

    def paste(self: TiMPipeline, prompts: Any, sizes: Any, **options: Any) -> PipelineOutput:
        rng = np.random.default_rng(0)
        drawn = [compose(parse(caption), train, rng)[0, ..., None] for caption in prompts]
        images = [np.round((x + 1) * 127.5).astype(np.uint8) for x in drawn]
        return PipelineOutput(
            pixels=images,
            latents=[],
            prompts=tuple(prompts),
            sizes=tuple(sizes),
            seeds=tuple(options["seeds"]),
            negative_prompts=(None,) * len(images),
            nfe=1,
            seconds=1.0,
            settings={},
        )

    monkeypatch.setattr(TiMPipeline, "__call__", paste)
    settings = nfe.Settings(steps=(1,), num_seen=300, num_held_back=60)
    [row] = run(exports[:1], data, tmp_path / "out", settings).rows
    for scores in row.scores.values():
        # The reader learnt from these scans; two of 1,297 are beyond its margin.
        assert scores.prompt_accuracy > 0.98
        assert scores.count_accuracy == scores.position_accuracy == 1.0
        assert scores.frechet_distance < scores.frechet_floor + 0.6


class TestReport:
    @pytest.fixture
    def evaluation(self, exports: Any, data: Path, tmp_path: Path) -> nfe.Evaluation:
        return run(exports, data, tmp_path / "out")

    def test_table_holds_every_score(self, evaluation: nfe.Evaluation) -> None:
        text = report.table(evaluation)
        lines = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
        ]
        for row in evaluation.rows:
            for scores in row.scores.values():
                [line] = [
                    x
                    for x in lines
                    if x[:3] == [row.label, str(row.num_steps), str(row.nfe)]
                    and x[3] == f"{scores.frechet_distance:.3f}"
                ]
                assert line[4] == f"{100 * scores.prompt_accuracy:.1f} %"
                assert line[6] == f"{100 * scores.count_accuracy:.1f} %"
        assert text.count("training scans") >= 2
        widths = {len(line) for line in text.split("\n\n")[1].splitlines()}
        assert len(widths) == 1, "columns line up"

    def test_files_are_written_and_a_second_report_replaces_them(
        self, evaluation: nfe.Evaluation, tmp_path: Path
    ) -> None:
        folder = tmp_path / "report"
        for _ in range(2):
            paths = report.write(evaluation, folder)
            assert all(path.exists() for path in paths)
        for name in ("samples_seen.png", "samples_held_back.png", "quality.png"):
            pixels = np.asarray(Image.open(folder / name))
            assert pixels.std() > 5, name
        assert (folder / "table.md").read_text() == report.table(evaluation) + "\n"
        events = EventAccumulator(str(folder / "tensorboard" / "tim")).Reload()
        scalars = events.Scalars("nfe_seen/frechet_distance")
        assert [event.step for event in scalars] == [1, 3]
        assert scalars[0].value == pytest.approx(evaluation.rows[0].scores["seen"].frechet_distance, rel=1e-6)
        pictures = EventAccumulator(str(folder / "tensorboard" / "pictures")).Reload()
        assert len(pictures.Tags()["images"]) == 3

    def test_sheet_shows_every_layout(self, evaluation: nfe.Evaluation) -> None:
        seen = evaluation.sets[0]
        columns = report.choose_columns(seen, 10, max_cells={"row": 3, "column": 2})
        layouts = [(seen.prompts[c].orientation, len(seen.prompts[c].cells)) for c in columns]
        assert len(set(columns)) == 10
        assert set(layouts) == {
            layout for layout in SEEN_LAYOUTS if layout[1] <= {"row": 3, "column": 2}[layout[0]]
        }
        assert layouts == sorted(layouts, key=lambda x: (x[0] == "column", x[1]))
        few = replace(seen, prompts=seen.prompts[:3])
        assert sorted(report.choose_columns(few, 10, max_cells={"row": 4, "column": 4})) == [0, 1, 2]


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"steps": (0, 1)}, r"--steps: expected rising numbers of at least 1, received \[0, 1\]"),
            ({"steps": (4, 2)}, "--steps: expected rising numbers"),
            ({"steps": ()}, "--steps: expected rising numbers"),
            (
                {"num_seen": 64},
                "--pictures: expected at least 65 for a Frechet distance of 64 pixels, received 64",
            ),
            ({"num_held_back": 16}, "--held-back: expected at least 17"),
        ],
    )
    def test_settings(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            replace(SETTINGS, **change)

    def test_a_folder_that_is_no_handwriting(self, exports: Any, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"build the data with `python -m data_pipeline.handwriting"):
            run(exports, tmp_path, tmp_path / "out")
        (tmp_path / "manifest.json").write_text("{}")
        with pytest.raises(RequestError, match="not the manifest of a handwriting data set"):
            run(exports, tmp_path, tmp_path / "out")

    def test_an_unfinished_export(self, exports: Any, data: Path, tmp_path: Path) -> None:
        (exports[1][1] / "export.json").unlink()
        with pytest.raises(CheckpointError, match="not an export folder, or one cut short"):
            run(exports, data, tmp_path / "out")
        assert not (tmp_path / "out").exists(), "nothing was sampled"

    def test_networks_that_draw_something_else(self, data: Path, tmp_path: Path) -> None:
        labels = write_tiny_export(tmp_path / "labels", export_of(condition="class"))
        colour = write_tiny_export(tmp_path / "colour", export_of(channels=3))
        coarse = write_tiny_export(tmp_path / "coarse", export_of(factor=16))
        for folder, message in (
            (labels, "received condition 'class'"),
            (colour, "3 colour channels"),
            (coarse, "multiples of 16 pixels, which do not divide the 8"),
        ):
            with pytest.raises(RequestError, match=message):
                run([(None, folder)], data, tmp_path / "out")

    def test_comparing_a_network_with_itself(self, exports: Any, data: Path, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="holds the same weights"):
            run([exports[0], exports[0]], data, tmp_path / "out")
        with pytest.raises(RequestError, match="both networks are called 'tim'; give --label"):
            run([exports[0], ("tim", exports[1][1])], data, tmp_path / "out")

    def test_results_of_something_else(self, exports: Any, data: Path, tmp_path: Path) -> None:
        (tmp_path / "results.json").write_text('{"mine": 1}')
        with pytest.raises(RequestError, match="not the results of this evaluation"):
            run(exports, data, tmp_path)
        assert (tmp_path / "results.json").read_text() == '{"mine": 1}'

    def test_rows_of_another_protocol_are_left_out(
        self, exports: Any, data: Path, tmp_path: Path, calls: list
    ) -> None:
        run(exports[:1], data, tmp_path / "out")
        path = tmp_path / "out" / "results.json"
        path.write_text(path.read_text().replace('"protocol": 1', '"protocol": 0'))
        calls.clear()
        run(exports[:1], data, tmp_path / "out")
        assert len(calls) == 4


class TestCommandLine:
    def test_prints_the_table_and_where_it_is(
        self, exports: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["nfe", str(exports[0][1]), "--baseline", str(exports[1][1]), "--data", str(data)]
        words += ["--out", str(tmp_path / "out"), "--steps", "1,2", "--pictures", "70", "--held-back", "20"]
        assert cli.main([*words, "--label", "TiM"]) == 0
        printed = capsys.readouterr().out
        assert (tmp_path / "out" / "table.md").read_text().strip() in printed
        assert "| TiM " in printed and "| flow " in printed
        for name in ("results.json", "table.md", "samples_seen.png", "quality.png", "tensorboard"):
            assert str(tmp_path / "out" / name) in printed

    def test_an_error_is_one_message_and_status_1(
        self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["nfe", str(tmp_path / "none"), "--data", str(data), "--out", str(tmp_path / "out")]
        assert cli.main(words) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'}: not there;")
        assert cli.main([*words, "--steps", "one"]) == 2
        assert "--steps: expected numbers with commas between, received 'one'" in capsys.readouterr().err

    def test_help_lists_what_there_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["--help"])
        assert exit_info.value.code == 0
        printed = capsys.readouterr().out
        assert [name for name in cli.EVALUATIONS if name not in printed] == []
        assert "Quality against the number of steps" in printed
