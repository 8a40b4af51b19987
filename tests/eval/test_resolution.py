"""Quality against size: what is drawn at which size, rows and their reuse, the report, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.handwriting import Settings as DataSettings
from data_pipeline.handwriting import build, parse
from tests.eval.test_geneval import LINES
from tests.eval.tiny_scorers import TinyFeatures, save_clip, save_detector, save_vilt, write_random_picture
from tests.networks import export_of, write_tiny_export
from tim_ds.errors import RequestError
from tim_ds.eval import cli, geneval, resolution
from tim_ds.eval.benchmarks import Imagenet, Mjhq
from tim_ds.eval.clip import Clip
from tim_ds.eval.detector import Detection, Detector
from tim_ds.model.weights import sha256
from tim_ds.pipeline import TiMPipeline, read_settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resolution") / "data"
    build(folder, DataSettings(samples=4, factor=4, text_width=16, max_cells=3), progress=False)
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("resolution") / "export")


class Brightness:
    """A scorer whose numbers are known."""

    def identity(self) -> dict[str, Any]:
        return {"name": "brightness"}

    def score(self, captions: Sequence[str], pictures: Sequence[np.ndarray]) -> dict[str, float | None]:
        return {"brightness": float(np.mean([p.mean() for p in pictures])), "nothing": None}


def brightness(device: str) -> Brightness:
    return Brightness()


class TestHandwriting:
    def test_rows_and_columns_of_every_length_and_what_training_shows(self, data: Path) -> None:
        suite = resolution.HandwritingSuite(data, pictures=65, longest=6, seed=0)
        found = {group.name: (group.size, group.seen) for group in suite.groups}
        assert found == {
            **{f"row_{n}": (f"8x{8 * n}", n <= 3) for n in range(1, 7)},
            **{f"column_{n}": (f"{8 * n}x8", n <= 3) for n in range(2, 7)},
        }
        for group in suite.groups:
            assert len(group.captions) == len(set(group.seeds)) == 65
            for text in group.captions:
                height, width = parse(text).size_px
                assert f"{height}x{width}" == group.size

    def test_a_row_of_four_counts_as_unseen_where_columns_of_four_are_shown(self, tmp_path: Path) -> None:
        build(tmp_path / "data", DataSettings(samples=2, factor=4, text_width=16), progress=False)
        suite = resolution.HandwritingSuite(tmp_path / "data", pictures=65, longest=4, seed=0)
        assert {g.name for g in suite.groups if not g.seen} == {"row_4"}

    def test_the_whole_evaluation_resumes_and_reports(
        self, data: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        out = tmp_path / "out"
        words = ["resolution", str(export), "--data", str(data), "--longest", "2", "--pictures", "65"]
        words += ["--steps", "1,2", "--out", str(out)]
        assert cli.main(words) == 0
        printed = capsys.readouterr().out
        rows = json.loads((out / "results.json").read_text())["rows"]
        assert [(row["num_pictures"], row["nfe"], row["group"]) for row in rows] == [
            (65, nfe, group) for nfe in (1, 2) for group in ("column_2", "row_1", "row_2")
        ]
        row = rows[1]
        assert set(row["scores"]) >= {"frechet_distance", "digit_accuracy", "prompt_accuracy"}
        assert row["seconds_per_picture"] > 0 and row["peak_bytes"] > 0 and row["seen"] is True
        assert row["recipe_sha256"] == "f" * 64 and {"torch", "tim_ds"} <= row["versions"].keys()
        assert "| tiny" in printed and (out / "table.md").read_text().strip() in printed
        for name in ("resolution.png", "tiny_steps0001_samples.png", "tiny_steps0002_samples.png"):
            assert Image.open(out / name).size[0] > 100
        # The pictures are those of the pipeline, with their settings.
        folder = next((out / "pictures").glob("*_steps0002")) / "row_2"
        settings = read_settings(folder / "00003.png")
        [again] = TiMPipeline.from_pretrained(export)(
            settings["prompt"], "8x16", num_steps=2, seeds=[3]
        ).pixels
        assert np.abs(np.asarray(Image.open(folder / "00003.png"))[..., None].astype(int) - again).max() <= 1
        # Nothing is drawn a second time; a lost picture is drawn again, and the scores are the same.
        with monkeypatch.context() as patch:
            patch.setattr(TiMPipeline, "run", lambda *_, **__: pytest.fail("sampled"))
            assert cli.main([*words, "--label", "other name"]) == 0
            assert "| other name" in capsys.readouterr().out
        before = (folder / "00003.png").read_bytes()
        (folder / "00003.png").unlink()
        assert cli.main(words) == 0
        assert (folder / "00003.png").read_bytes() == before
        again_rows = json.loads((out / "results.json").read_text())["rows"]
        assert [r["scores"] for r in again_rows] == [r["scores"] for r in rows]


class TestPrompts:
    @pytest.fixture
    def prompts(self, tmp_path: Path) -> Path:
        path = tmp_path / "prompts.txt"
        path.write_text("a three\na one above a two\n")
        return path

    def test_any_scorer_at_any_sizes(self, export: Path, prompts: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        words = ["resolution", str(export), "--prompts-file", str(prompts), "--sizes", "8x16,16x16"]
        scorer = "tests.eval.test_resolution:brightness"
        assert cli.main([*words, "--scorer", scorer, "--out", str(out), "--steps", "1"]) == 0
        rows = json.loads((out / "results.json").read_text())["rows"]
        assert [(row["size"], row["seen"]) for row in rows] == [("16x16", None), ("8x16", None)]
        for row in rows:
            folder = next((out / "pictures").iterdir()) / row["group"]
            means = [np.asarray(Image.open(p)).mean() for p in sorted(folder.iterdir())]
            assert len(means) == 2 and row["scores"]["brightness"] == pytest.approx(np.mean(means))
        assert "brightness" in (out / "table.md").read_text() and (out / "resolution.png").exists()

    def test_the_clip_score_is_the_mean_cosine(self, tmp_path: Path) -> None:
        folder = save_clip(tmp_path / "clip")
        scorer = resolution.load_scorer(f"clip={folder}", "cpu")
        rng = np.random.default_rng(0)
        pictures = [rng.integers(0, 256, (32, 48, c), dtype=np.uint8) for c in (3, 1)]
        clip = Clip.from_pretrained(str(folder))
        images = [Image.fromarray(np.repeat(p, 3, axis=2) if p.shape[2] == 1 else p) for p in pictures]
        cosines = (clip.encode_pictures(images) * clip.encode_captions(["a three", "a one"])).sum(dim=1)
        found = scorer.score(["a three", "a one"], pictures)["clip_score"]
        # Captions of one call are padded together: float32.
        assert found == pytest.approx(100 * float(cosines.mean()), abs=1e-3)
        assert scorer.identity()["weights"]["weights_sha256"] == [sha256(folder / "model.safetensors")]

    def test_without_a_scorer_time_and_memory_are_measured(
        self, export: Path, prompts: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        words = [
            "resolution",
            str(export),
            "--prompts-file",
            str(prompts),
            "--sizes",
            "8x8",
            "--out",
            str(out),
        ]
        assert cli.main(words) == 0
        assert "peak memory" in (out / "table.md").read_text() and not (out / "resolution.png").exists()

    def test_the_network_is_asked_as_the_command_says(
        self, export: Path, prompts: Path, tmp_path: Path
    ) -> None:
        words = ["resolution", str(export), "--prompts-file", str(prompts), "--out", str(tmp_path / "out")]
        words += ["--sizes", "8x16", "--cfg", "2", "--cfg-interval", "0,0.6", "--stochasticity", "0.2"]
        assert cli.main([*words, "--dtype", "bfloat16", "--device", "cpu"]) == 0
        [row] = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
        settings = row["identity"]["settings"]
        assert settings["dtype"] == "bfloat16" and settings["stochasticity"] == 0.2
        assert settings["cfg_interval"] == [0.0, 0.6] and row["nfe"] == 4 + 2

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (["--sizes", "8x8,8x8"], "--sizes: expected different sizes, received 8x8, 8x8"),
            (["--sizes", "8x10"], "both sides must be multiples of 4"),
            (["--sizes", "4000000x4000000"], "squares fit up to"),
            (
                ["--sizes", "8x8", "--scorer", "no.such:thing"],
                "--scorer no.such:thing: expected clip=FOLDER",
            ),
            (["--sizes", "8x8", "--steps", "4,4"], "--steps: expected different numbers"),
        ],
    )
    def test_bad_requests_are_refused_before_anything_is_drawn(
        self, export: Path, prompts: Path, tmp_path: Path, capsys: Any, extra: list[str], message: str
    ) -> None:
        words = ["resolution", str(export), "--prompts-file", str(prompts), "--out", str(tmp_path / "out")]
        assert cli.main([*words, *extra]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_networks_that_cannot_draw_the_suite_are_refused(self, data: Path, tmp_path: Path) -> None:
        suite = resolution.HandwritingSuite(data, pictures=65, longest=1, seed=0)
        colour = write_tiny_export(tmp_path / "colour", export_of(channels=3))
        with pytest.raises(RequestError, match="expected a network that draws grey pictures"):
            resolution.run([(None, colour)], suite, tmp_path / "out", steps=(1,))
        with pytest.raises(RequestError, match="expected at least 1 and 65"):
            resolution.HandwritingSuite(data, pictures=64, longest=1, seed=0)

    def test_results_of_something_else_are_not_overwritten(
        self, export: Path, prompts: Path, tmp_path: Path, capsys: Any
    ) -> None:
        (tmp_path / "results.json").write_text('{"evaluation": "nfe", "rows": []}')
        words = ["resolution", str(export), "--prompts-file", str(prompts), "--sizes", "8x8"]
        assert cli.main([*words, "--out", str(tmp_path)]) == 2
        assert "results of 'nfe'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("scorers")
    return ["--detector", str(save_detector(folder / "d")), "--clip", str(save_clip(folder / "c"))]


class TestBenchmarks:
    """The published benchmarks as scorers: the code of `launch/evaluate.py BENCHMARK`, size by size."""

    @pytest.fixture
    def metadata(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        # Pictures of 800 pixels take seconds even in a tiny detector.
        monkeypatch.setitem(Detector.__init__.__kwdefaults__ or {}, "shorter_px", 64)
        path = tmp_path / "evaluation_metadata.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
        return path

    def test_geneval_at_every_size_resumes_in_its_scoring(
        self,
        export: Path,
        metadata: Path,
        scorers: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: Any,
    ) -> None:
        out = tmp_path / "out"
        words = ["resolution", str(export), "--scorer", "geneval", "--metadata", str(metadata), *scorers]
        words += ["--num", "2", "--sizes", "8x16,16x16", "--steps", "1", "--seed", "3", "--out", str(out)]
        seen: list[tuple[int, int]] = []
        stops_at: int | None = 15

        def detect(self: Detector, picture: Image.Image, *, threshold: float) -> list[Detection]:
            """In bright pictures all that single_object, two_object and counting ask for."""
            if len(seen) == stops_at:
                raise KeyboardInterrupt
            seen.append(picture.size)
            names = ("bench", "dog", "tv remote", "clock", "clock", "clock")
            is_bright = np.asarray(picture).mean() > 127
            return [Detection(name, 0.95, (0, 0, 4, 4)) for name in names if is_bright]

        monkeypatch.setattr(Detector, "__call__", detect)
        with pytest.raises(KeyboardInterrupt):
            cli.main(words)
        # Twelve pictures of the first size are a finished row; three of the second are kept.
        assert [row["size"] for row in json.loads((out / "results.json").read_text())["rows"]] == ["8x16"]
        stops_at = None
        with monkeypatch.context() as patch:
            patch.setattr(TiMPipeline, "run", lambda *_, **__: pytest.fail("sampled"))
            assert cli.main(words) == 0
        assert seen == [(16, 8)] * 12 + [(16, 16)] * 12
        rows = json.loads((out / "results.json").read_text())["rows"]
        for row in rows:
            assert row["num_pictures"] == 12 and row["seed"] == 3 and row["seconds_per_picture"] > 0
            assert set(row["scores"]) == {"overall", *geneval.TASKS, "pictures", "prompts"}
            assert row["identity"]["scorer"]["rules"]["counting_threshold"] == 0.9
            assert row["details"]["by_task"]["counting"]["pictures"] == 2
            assert "transformers" in row["versions"]
            assert 0 < row["scores"]["overall"] < 0.5
        [header] = {line for line in capsys.readouterr().out.splitlines() if line.startswith("| network")}
        titles = [title.strip() for title in header.strip("| ").split("|")]
        assert len(set(titles)) == len(titles) and {"overall", "right pictures", "any right"} <= set(titles)
        assert (out / "resolution.png").exists()

        # The same pictures by `launch/evaluate.py geneval`: the same scores.
        row = next(row for row in rows if row["size"] == "16x16")
        same = ["geneval", "--metadata", str(metadata), *scorers, "--num", "2", "--seed", "3", "--cfg", "1"]
        same += ["--export", str(export), "--size", "16x16", "--steps", "1"]
        same += ["--out", str(tmp_path / "geneval")]
        assert cli.main(same) == 0
        [other] = json.loads((tmp_path / "geneval" / "results.json").read_text())["rows"]
        assert other["scores"] == row["scores"] and other["details"] == row["details"]

    def test_processes_share_the_drawing_and_one_scores(
        self,
        export: Path,
        metadata: Path,
        scorers: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: Any,
    ) -> None:
        out = tmp_path / "out"
        words = ["resolution", str(export), "--scorer", "geneval", "--metadata", str(metadata)]
        words += ["--num", "1", "--limit", "3", "--sizes", "8x8", "--steps", "1", "--out", str(out)]
        monkeypatch.setattr(
            TiMPipeline, "batches", lambda _, request: [range(n, n + 1) for n in range(len(request.prompts))]
        )
        with monkeypatch.context() as launcher:
            launcher.setenv("WORLD_SIZE", "2")
            assert cli.main(words) == 2
            assert "several processes can share the drawing alone" in capsys.readouterr().err
            for rank, count in ((1, 1), (0, 3)):
                launcher.setenv("RANK", str(rank))
                assert cli.main([*words, "--only", "generate"]) == 0
                assert len(list((out / "pictures").rglob("*.png"))) == count
        assert not (out / "results.json").exists()
        monkeypatch.setattr(TiMPipeline, "run", lambda *_, **__: pytest.fail("sampled"))
        assert cli.main([*words, *scorers]) == 0
        [row] = json.loads((out / "results.json").read_text())["rows"]
        # Three of the six prompts, spread over the file.
        assert set(row["details"]["by_task"]) == {LINES[n]["tag"] for n in (0, 2, 5)}

    def test_dpg_at_every_size(self, export: Path, tmp_path: Path) -> None:
        questions = tmp_path / "dpg_bench.csv"
        questions.write_text(
            "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
            "dog1,a dog,1,0,entity - whole (dog),is there a dog?\n"
            "cat1,a cat,1,0,entity - whole (cat),is there a cat?\n",
        )
        words = ["resolution", str(export), "--scorer", "dpg", "--questions", str(questions)]
        words += ["--vqa", str(save_vilt(tmp_path / "vilt")), "--num", "2", "--sizes", "8x8,8x16"]
        assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
        rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
        assert [row["num_pictures"] for row in rows] == [4, 4] and "entity" in rows[0]["scores"]

    def test_distances_at_every_size(self, export: Path, tmp_path: Path, scorers: list[str]) -> None:
        rng = np.random.default_rng(0)
        np.savez(tmp_path / "ref.npz", arr_0=rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
        classes = write_tiny_export(
            tmp_path / "classes", export_of(name="classes", condition="class", channels=3)
        )
        (tmp_path / "meta_data.json").write_text(
            json.dumps({f"k{n}": {"category": "art", "prompt": f"photo {n}"} for n in range(10)})
        )
        for n in range(10):
            write_random_picture(tmp_path / "real" / "art" / f"k{n}.jpg", n)
        found = {}
        for path, benchmark in (
            (
                classes,
                Imagenet(reference=tmp_path / "ref.npz", count=10, num_classes=5, network=TinyFeatures()),
            ),
            (
                export,
                Mjhq(
                    metadata=tmp_path / "meta_data.json",
                    reference=tmp_path / "real",
                    clip=scorers[3],
                    network=TinyFeatures(),
                ),
            ),
        ):
            benchmark.load()
            suite = resolution.BenchmarkSuite(benchmark, ["8x8", "8x16"], seed=0, progress=False)
            out = tmp_path / benchmark.name
            rows = resolution.run([(None, path)], suite, out, steps=(1,), progress=False).rows
            found[benchmark.name] = rows[0].scores
            assert rows[0].scores != rows[1].scores and [row.num_pictures for row in rows] == [10, 10]
        assert set(found["imagenet"]) == {"fid", "sfid", "inception_score", "precision", "recall"}
        assert set(found["mjhq"]) == {"fid", "clean_fid", "clip"}
        suite = resolution.BenchmarkSuite(
            Imagenet(reference=tmp_path / "ref.npz", count=10, num_classes=5), ["8x8"], seed=0
        )
        with pytest.raises(RequestError, match="tiny: expected a network conditioned on class"):
            resolution.run([(None, export)], suite, tmp_path / "other", steps=(1,))

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ([], "what to draw: expected one of --data, --prompts-file and --scorer geneval, dpg"),
            (["--scorer", "geneval"], "--metadata: needed by geneval"),
            (["--scorer", "geneval", "--metadata", "none.jsonl"], "--metadata none.jsonl: cannot be read"),
            (
                ["--scorer", "dpg", "--questions", "none.csv", "--reference", "r"],
                "--reference: not read by dpg",
            ),
            (["--scorer", "imagenet", "--count", "0"], "--count: expected at least 1, received 0"),
            (["--scorer", "geneval", "--prompts-file", "p.txt"], "what to draw: expected one of"),
            (["--prompts-file", "p.txt", "--metadata", "m"], "--metadata: read with --scorer geneval"),
        ],
    )
    def test_settings_that_do_not_belong_together_are_named(
        self, export: Path, tmp_path: Path, capsys: Any, extra: list[str], message: str
    ) -> None:
        assert cli.main(["resolution", str(export), "--out", str(tmp_path / "out"), *extra]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_sizes_of_the_paper_are_whole_latents() -> None:
    sizes = [tuple(map(int, size.split("x"))) for size in resolution.TABLE_4_SIZES]
    assert len(set(sizes)) == 13 and all(side % 32 == 0 for size in sizes for side in size)
    assert {(h, w) for h, w in sizes if h != w} == {
        pair for long in (2560, 1856, 1536) for pair in ((1024, long), (long, 1024))
    }
