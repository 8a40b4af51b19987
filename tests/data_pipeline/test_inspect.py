"""The description of a folder of shards."""

import re

import numpy as np
import pytest
from PIL import Image

from data_pipeline import inspect
from data_pipeline.handwriting import Settings, build
from data_pipeline.index import load_index


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
    assert inspect.main([str(text_folder)]) == 1
    assert "does not say which autoencoder" in capsys.readouterr().err
    assert inspect.main([str(text_folder), "--no-sheet"]) == 0
    assert not list(text_folder.glob("*.png"))


def test_class_data_are_described(class_folder, capsys):
    assert inspect.main([str(class_folder), "--no-sheet"]) == 0
    assert re.search(r"^classes\s+10, 10 of them present$", capsys.readouterr().out, re.M)


def test_a_folder_that_is_no_data_set_is_one_error(tmp_path, capsys):
    assert inspect.main([str(tmp_path)]) == 1
    assert "error:" in capsys.readouterr().err
