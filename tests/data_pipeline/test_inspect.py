"""The description of a folder of shards."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipeline import inspect
from data_pipeline.encoders.autoencoder import build_autoencoder
from data_pipeline.handwriting import Settings, build
from data_pipeline.index import build_index, load_index
from data_pipeline.loader import build_loader
from tests.data_pipeline.conftest import write_tar
from tim_ds.config.load import load_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "handwriting"
    build(path, Settings(samples=80), progress=False)
    return path


def test_histogram_counts_every_sample(folder):
    rows = inspect.size_histogram(load_index(folder))
    assert sum(row.count for row in rows) == 80
    assert {(row.height, row.width) for row in rows} <= {(2, 2), (2, 4), (2, 6), (4, 2), (6, 2), (8, 2)}
    assert [row.count for row in rows] == sorted((row.count for row in rows), reverse=True)


def test_command_prints_the_figures_and_draws_the_sheet(folder, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    arguments = [str(folder), "--tokens-per-pack", "256", "--packs-per-step", "2", "--samples", "9"]
    assert inspect.main([*arguments, "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^samples\s+80$", out, re.M)
    fill = re.search(r"^fill\s+([\d.]+)%$", out, re.M)
    assert fill and 50 < float(fill.group(1)) <= 100
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture)
    # Eight tiles in the first of two rows; the drawn cells hold ink, so the first tile is not uniform.
    assert pixels.shape[1] == 8 * (inspect.TILE_PX + 8)
    assert len(np.unique(pixels[8:60, 8:60])) > 2


def test_shards_without_a_manifest_need_no_sheet(text_folder, capsys):
    assert inspect.main([str(text_folder)]) == 2
    assert "does not say which autoencoder" in capsys.readouterr().err
    assert inspect.main([str(text_folder), "--no-sheet"]) == 0
    assert not list(text_folder.glob("*.png"))


def test_class_data_are_described(class_folder, capsys):
    assert inspect.main([str(class_folder), "--no-sheet"]) == 0
    assert re.search(r"^classes\s+10, 10 of them present$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_the_printed_settings_are_a_recipe_that_the_shards_agree_with(
    kind, folder, class_folder, tmp_path, capsys
):
    shards = tmp_path / "größe 📷: a 'b' # c"
    shards.symlink_to(folder if kind == "text" else class_folder)
    assert inspect.main([str(shards), "--no-sheet", "--packs-per-step", "2"]) == 0
    printed = capsys.readouterr().out.split("\nmodel:\n", 1)[1]
    lines = ["model:", "  hidden_size: 32", "  depth: 2", "  num_heads: 4", printed.rstrip()]
    if kind == "class":
        # Those shards were not prepared: nothing says what made them.
        assert "# autoencoder, text_encoder: not recorded" in printed
        lines.append("  autoencoder: {kind: sd_vae, path: vae}")
    written = tmp_path / "recipe.yaml"
    written.write_text("\n".join(["name: mine", "train: {steps: 1}", *lines]) + "\n")
    recipe = load_recipe(str(written), [])
    index = load_index(shards)
    assert (recipe.model.in_channels, recipe.model.condition) == (index.channels, kind)
    assert (recipe.data.shards, recipe.data.packs_per_step) == (str(shards), 2)
    if kind == "text":
        loader = build_loader(recipe.data, patch_size=1, num_steps=1)
        assert len(next(iter(loader))) == 2


def test_a_folder_that_is_no_data_set_is_one_error(tmp_path, capsys):
    assert inspect.main([str(tmp_path)]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_large_index_is_described_from_some_of_its_rows(text_folder, monkeypatch, capsys):
    index = load_index(text_folder)
    assert np.array_equal(inspect.some_rows(index), np.arange(150))
    monkeypatch.setattr(inspect, "ROWS", 40)
    monkeypatch.setattr(inspect, "RUNS", 4)
    rows = inspect.some_rows(index)
    assert len(rows) == len(set(rows.tolist())) == 40 and rows.min() == 0 and rows.max() == 149
    assert inspect.main([str(text_folder), "--no-sheet"]) == 0
    out = capsys.readouterr().out
    assert "(of 40 samples looked at)" in out and re.search(r"^samples\s+150$", out, re.M)


def test_drops_and_bad_samples_are_told(class_folder, tmp_path, capsys):
    folder = shutil.copytree(class_folder, tmp_path / "copy")
    write_tar(folder / "x.tar", [("lost.cls", b"1")])
    build_index(folder, progress=False).save()
    (folder / "manifest.json").write_text(json.dumps({"report": {"dropped": {"too small": 7, "broken": 2}}}))
    assert inspect.main([str(folder), "--no-sheet"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^dropped\s+9 of the source", out, re.M) and re.search(r"^\s+7  too small$", out, re.M)
    assert re.search(r"^bad\s+1 samples", out, re.M) and "x.tar:lost: expected a member latent" in out


def test_a_damaged_sample_leaves_its_tile_empty(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = load_index(copy)
    for shard in copy.glob("*.tar"):
        with open(shard, "r+b") as stream:
            stream.seek(int(index.columns["offset"][0]) + 100)
            stream.write(b"damage")
    with_damage = inspect.contact_sheet(
        index, build_autoencoder(inspect.manifest_autoencoder(copy)), count=80, seed=0
    )
    whole = inspect.contact_sheet(
        load_index(folder), build_autoencoder(inspect.manifest_autoencoder(folder)), count=80, seed=0
    )
    assert with_damage.size == whole.size and with_damage.tobytes() != whole.tobytes()
