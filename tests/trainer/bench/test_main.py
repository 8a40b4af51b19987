"""The command, on a CPU for show, on a GPU for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.trainer.bench.recipes import RECIPES, TEXT, recipe
from tim_ds.errors import RequestError
from tim_ds.trainer import bench
from tim_ds.trainer.bench import report
from tim_ds.trainer.bench.__main__ import PRESETS, images_of, main
from tim_ds.trainer.bench.contenders import IN_ORDER
from tim_ds.trainer.bench.measure import Row

T2I = str(RECIPES / "t2i_xl.yaml")
SMALL = ["--preset", "small", "--sizes", "256", "--repetitions", "3", "model.depth=1", "model.hidden_size=16"]


def test_a_cpu_runs_it_for_show_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    arguments = [T2I, *SMALL, "--device", "cpu", "--engine", "plain", "--out", str(out)]
    assert main([*arguments, "--implementations", "ours"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(report.NOT_A_CLAIM) and "set before any" not in printed
    first = json.loads(out.read_text())
    assert [(r["implementation"], r["objective"]) for r in first["rows"]] == list(IN_ORDER[:3])
    assert first["refused"] == [] and first["environment"]["gpu"] is None
    again = ["--append", "--implementations", "baseline", "--objectives", "dde"]
    assert main([*arguments, *again]) == 0
    about, found = report.load(out)
    assert len(found) == 4 and all(isinstance(one, Row) and one.p50 > 0 for one in found)
    assert about["engine"] == "plain" and "--append" in about["command"]
    names = {"step.json", "step.md", "step.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    (tmp_path / "step.md").unlink()
    assert main(["--render", str(out)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == names


def test_without_a_gpu_it_says_so_and_gives_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([T2I]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(report.NO_GPU) and " ms" not in printed
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][1:] == list(
        PRESETS["full"].sizes
    )
    out = tmp_path / "step.json"
    assert main([T2I, "--out", str(out)]) == 2 and not out.exists()
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "100"], "size 100x100: expected multiples of 32 pixels"),
        (["--sizes", "big"], "--sizes: expected sides in pixels or 'mixed', received 'big'"),
        (["--device", "cpu", "objective.directional=false"], "objective.directional: the baseline has True"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([T2I, *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_step_has_an_even_number_of_images_that_fill_the_pack() -> None:
    settings, full = recipe(TEXT, "data.tokens_per_pack=32768"), PRESETS["full"]
    for size, count in (("1024", 32), ("256", 512), ("2048", 8), ("512", 128), ("4096", 2)):
        assert images_of(size, settings, full) == [((int(size), int(size)), count)]
    mixed = images_of("mixed", settings, full)
    assert [count for _, count in mixed] == [8] * 4
    assert len({height * width for (height, width), _ in mixed}) == 4
    # Too large for the pack: two images, one of each kind.
    assert images_of("8192", settings, full) == [((8192, 8192), 2)]
    with pytest.raises(RequestError):
        images_of("0", settings, full)


def test_the_command_describes_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert (bench.__doc__ or "").splitlines()[0] in capsys.readouterr().out


@pytest.mark.slow
def test_the_trainers_engine_and_the_real_compiler_take_part(tmp_path: Path) -> None:
    from tests.trainer.ranks import run_ranks

    (found,) = run_ranks(_with_deepspeed, tmp_path / "step.json", world_size=1, out=tmp_path / "out")
    assert found == (0, "deepspeed", [list(pair) for pair in IN_ORDER if pair[0] != "ours, twins"])


def _with_deepspeed(out: Path) -> tuple[int, str, list[list[str]]]:
    status = main([T2I, *SMALL, "--device", "cpu", "--engine", "deepspeed", "--out", str(out)])
    stored = json.loads(out.read_text())
    pairs = [[r["implementation"], r["objective"]] for r in stored["rows"]]
    return status, stored["environment"]["engine"], pairs


@pytest.mark.gpu
def test_on_a_gpu_every_contender_has_a_row(tmp_path: Path) -> None:
    """A small network, in the precision of training: kernels, definitions, eager and compiled baseline."""
    out = tmp_path / "step.json"
    arguments = [T2I, "--preset", "small", "--repetitions", "3", "train.precision=bf16_autocast"]
    status = main([*arguments, "--engine", "plain", "--seconds", "600", "--out", str(out)])
    about, found = report.load(out)
    assert status == 0 and about["gpu"] == torch.cuda.get_device_name()
    assert [one.key for one in found] == [(s, *pair) for s in PRESETS["small"].sizes for pair in IN_ORDER]
    for one in found:
        assert isinstance(one, Row)
        assert 0 < one.p20 <= one.p50 <= one.p80
        assert one.peak_bytes is not None and one.peak_bytes > 0
        # Ours by its kernels, and by their definitions.
        if one.implementation == "ours":
            assert one.paths["modulated_layer_norm"] == "triton" and one.paths["varlen_attention"] != "dense"
        elif one.implementation == "ours, twins":
            assert one.paths["modulated_layer_norm"] == "torch" and one.paths["varlen_attention"] != "dense"
    assert "set before any measurement" in out.with_suffix(".md").read_text()
