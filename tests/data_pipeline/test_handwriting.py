"""The embedded data set: a grammar that captions and pictures share, and a build that is whole or absent."""

import itertools
import json
import random

import numpy as np
import pytest
import torch

from data_pipeline import handwriting
from data_pipeline.config import AutoencoderConfig, DataConfig, TextEncoderConfig
from data_pipeline.draws import generator
from data_pipeline.encoders.autoencoder import PixelAutoencoder
from data_pipeline.encoders.text import WordsEncoder
from data_pipeline.errors import DataError
from data_pipeline.handwriting import (
    PHRASINGS,
    Prompt,
    Settings,
    caption,
    compose,
    draw_prompt,
    load_scans,
    parse,
)
from data_pipeline.index import load_index
from data_pipeline.loader import build_loader
from data_pipeline.reader import ShardReader

SMALL = Settings(samples=120, per_shard=50)


def prompts() -> list[Prompt]:
    """Every prompt of up to two cells, and a fixed sample of the longer ones."""
    cells = [None, *range(10)]
    every = [
        Prompt(chosen, orientation)
        for count in (1, 2)
        for chosen in itertools.product(cells, repeat=count)
        if any(c is not None for c in chosen)
        for orientation in (("row",) if count == 1 else ("row", "column"))
    ]
    rng = random.Random(0)
    for _ in range(300):
        chosen = tuple(rng.choice(cells) for _ in range(rng.choice((3, 4))))
        if any(c is not None for c in chosen):
            every.append(Prompt(chosen, rng.choice(("row", "column"))))
    return every


@pytest.fixture(scope="module")
def scans():
    return load_scans()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "handwriting"
    assert handwriting.build(folder, SMALL, progress=False)
    return folder


@pytest.mark.parametrize("phrasing", PHRASINGS)
def test_parse_is_the_inverse_of_caption(phrasing):
    every = prompts()
    assert len(every) > 500
    for prompt in every:
        assert parse(caption(prompt, phrasing)) == prompt


def test_different_prompts_have_different_captions():
    every = set(prompts())
    captions = {caption(p, phrasing) for p in every for phrasing in PHRASINGS}
    singles = sum(len(p.cells) == 1 for p in every)
    assert len(captions) == 2 * len(every) - singles


@pytest.mark.parametrize(
    ("prompt", "chained", "listed"),
    [
        (Prompt((3,)), "a three", "a three"),
        (Prompt((3, 7), "column"), "a three above a seven", "a three, a seven in a column"),
        (Prompt((8, None, 1)), "an eight before a gap before a one", "an eight, a gap, a one in a row"),
    ],
)
def test_captions_read_as_documented(prompt, chained, listed):
    assert (caption(prompt, "chained"), caption(prompt, "listed")) == (chained, listed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "three",
        "a eleven",
        "a eight",
        "a three  above a seven",
        "a three above a seven before a two",
        "a three in a row",
        "a gap",
        "a one, a two",
        " before ".join(["a one"] * 33),
    ],
)
def test_text_outside_the_grammar_is_refused(text):
    with pytest.raises(DataError, match=r"caption|prompt"):
        parse(text)


@pytest.mark.parametrize(
    ("cells", "orientation"),
    [
        ((), "row"),
        ((1,) * 33, "row"),
        ((10,), "row"),
        ((None, None), "row"),
        ((1, 2), "diagonal"),
        ((1,), "column"),
    ],
)
def test_impossible_prompts_are_refused(cells, orientation):
    with pytest.raises(DataError, match="prompt"):
        Prompt(cells, orientation)


def test_scans_are_split_without_overlap_and_always_alike(scans):
    train, held_back = scans
    assert (len(train), len(held_back)) == (1297, 500)
    again, _ = load_scans()
    assert np.array_equal(again.images, train.images)
    from sklearn.datasets import load_digits

    everything = load_digits().images.astype(np.uint8)  # type: ignore[attr-defined]  # a Bunch
    both = np.concatenate([train.images, held_back.images]).reshape(-1, 64)
    assert np.array_equal(np.sort(both, axis=0), np.sort(everything.reshape(-1, 64), axis=0))


def test_a_picture_shows_scans_of_its_digits_in_their_cells(scans):
    train, _ = scans
    known = {(image.tobytes(), int(label)) for image, label in zip(train.images, train.labels, strict=True)}
    checked = 0
    for number, prompt in enumerate(prompts()[::7]):
        picture = compose(prompt, train, generator(0, "test", 0, number))
        assert picture.shape == (1, *prompt.size_px) and picture.dtype == np.float32
        for place, digit in enumerate(prompt.cells):
            along = slice(8 * place, 8 * place + 8)
            cell = picture[0, :, along] if prompt.orientation == "row" else picture[0, along, :]
            if digit is None:
                assert (cell == -1).all()
            else:
                ink = ((cell + 1) * 8).astype(np.uint8)
                assert (ink.tobytes(), digit) in known
                checked += 1
    assert checked > 100


def test_training_prompts_are_never_blank_and_never_four_in_a_row():
    drawn = [draw_prompt(generator(0, "test", 0, n), max_cells=4, gap_share=0.5) for n in range(600)]
    shapes = {(len(p.cells), p.orientation) for p in drawn}
    assert shapes == {(1, "row"), *((n, o) for n in (2, 3) for o in ("row", "column")), (4, "column")}
    assert any(None in p.cells for p in drawn)
    with pytest.raises(DataError, match="expected 1 to 4"):
        Settings(max_cells=5)


def test_the_shards_hold_what_their_captions_say(built, scans):
    train, _ = scans
    known = {(image.tobytes(), int(label)) for image, label in zip(train.images, train.labels, strict=True)}
    index, encoder, autoencoder = load_index(built), WordsEncoder(64), PixelAutoencoder(4, 1)
    reader = ShardReader(index)
    assert len(index) == 120 and len(index.shards) == 3
    for i in range(len(index)):
        sample, meta = reader.read(i), reader.read_meta(i)
        prompt = parse(meta["caption"])
        picture = autoencoder.decode(sample.latent.float()[None])[0, 0].numpy()
        assert picture.shape == prompt.size_px == (meta["height_px"], meta["width_px"])
        cells = np.split(picture, len(prompt.cells), axis=1 if prompt.orientation == "row" else 0)
        for cell, digit in zip(cells, prompt.cells, strict=True):
            ink = ((cell + 1) * 8).astype(np.uint8)
            assert not ink.any() if digit is None else (ink.tobytes(), digit) in known
        assert sample.states is not None
        assert torch.equal(sample.states.float(), encoder.encode([meta["caption"]])[0])


def test_reference_scans_are_those_of_the_split(built, scans):
    train, held_back = scans
    with np.load(built / "reference.npz") as stored:
        assert np.array_equal(stored["train_images"], train.images)
        assert np.array_equal(stored["train_labels"], train.labels)
        assert np.array_equal(stored["held_images"], held_back.images)
        assert np.array_equal(stored["held_labels"], held_back.labels)


def test_the_loader_reads_it_with_the_empty_caption_for_dropped_ones(built):
    config = DataConfig(
        shards=str(built),
        tokens_per_pack=200,
        packs_per_step=2,
        autoencoder=AutoencoderConfig(kind="pixels", factor=4, channels=1),
        text_encoder=TextEncoderConfig(kind="words", width=64),
        caption_dropout=1.0,
    )
    (batches,) = build_loader(config, patch_size=1, num_steps=1)
    null = WordsEncoder(64).encode([""])[0]
    for batch in batches:
        assert batch.text_LE is not None and torch.equal(batch.text_LE, null.expand(len(batch.grids), -1))


def test_a_finished_folder_is_reused_only_with_the_same_settings(built, tmp_path, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    arguments = ["--out", str(built), "--samples", "120", "--per-shard", "50"]
    assert handwriting.main(arguments) == 0
    assert "already there" in capsys.readouterr().out
    assert handwriting.main([*arguments, "--gap-share", "0.2"]) == 2
    assert "other settings: gap_share (there 0.1, asked 0.2)" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before


def test_the_same_settings_give_the_same_bytes(built, tmp_path):
    handwriting.build(tmp_path / "again", SMALL, progress=False)
    names = {path.name for path in built.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == names
    for name in names - {"reference.npz"}:
        assert (tmp_path / "again" / name).read_bytes() == (built / name).read_bytes(), name


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"not empty and holds no manifest\.json"):
        handwriting.build(tmp_path, SMALL, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handwriting, "build_index", fail)
    assert handwriting.main(["--out", str(tmp_path / "data"), "--samples", "5"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_replaced(tmp_path):
    (tmp_path / ".data.partial").mkdir()
    (tmp_path / ".data.partial" / "handwriting-000000.tar").write_bytes(b"half")
    assert handwriting.build(tmp_path / "data", SMALL, progress=False)
    assert len(load_index(tmp_path / "data")) == 120
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_changed_index_is_not_taken_for_the_finished_data(tmp_path):
    handwriting.build(tmp_path / "data", SMALL, progress=False)
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "index_hash": "0" * 32}))
    with pytest.raises(DataError, match="the index is not the one of the manifest"):
        handwriting.build(tmp_path / "data", SMALL, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "--samples"),
        ({"gap_share": 1.0}, "--gap-share"),
        ({"phrasings": ()}, "--phrasings"),
        ({"phrasings": ("sung",)}, "--phrasings"),
        ({"factor": 3}, "--factor"),
        ({"factor": 0}, "--factor"),
    ],
)
def test_settings_out_of_range_name_their_option(changes, message):
    with pytest.raises(DataError, match=message):
        Settings(**changes)


def test_a_split_without_every_digit_is_refused():
    with pytest.raises(DataError, match=r"held-back scans .* do not show every digit"):
        load_scans(num_train=1795)
