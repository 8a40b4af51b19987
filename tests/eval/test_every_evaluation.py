"""What holds for every evaluation alike: what a row says, what is written, and what survives bad luck."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.handwriting import Settings as DataSettings
from data_pipeline.handwriting import build
from tests.eval.test_geneval import LINES
from tests.eval.tiny_scorers import TinyFeatures, save_clip, save_detector, save_vilt, write_random_picture
from tests.networks import export_of, write_tiny_export
from tests.small_files import small_files
from tim_ds.eval import cli
from tim_ds.eval.detector import Detector
from tim_ds.eval.inception import Inception
from tim_ds.pipeline import TiMPipeline

SIX = ("geneval", "dpg", "mjhq", "imagenet", "resolution", "nfe")
PLOTS = {"resolution": "resolution.png", "nfe": "quality.png"}
SHEETS = {"resolution": "tiny_steps0002_samples.png", "nfe": "samples_seen.png"}
PROMPT = "a photo of a Küche, 日本"
"""Neither ASCII nor Latin-1, in every file of prompts."""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The command line of every evaluation on tiny networks, without --out."""
    folder = tmp_path_factory.mktemp("evaluations")
    text, grey = str(write_tiny_export(folder / "text")), ["--size", "8x8", "--steps", "2", "--cfg", "2"]
    classes = write_tiny_export(folder / "class", export_of(name="tiny", condition="class", channels=3))
    clip = ["--clip", str(save_clip(folder / "clip"))]
    metadata = folder / "evaluation_metadata.jsonl"
    lines = [{**LINES[0], "prompt": PROMPT}, *LINES[1:]]
    metadata.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    questions = folder / "dpg_bench.csv"
    questions.write_text(
        "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
        f'dog,"{PROMPT}",1,0,entity - whole (dog),is there a dog?\n'
        "cat,a cat,1,0,entity - whole (cat),is there a cat?\n"
    )
    entries = {f"k{n}": {"category": "art" if n % 2 else "food", "prompt": PROMPT} for n in range(10)}
    (folder / "meta_data.json").write_text(json.dumps(entries, ensure_ascii=False))
    for n, (key, value) in enumerate(entries.items()):
        write_random_picture(folder / "real" / value["category"] / f"{key}.jpg", n)
    rng = np.random.default_rng(0)
    np.savez(folder / "ref.npz", arr_0=rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    (folder / "prompts.txt").write_text(f"{PROMPT}\na three\n")
    build(folder / "data", DataSettings(samples=4, factor=4, text_width=16), progress=False)
    detector = ["--detector", str(save_detector(folder / "detector"))]
    return {
        "geneval": ["--export", text, *grey, "--metadata", str(metadata), "--num", "1", *clip, *detector],
        "dpg": [
            *("--export", text, *grey, "--questions", str(questions), "--num", "2"),
            *("--vqa", str(save_vilt(folder / "vilt"))),
        ],
        "mjhq": [
            *("--export", text, *grey, "--metadata", str(folder / "meta_data.json")),
            *("--reference", str(folder / "real"), *clip),
        ],
        "imagenet": [
            *("--export", str(classes), *grey, "--reference", str(folder / "ref.npz")),
            *("--count", "10", "--num-classes", "5"),
        ],
        "resolution": [
            *(text, "--prompts-file", str(folder / "prompts.txt"), "--sizes", "8x8,8x16"),
            *("--scorer", f"clip={clip[1]}", "--steps", "2", "--cfg", "2"),
        ],
        "nfe": [
            *(text, "--data", str(folder / "data"), "--steps", "1,2", "--cfg", "2"),
            *("--pictures", "65", "--held-back", "17"),
        ],
    }


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pictures of 800 pixels take seconds even in a tiny detector; Inception has one size.
    monkeypatch.setitem(Detector.__init__.__kwdefaults__ or {}, "shorter_px", 64)
    monkeypatch.setattr(Inception, "load", lambda weights: TinyFeatures())


@pytest.fixture(scope="module")
def finished() -> dict[str, Path]:
    """Where an undisturbed run of each evaluation left its results."""
    return {}


@pytest.fixture
def undisturbed(
    finished: dict[str, Path], words: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    def run(name: str) -> Path:
        if name not in finished:
            finished[name] = tmp_path_factory.mktemp("finished") / name
            assert cli.main([name, *words[name], "--out", str(finished[name])]) == 0
        return finished[name]

    return run


def rows_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["rows"]


def scores_of(out: Path) -> list[Any]:
    return [row["scores"] for row in rows_of(out)]


def find(value: Any, key: str) -> list[Any]:
    """Every value of a key, however deep."""
    found = []
    for name, inner in value.items() if isinstance(value, dict) else ():
        found += [inner] if name == key else find(inner, key)
    return found


@pytest.mark.parametrize("name", SIX)
def test_a_row_says_what_was_scored_and_with_what(name: str, undisturbed: Callable[[str], Path]) -> None:
    out = undisturbed(name)
    for row in rows_of(out):
        for key, length in (("weights_sha256", 64), ("recipe_sha256", 64)):
            assert any(isinstance(v, str) and len(v) == length for v in find(row, key)), key
        steps = find(row, "num_steps")[0]
        assert steps in (1, 2) and row.get("nfe", find(row, "nfe")[0]) == 2 * steps
        assert find(row, "cfg_scale") == [2.0] and find(row, "seed") == [0]
        assert {"torch", "tim_ds", "python"} <= row["versions"].keys() and row["device"]
        assert any(value is not None for value in row["scores"].values())
    assert "tiny" in (out / "table.md").read_text()
    for path in (out / PLOTS.get(name, "scores.png"), out / SHEETS.get(name, "samples.png")):
        with Image.open(path) as image:
            assert min(image.size) > 100


@pytest.mark.parametrize("name", SIX)
def test_a_second_run_draws_nothing_and_says_the_same(
    name: str,
    words: dict[str, list[str]],
    undisturbed: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = undisturbed(name)
    before = rows_of(out)
    monkeypatch.setattr(TiMPipeline, "run", lambda *_, **__: pytest.fail("sampled"))
    assert cli.main([name, *words[name], "--out", str(out)]) == 0
    assert rows_of(out) == before


@pytest.mark.parametrize("name", [name for name in SIX if name != "nfe"])
def test_a_damaged_picture_is_refused_by_name(
    name: str, words: dict[str, list[str]], undisturbed: Callable[[str], Path], capsys: Any
) -> None:
    """The evaluation `nfe` keeps no single pictures: tests/eval/test_nfe.py."""
    out = undisturbed(name)
    path = sorted((out / "pictures").rglob("*.png"))[0]
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no picture"):
        path.write_bytes(content)
        assert cli.main([name, *words[name], "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error and "delete it" in error
    path.unlink()
    assert cli.main([name, *words[name], "--out", str(out)]) == 0
    assert path.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_a_full_disk_is_told_and_leaves_nothing_half_written(
    name: str, words: dict[str, list[str]], undisturbed: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    refused = 0
    # From where nothing can be written to where all but the largest files can.
    for size in (1, 300, 900, 2_000, 6_000, 20_000, 60_000):
        with small_files(size):
            status = cli.main([name, *words[name], "--out", str(out)])
        error = capsys.readouterr().err
        if status == 0:
            break
        refused += 1
        assert "error: " in error and ("File too large" in error or "cannot be written" in error), error
        assert not list(out.rglob("*.part"))
        for path in out.rglob("*.png"):
            Image.open(path).verify()
        for path in out.rglob("*.json"):
            json.loads(path.read_text())
        assert not list(out.rglob("events.*")), "of TensorBoard"
    assert refused >= 2
    assert cli.main([name, *words[name], "--out", str(out)]) == 0
    assert scores_of(out) == scores_of(undisturbed(name))


def killer(at: int) -> Callable[[int], None]:
    """`os.fsync` that kills the process in its `at`-th call: a file is written and has no name yet."""
    count, flush = 0, os.fsync

    def killed(handle: int) -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(handle)

    return killed


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_a_kill_at_any_write_costs_no_finished_picture(
    name: str,
    words: dict[str, list[str]],
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, kills = tmp_path / "out", 0
    for at in (1, 2, 5, 9, 14):
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(os, "fsync", killer(at))
            os._exit(cli.main([name, *words[name], "--out", str(out)]))
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert cli.main([name, *words[name], "--out", str(out)]) == 0
    assert scores_of(out) == scores_of(undisturbed(name))


def test_an_option_of_another_command_is_not_taken_for_a_beginning_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sample.py` has --size for every size, `evaluate.py resolution` --sizes for all: the last would win."""
    words = ["resolution", "run", "--prompts-file", "p.txt", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--size", "8x8", "--size", "8x16"])
    assert ended.value.code == 2 and "unrecognized arguments: --size 8x8" in capsys.readouterr().err
