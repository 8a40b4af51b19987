"""What is known before a run: all problems at once, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.data_pipeline.tiny_models import save_autoencoders, save_gemma
from tests.trainer.ranks import engine_file, run_ranks
from tests.trainer.test_launch import ROOT, write_recipe
from tests.trainer.test_repa import save_autoencoder
from tim_ds.config.load import load_recipe
from tim_ds.errors import CheckpointError
from tim_ds.trainer.cli import main
from tim_ds.trainer.memory import GIB, MemoryEstimate, Part, Ranks
from tim_ds.trainer.preflight import (
    Findings,
    _has_room,
    _look_at_drawing,
    _look_at_encoders,
    missing_weights,
)
from tim_ds.trainer.world import World

RECIPES = ROOT / "launch" / "recipes"
PREVIEW = "train.preview={every_steps: 2, prompts: [a cat], sizes: [4x6], num_steps: [1, 3]}"


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "out" not in path.parts and path.suffix != ".json"}


def _check(folder: Path, recipe: Path, *more: str) -> tuple[int, set[Path]]:
    before = _files(folder)
    common = ["--check", str(recipe), "--ds", str(engine_file(folder, 2)), "--run", str(folder / "run")]
    return main([*common, *more]), _files(folder) - before


def test_a_check_says_what_will_happen_takes_a_step_and_writes_nothing(tmp_path: Path, shards: Path) -> None:
    recipe, out = write_recipe(tmp_path, shards), tmp_path / "out"
    results = run_ranks(_check, tmp_path, recipe, PREVIEW, world_size=2, out=out)
    assert results == [(0, set()), (0, set())]
    printed = (out / "output_0.txt").read_text()
    assert "64 images in 5 steps" in printed and "4 steps, 0.80 epochs" in printed
    assert "4 packs, 2 a rank on 2 ranks" in printed and "FLOP a step" in printed
    assert "16 of 16 samples" in printed and "26,492 trained parameters, 2 GPUs" in printed
    assert re.search(r"memory +for packs of \d+ images, as in the fullest of the first step", printed)
    assert "every 100 steps, 1 in the run" in printed and "4x6  a cat" in printed
    if not torch.cuda.is_available():
        total = re.search(r"total +([\d.]+) +([\d.]+)", printed)
        on_host = re.search(
            r"no GPU here +the column is that of a run on GPUs.* at least ([\d.]+) GiB", printed
        )
        assert total is not None and on_host is not None
        # Both columns, less what is assumed for CUDA.
        assert float(on_host[1]) == pytest.approx(float(total[1]) + float(total[2]) - 1.25, abs=0.02)
    assert "gradient norm" in printed and "no problems: the run can begin" in printed
    assert "no problems" not in (out / "output_1.txt").read_text(), "one rank prints"


def test_all_problems_are_listed(tmp_path: Path, shards: Path) -> None:
    recipe, out = write_recipe(tmp_path, shards), tmp_path / "out"
    wrong = (
        "model.text_dim=12",
        "data.text_encoder.width=12",
        "data.packs_per_step=4",
        "train.init_from=" + str(tmp_path / "none"),
        "train.checkpoint.keep=100000000",
        "train.evaluation.every_steps=2",
        f"train.evaluation.data={tmp_path / 'no_digits'}",
        "train.ema.averages=[{name: a, sigma_rel: 0.05}, {name: b, sigma_rel: 0.1}]",
        "train.ema.use=a",
        "train.ema.snapshots={every_steps: 1, keep: 100000000}",
        "train.evaluation.benchmarks=[{kind: mjhq, size: 4x4, metadata: no.json}]",
        PREVIEW,
    )
    ((code, written),) = run_ranks(
        _check, tmp_path, recipe, "--ranks=2", "--card-gib=0.5", *wrong, world_size=1, out=out
    )
    assert (code, written) == (2, set())
    printed = (out / "output_0.txt").read_text()
    for problem in (
        "text states in",
        "train.init_from",
        "train.evaluation.benchmarks[0]: --metadata no.json: cannot be read",
        "no_digits",
        "disk: 100,000,001 checkpoints, 4 snapshots of the averages and the exported weights",
        "memory: a rank needs",
    ):
        assert problem in printed.split("problems:")[1], printed
    assert "gradient norm" not in printed, "the step is not taken where it would fail"
    assert "not taken          because of the problems below" in printed


def test_a_step_that_a_machine_without_a_gpu_could_not_hold_is_not_tried() -> None:
    def needs(gib: int) -> MemoryEstimate:
        part = Part("activations", gib * GIB, 0, "")
        return MemoryEstimate(Ranks(1, 1), 0, (part,), 0, 0, 0)

    found = Findings()
    assert _has_room(found, needs(0), World(), 0) and not found.lines
    assert not _has_room(found, needs(1 << 20), World(), 0)
    assert "not tried          without a GPU the machine would have to hold 1048576.0 GiB" in found.lines[0]


def test_what_is_found_is_told_before_the_step_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = Findings()
    found.title("recipe")
    found.say("name", "mine")
    found.title("one step")
    found.tell()
    assert capsys.readouterr().out == "recipe\n  name               mine\n\none step\n"
    found.say("loss", "1")
    found.tell()
    assert capsys.readouterr().out == "  loss               1\n"


def test_a_wrong_recipe_and_a_wrong_engine_file_are_told_together(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "out"
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"zero_optimisation": {}}')
    arguments = ["--check", str(write_recipe(tmp_path, shards)), "train.stepz=3", "--ds", str(wrong)]
    assert run_ranks(main, arguments, world_size=1, out=out) == [2]
    printed = (out / "output_0.txt").read_text()
    assert "train.stepz: unknown key" in printed and "did you mean 'zero_optimization'?" in printed


def test_without_the_data_every_encoder_that_the_run_needs_is_missed() -> None:
    """The shards decide what is encoded while training; without them, the recipe's word is taken."""
    recipe = load_recipe(str(RECIPES / "t2i_xl_repa.yaml"), ["train.preview={}"])
    found = Findings()
    _look_at_encoders(found, recipe, None)
    assert [problem.split(":")[0] for problem in found.problems] == [
        "data.autoencoder.path",
        "data.text_encoder.path",
        "data.image_encoder.path",
    ]
    assert "needed for the alignment" in found.problems[-1]
    assert not any("not needed" in line for line in found.lines)
    # Latents and states are stored, and pictures are made of neither.
    plain = Findings()
    _look_at_encoders(plain, load_recipe(str(RECIPES / "t2i_xl.yaml"), ["train.preview={}"]), None)
    assert plain.problems == [] and sum("not needed by this run" in line for line in plain.lines) == 2


def test_encoders_of_previews_that_could_not_be_loaded_are_problems(tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "dc_ae")
    save_gemma(tmp_path / "gemma")
    overrides = [
        *("model.text_dim=16", f"data.autoencoder.path={tmp_path / 'dc_ae'}"),
        f"data.text_encoder.path={tmp_path / 'gemma'}",
        "train.preview={every_steps: 1, prompts: [a cat], sizes: [64x64], num_steps: [1]}",
    ]
    recipe = load_recipe(str(RECIPES / "t2i_xl.yaml"), overrides)
    whole = Findings()
    _look_at_encoders(whole, recipe, None)
    _look_at_drawing(whole, recipe, World(), None)
    assert whole.problems == []
    # As downloads and full disks leave it.
    file = tmp_path / "dc_ae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    cut = Findings()
    _look_at_encoders(cut, recipe, None)
    (problem,) = cut.problems
    assert problem.startswith("data.autoencoder.path:") and "1,000 bytes, cannot be read" in problem
    # Whole, but of another model than the network was made for.
    save_autoencoders(tmp_path)
    other = Findings()
    _look_at_encoders(other, recipe, None)
    _look_at_drawing(other, recipe, World(), None)
    (problem,) = other.problems
    assert "makes latents of 4 channels, the network expects 32" in problem


def test_an_error_of_several_problems_is_counted_by_its_problems() -> None:
    found = Findings()

    def refuse() -> None:
        raise CheckpointError(
            "step_1: of another run; give back\n  model.depth: 2\n  model.width: 3\nsecond: bad"
        )

    assert found.attempt(refuse) is None
    assert found.problems == [
        "step_1: of another run; give back\n  model.depth: 2\n  model.width: 3",
        "second: bad",
    ]


def test_weights_are_a_folder_with_a_configuration_or_in_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    assert "neither a folder nor" in (missing_weights(str(folder), None) or "")
    assert missing_weights("org/name", "commit:abc") is None
    folder.mkdir()
    assert "no config.json" in (missing_weights(str(folder), None) or "")
    (folder / "config.json").write_text("{}")
    assert "no weights" in (missing_weights(str(folder), None) or "")
    (folder / "model.safetensors").write_bytes(b"")
    assert missing_weights(str(folder), None) is None
