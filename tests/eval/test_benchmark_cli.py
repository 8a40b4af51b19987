"""The benchmarks from end to end on tiny networks: both halves, rows, reports, refusals before any work."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.eval.test_geneval import LINES
from tests.eval.tiny_scorers import TinyFeatures, save_clip, save_detector, save_vilt, write_random_picture
from tests.networks import export_of, write_tiny_export
from tim_ds.errors import RequestError
from tim_ds.eval import benchmark_cli, cli, geneval, imagenet
from tim_ds.eval.benchmark_cli import (
    DpgOptions,
    GenevalOptions,
    ImagenetOptions,
    MjhqOptions,
    run_dpg,
    run_imagenet,
    run_mjhq,
)
from tim_ds.eval.detector import Detector
from tim_ds.eval.generate import Sampling
from tim_ds.pipeline import TiMPipeline

SAMPLING = Sampling(size="8x8", num_steps=2)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("benchmarks") / "text")


@pytest.fixture(scope="module")
def class_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    export = export_of(name="classes", condition="class", channels=3)
    return write_tiny_export(tmp_path_factory.mktemp("benchmarks") / "class", export)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "clip": str(save_clip(folder / "clip")),
        "detector": str(save_detector(folder / "detector")),
        "vqa": str(save_vilt(folder / "vilt")),
    }


def stored(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["rows"]


def test_geneval_in_two_halves_from_the_command_line(
    export: Path,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Pictures of 800 pixels take seconds even in a tiny detector.
    monkeypatch.setitem(Detector.__init__.__kwdefaults__ or {}, "shorter_px", 64)
    metadata, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    metadata.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    common = ["geneval", "--metadata", str(metadata), "--out", str(out), "--num", "1"]
    scorers = ["--detector", models["detector"], "--clip", models["clip"]]
    making = ["--export", str(export), "--size", "8x8", "--steps", "2", "--cfg", "2", "--seed", "5"]

    assert cli.main([*common, *scorers, "--only", "score"]) == 2
    assert "half finished" in capsys.readouterr().err
    assert cli.main([*common, *making, "--only", "generate", "--part", "0/2"]) == 0
    assert len(list((out / "pictures").rglob("*.png"))) == 3
    with monkeypatch.context() as launcher:
        launcher.setenv("RANK", "1")
        launcher.setenv("WORLD_SIZE", "2")
        assert cli.main([*common, *making, "--only", "generate"]) == 0
    assert not (out / "results.json").exists()
    stated = json.loads((out / "pictures" / "00004" / "metadata.jsonl").read_text())
    assert stated["prompt"] == LINES[4]["prompt"]
    capsys.readouterr()

    assert cli.main([*common, *scorers, "--only", "score"]) == 0
    printed = capsys.readouterr().out
    assert "GenEval (rebuilt with Mask2Former of transformers); not calibrated" in printed
    assert "no numbers to stand beside published ones" in printed and "less offset" not in printed
    assert "not the published 553" in printed
    [row] = stored(out)
    assert (row["label"], row["num_pictures"]) == ("tiny", 6)
    made_by = row["made_by"]
    assert (made_by["num_steps"], made_by["nfe"], made_by["cfg_scale"], made_by["seed"]) == (2, 4, 2.0, 5)
    assert made_by["recipe_sha256"] == "f" * 64 and len(made_by["weights_sha256"]) == 64
    assert len(row["scorer"]["detector"]["weights_sha256"][0]) == 64 and "transformers" in row["versions"]
    assert row["scorer"]["rules"]["counting_threshold"] == 0.9
    verdicts = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert [one["tag"] for one in verdicts] == [line["tag"] for line in LINES]
    assert {one["evaluator"] for one in verdicts} == {row["title"]} and "not calibrated" in row["title"]
    assert row["details"]["calibration"] == "not calibrated"
    for name in ("table.md", "scores.png", "samples.png"):
        assert (out / name).stat().st_size > 0

    # Against itself, the agreement is whole; and what is scored is not scored again.
    again = [*common, *scorers, "--only", "score", "--calibrate", str(out / "verdicts.jsonl")]
    assert cli.main(again) == 0
    assert "difference +0.00 points" in capsys.readouterr().out and len(stored(out)) == 1
    curves = json.loads((out / "calibration.json").read_text())["curves"]
    assert list(curves) == list(geneval.TASKS)
    for curve in curves.values():
        assert curve["agreement"][curve["thresholds"].index(curve["published"])] == 1.0
    assert (out / "calibration.md").stat().st_size > 0
    with Image.open(out / "calibration.png") as image:
        assert image.size[0] > 1000
    # Nothing is looked at again, and one flipped verdict shows.
    verdicts[0]["correct"] = not verdicts[0]["correct"]
    theirs = tmp_path / "theirs.jsonl"
    theirs.write_text("".join(json.dumps(one) + "\n" for one in verdicts))
    monkeypatch.setattr(Detector, "__call__", lambda *_, **__: pytest.fail("looked"))
    assert cli.main([*common, *scorers, "--only", "score", "--calibrate", str(theirs)]) == 0
    printed = re.sub(" +", " ", capsys.readouterr().out)
    assert "| single_object | 1 | 0.00" in printed
    # The row of the same pictures carries what was found, and so does any later one with this evaluator.
    [row] = stored(out)
    found = row["details"]["calibration"]
    ours = row["scores"]["overall"]
    flip = 1 / 6 if verdicts[0]["correct"] is False else -1 / 6
    assert found["offset"] == pytest.approx(flip) and found["num_pictures"] == 6
    assert row["scores"]["overall_less_offset"] == pytest.approx(ours - flip)
    assert row["title"].endswith("; calibrated on 6 pictures") and row["title"] in printed
    kept = json.loads((out / "calibration.json").read_text())["calibration"]
    assert kept["offset_error"] == found["offset_error"] > 0 and "less offset" in printed

    elsewhere = ["geneval", "--metadata", str(metadata), "--pictures", str(out / "pictures"), *scorers]
    elsewhere += ["--num", "1", "--only", "score", "--calibration", str(out / "calibration.json")]
    monkeypatch.undo()
    monkeypatch.setitem(Detector.__init__.__kwdefaults__ or {}, "shorter_px", 64)
    capsys.readouterr()
    assert cli.main([*elsewhere, "--out", str(tmp_path / "later")]) == 0
    [later] = stored(tmp_path / "later")
    assert later["details"]["calibration"] == found and later["scores"] == row["scores"]
    other = save_clip(tmp_path / "another_clip", seed=1)
    capsys.readouterr()
    assert cli.main([*elsewhere, "--clip", str(other), "--out", str(tmp_path / "other")]) == 2
    assert "of another evaluator: clip.weights_sha256 was" in capsys.readouterr().err
    assert cli.main([*elsewhere, "--calibrate", str(theirs), "--out", str(tmp_path / "other")]) == 2
    assert "makes no sense beside --calibrate" in capsys.readouterr().err
    (tmp_path / "no.json").write_text("{}")
    assert cli.main([*elsewhere, "--calibration", str(tmp_path / "no.json"), "--out", str(out)]) == 2
    assert "expected the calibration.json of a run with --calibrate" in capsys.readouterr().err


def test_geneval_is_refused_before_any_picture_is_made(
    export: Path,
    models: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(TiMPipeline, "__call__", lambda *_, **__: pytest.fail("sampled"))
    metadata, out = tmp_path / "m.jsonl", tmp_path / "out"
    metadata.write_text(json.dumps(LINES[0]))
    common = ["geneval", "--export", str(export), "--out", str(out), "--size", "8x8"]
    good = ["--metadata", str(metadata), "--detector", models["detector"], "--clip", models["clip"]]
    for words, message in (
        (["--metadata", str(tmp_path / "none")], "--metadata"),
        ([*good, "--detector", "/no/detector"], "--detector /no/detector: no such folder"),
        ([*good, "--clip", "/no/clip"], "--clip /no/clip: no such folder"),
        ([*good, "--pictures", str(out)], "lies in the folder of the pictures"),
        ([*good, "--pictures", str(tmp_path)], "lies in the folder of the pictures"),
        ([*good, "--device", "abacus"], "--device abacus: not usable here"),
        ([*good, "--part", "0/2"], "--part: a part cannot be scored"),
        ([*good, "--part", "x"], "--part: expected K/N, received 'x'"),
        ([*good, "--cfg-interval", "1"], "--cfg-interval: expected LOW,HIGH, received '1'"),
        ([*good, "--num", "0"], "--num: expected at least 1"),
        ([*good, "--only", "score"], "--export: not read with --only score"),
        ([*good, "--calibrate", str(tmp_path / "none")], "--calibrate"),
    ):
        assert cli.main([*common, *words]) == 2, message
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_dpg_scores_generated_pictures_and_writes_grids(
    export: Path, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "dpg_bench.csv"
    questions.write_text(
        "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
        "dog1,a dog,1,0,entity - whole (dog),is there a dog?\n"
        "dog1,a dog,2,1,attribute - color (dog),is the dog red?\n"
        "cat1,a cat,1,0,entity - whole (cat),is there a cat?\n"
    )
    options = DpgOptions(
        out=tmp_path / "out",
        export=export,
        questions=questions,
        vqa=models["vqa"],
        grids=tmp_path / "grids",
        sampling=SAMPLING,
        progress=False,
    )
    [row] = run_dpg(options)
    assert row.num_pictures == 8 and row.nfe == 2
    assert row.title.startswith("DPG-Bench (answers by vilt; published: mPLUG-large")
    assert set(row.scores) == {"overall", "entity", "attribute"}
    with Image.open(tmp_path / "grids" / "dog1.png") as grid:
        assert grid.size == (16, 16)
    printed = capsys.readouterr().out
    assert "not comparable" in printed and "attribute" in printed

    # The same pictures as grids, as another program leaves them: the same answers, nothing known of them.
    foreign = replace(
        options,
        out=tmp_path / "of_grids",
        export=None,
        only="score",
        pictures=tmp_path / "grids",
        grids=None,
        layout="grid",
    )
    [other] = run_dpg(foreign)
    assert other.scores == row.scores and other.made_by is None and other.label == "grids"
    assert not (tmp_path / "of_grids" / "scores.png").exists(), "a plot needs network evaluations"


def test_mjhq_scores_against_the_users_pictures(
    export: Path, models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = {f"k{n}": {"category": "art" if n % 2 else "food", "prompt": f"photo {n}"} for n in range(10)}
    (tmp_path / "meta_data.json").write_text(json.dumps(meta))
    for n, (key, value) in enumerate(meta.items()):
        write_random_picture(tmp_path / "mjhq30k_imgs" / value["category"] / f"{key}.jpg", n)
    options = MjhqOptions(
        out=tmp_path / "out",
        export=export,
        metadata=tmp_path / "meta_data.json",
        reference=tmp_path / "mjhq30k_imgs",
        clip=models["clip"],
        sampling=SAMPLING,
        progress=False,
    )
    network = TinyFeatures()
    [row] = run_mjhq(options, network)
    assert row.scores["fid"] > 0 and row.scores["clean_fid"] > 0 and row.scores["clip"] is not None  # type: ignore[operator]
    assert sum(network.seen) == sum(network.resized) == 20
    assert set(row.details["fid_by_category"]) == {"art", "food"}
    printed = capsys.readouterr().out
    assert "FID (clean)" in printed and "by category" in printed and "food" in printed
    # Another number of steps: the reference's features are kept.
    rows = run_mjhq(
        replace(options, pictures=tmp_path / "more", sampling=replace(SAMPLING, num_steps=3)), network
    )
    assert [one.nfe for one in rows] == [2, 3] and sum(network.seen) == 30
    # A damaged picture of the data set is found before any is made.
    cut = tmp_path / "mjhq30k_imgs" / "food" / "k0.jpg"
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(RequestError, match=r"k0\.jpg: damaged"):
        run_mjhq(replace(options, pictures=tmp_path / "none"), network)
    assert not (tmp_path / "none").exists()
    with pytest.raises(RequestError, match="at least 5 entries"):
        (tmp_path / "meta_data.json").write_text(json.dumps(dict(list(meta.items())[:3])))
        run_mjhq(options, network)


def test_imagenet_scores_and_leaves_a_file_for_adms_evaluator(class_export: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "ref.npz", arr_0=rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    options = ImagenetOptions(
        out=tmp_path / "out",
        export=class_export,
        reference=tmp_path / "ref.npz",
        count=10,
        num_classes=5,
        samples_npz=tmp_path / "samples.npz",
        sampling=replace(SAMPLING, cfg_scale=1.5, cfg_interval=(0.0, 0.6)),
        progress=False,
    )
    [row] = run_imagenet(options, TinyFeatures())
    assert set(row.scores) == {"fid", "sfid", "inception_score", "precision", "recall"}
    assert None not in row.scores.values()
    assert row.made_by is not None and row.made_by["cfg_interval"] == [0.0, 0.6]
    with np.load(tmp_path / "samples.npz") as file:
        samples = file["arr_0"]
    assert samples.shape == (10, 8, 8, 3)
    pipeline = TiMPipeline.from_pretrained(class_export)
    label = imagenet.wanted_pictures(10, 5, seed=0)[8].prompt
    expected = pipeline(label, "8x8", num_steps=2, cfg_scale=1.5, cfg_interval=(0.0, 0.6), seeds=8).pixels[0]
    # Another batch may move a value across a rounding edge.
    assert np.abs(samples[8].astype(int) - expected).max() <= 1
    assert "another benchmark" not in (tmp_path / "out" / "table.md").read_text()
    np.savez(tmp_path / "large.npz", arr_0=rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8))
    run_imagenet(replace(options, reference=tmp_path / "large.npz"), TinyFeatures())
    said = "The pictures are 8x8, those of the reference 16x16: another benchmark."
    assert said in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(RequestError, match=r"knows 5 classes, expected 10 \(--num-classes\)"):
        run_imagenet(replace(options, num_classes=10, out=tmp_path / "other"), TinyFeatures())


def test_a_network_of_the_other_kind_is_refused(export: Path, class_export: Path, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(json.dumps(LINES[0]))
    options = GenevalOptions(
        out=tmp_path / "out",
        export=class_export,
        metadata=tmp_path / "m.jsonl",
        only="generate",
        sampling=SAMPLING,
    )
    with pytest.raises(RequestError, match="expected a network conditioned on text, received one on class"):
        benchmark_cli.run_geneval(options)
    other = ImagenetOptions(
        out=tmp_path / "out", export=export, count=5, num_classes=5, only="generate", sampling=SAMPLING
    )
    with pytest.raises(RequestError, match="expected a network conditioned on class, received one on text"):
        run_imagenet(other)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (DpgOptions, {"questions": Path("q")}, "--vqa: needed to score"),
        (
            DpgOptions,
            {"questions": Path("q"), "vqa": "v", "layout": "grid"},
            "--layout grid: reads grids of up to 4 pictures",
        ),
        (MjhqOptions, {"metadata": Path("m")}, "--reference: needed to score; the folder"),
        (ImagenetOptions, {}, "--reference: needed to score; a reference batch"),
        (ImagenetOptions, {"export": None}, "--export: needed to generate pictures"),
        (ImagenetOptions, {"batch_scored": 0, "only": "generate"}, "--batch-scored: expected at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(kind: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        kind(**{"out": Path("out"), "export": Path("export"), **given})
    assert message in str(caught.value)


@pytest.mark.parametrize("name", benchmark_cli.BENCHMARKS)
def test_help_has_an_example_that_is_accepted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse
    import shlex

    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"launch/evaluate.py {name}" in capsys.readouterr().out
    add_arguments, _, example = benchmark_cli.BENCHMARKS[name]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    kinds = {
        "geneval": GenevalOptions,
        "dpg": DpgOptions,
        "mjhq": MjhqOptions,
        "imagenet": ImagenetOptions,
    }
    assert benchmark_cli.parse(parser.parse_args(shlex.split(example)), kinds[name]).scores
