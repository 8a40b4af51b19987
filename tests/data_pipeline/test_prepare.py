"""From every kind of source to shards that the loader reads; killed, resumed, spread over processes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data_pipeline import inspect, pictures, prepare, sources
from data_pipeline.config import AutoencoderConfig, DataConfig, TextEncoderConfig
from data_pipeline.encoders.autoencoder import PixelAutoencoder, build_autoencoder
from data_pipeline.encoders.language_model import load_gemma, load_t5
from data_pipeline.encoders.text import WordsEncoder
from data_pipeline.errors import DataError
from data_pipeline.index import build_index, load_index
from data_pipeline.loader import build_loader
from data_pipeline.reader import ShardReader
from data_pipeline.resolution import SizeRules, fit
from data_pipeline.schema import decode_tensor, decode_tensors, take_variants
from data_pipeline.sources.item import (
    BAD_CAPTION,
    BAD_LATENT,
    ESCAPES,
    MISSING,
    NO_PICTURE,
    UNREADABLE,
)
from tests.data_pipeline import odd_pictures, source_folders
from tests.data_pipeline.tiny_models import save_autoencoders, save_gemma, save_t5

COUNT = 13
PIXELS = ["--autoencoder", "pixels", "--factor", "4"]
WORDS = ["--text-encoder", "words", "--text-width", "8"]
RULES = ["--per-shard", "5", "--max-crop", "0.3"]


def run(path: Path, out: Path, *options: str) -> int:
    return prepare.main([str(path), "--out", str(out), "--no-progress", "--device", "cpu", *RULES, *options])


def manifest_of(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def metas(out: Path) -> list[dict]:
    reader = ShardReader(load_index(out))
    return [reader.read_meta(n) for n in range(len(reader.index))]


def file_hashes(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


def load_all(out: Path, autoencoder: AutoencoderConfig, text: TextEncoderConfig | None) -> set[int]:
    """Ids of the samples that one epoch of the training loader yields."""
    config = DataConfig(
        shards=str(out),
        tokens_per_pack=4096,
        packs_per_step=1,
        autoencoder=autoencoder,
        text_encoder=text,
        caption_dropout=0.0,
        encode_online=bool(load_index(out).online),
    )
    probe = build_loader(config, patch_size=1, num_steps=0)
    steps = build_loader(config, patch_size=1, num_steps=probe.steps_per_epoch)
    return {sample for batches in steps for batch in batches for sample in batch.sample_ids}


MAKERS = {
    "folder": source_folders.folder,
    "list": source_folders.jsonl,
    "parquet": source_folders.parquet,
    "metadata": source_folders.metadata,
    "embedded": source_folders.embedded,
    "webdataset": source_folders.webdataset,
    "tim_toy": source_folders.toy,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_source_becomes_shards_that_the_loader_reads(kind, tmp_path):
    (tmp_path / "source").mkdir()
    source, out = MAKERS[kind](tmp_path / "source", COUNT), tmp_path / "out"
    assert run(source, out, *PIXELS, *WORDS) == 0
    manifest = manifest_of(out)
    assert manifest["source"]["kind"] == (kind if kind in sources.KINDS else "list")
    assert (manifest["samples"], manifest["report"]["dropped"]) == (COUNT, {})
    text = TextEncoderConfig(kind="words", width=8)
    assert load_all(out, AutoencoderConfig(kind="pixels", factor=4), text) == set(range(COUNT))
    # Caption and picture of a sample belong together, and each is what the source holds.
    found = {meta["caption"]: meta for meta in metas(out)}
    assert len(found) == COUNT
    for number, size in enumerate(source_folders.sizes(COUNT)):
        meta = found[source_folders.captions(number)[0]]
        assert meta["original_px"] == list(size)
        assert meta.get("captions", [meta["caption"]]) == source_folders.captions(number)


def test_latents_are_those_of_the_resized_picture(tmp_path):
    source, out = source_folders.folder(tmp_path / "source", COUNT), tmp_path / "out"
    assert run(source, out, *PIXELS, *WORDS, "--flip") == 0
    reader = ShardReader(index := load_index(out))
    rules = SizeRules(multiple=4, max_crop=0.3)
    names = sorted(p.relative_to(source).as_posix() for p in source.rglob("*.png"))
    for sample_id, name in enumerate(names):
        with Image.open(source / name) as opened:
            picture = opened.convert("RGB")
        fitted = fit(picture.height, picture.width, rules)
        pixels = pictures.to_pixels(pictures.apply_fit(picture, fitted), 3)  # type: ignore[arg-type]
        expected = PixelAutoencoder(4, 3).encode(pictures.normalise(pixels)[None])[0].half()
        assert torch.equal(reader.read(sample_id).latent, expected)
        member = reader.read_member(sample_id, "latent")
        mirrored = PixelAutoencoder(4, 3).encode(pictures.normalise(pixels.flip(-1))[None])[0].half()
        assert torch.equal(decode_tensor(member, "flipped", ""), mirrored)
        meta = reader.read_meta(sample_id)
        assert meta["source"] == name and index.key(sample_id) == f"{sample_id:09d}"
        assert [meta["height_px"], meta["width_px"]] == [4 * n for n in expected.shape[1:]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_autoencoders(folder)
    for name, save in (("gemma", save_gemma), ("t5", save_t5)):
        (folder / name).mkdir()
        save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("autoencoder", "text", "dtype"), [("dc_ae", "gemma", "bfloat16"), ("sd_vae", "t5", "float16")]
)
def test_pretrained_encoders_give_what_they_give_one_by_one(models, tmp_path, autoencoder, text, dtype):
    source, out = source_folders.folder(tmp_path / "source", 6), tmp_path / "out"
    paths = ["--autoencoder-path", str(models / autoencoder), "--text-encoder-path", str(models / text)]
    options = ["--autoencoder", autoencoder, "--text-encoder", text, "--dtype", dtype, *paths]
    assert run(source, out, *options) == 0
    manifest = manifest_of(out)
    assert manifest["dtype"] == dtype
    assert all(value.startswith("blake2b:") for value in manifest["revisions"].values())
    config = AutoencoderConfig(kind=autoencoder, path=str(models / autoencoder))
    text_config = TextEncoderConfig(kind=text, path=str(models / text))
    assert load_all(out, config, text_config) == set(range(6))
    encoder = build_autoencoder(config)
    path = str(models / text)
    language = (
        load_gemma(path, max_tokens=256, constant_padding=False)
        if text == "gemma"
        else load_t5(path, max_tokens=256)
    )
    reader = ShardReader(load_index(out))
    for sample_id in range(6):
        meta, stored = reader.read_meta(sample_id), reader.read(sample_id)
        with Image.open(source / meta["source"]) as opened:
            picture = opened.convert("RGB")
        rules = SizeRules(multiple=encoder.stride, max_crop=0.3)
        fitted = fit(picture.height, picture.width, rules)
        pixels = pictures.normalise(pictures.to_pixels(pictures.apply_fit(picture, fitted), 3))  # type: ignore[arg-type]
        expected = encoder.encode(pixels[None])[0]
        # 16-bit storage: 2^-8 relative for bfloat16, 2^-11 for float16; batches sum in another order.
        tolerance = 2**-8 if dtype == "bfloat16" else 2**-10
        torch.testing.assert_close(stored.latent.float(), expected, rtol=tolerance, atol=1e-4)
        # Weights in bfloat16, whose sums change with the padding of a batch (measured 0.03).
        assert stored.states is not None
        torch.testing.assert_close(
            stored.states.float(), language.encode([meta["caption"]])[0], rtol=0.05, atol=0.06
        )
    null = load_file(out / "null.safetensors")["states"]
    torch.testing.assert_close(null.float(), language.encode([""])[0], rtol=tolerance, atol=1e-3)


def test_further_captions_are_stored_as_variants(tmp_path):
    (tmp_path / "source").mkdir()
    source, out = source_folders.jsonl(tmp_path / "source", COUNT), tmp_path / "out"
    assert run(source, out, *PIXELS, *WORDS, "--keep", "license,absent") == 0
    reader, encoder = ShardReader(load_index(out)), WordsEncoder(8)
    for sample_id in range(COUNT):
        member = reader.read_member(sample_id, "text")
        stored = take_variants(decode_tensors(member, ""), "states", "")
        expected = encoder.encode(source_folders.captions(sample_id))
        assert len(stored) == len(expected)
        assert all(torch.equal(a.float(), b) for a, b in zip(stored, expected, strict=True))
        assert reader.read_meta(sample_id)["extra"] == {"license": "cc0"}
    assert run(source, tmp_path / "first", *PIXELS, *WORDS, "--captions", "first") == 0
    assert not any("captions" in meta for meta in metas(tmp_path / "first"))


def test_stored_latents_keep_their_mirror_image_and_label(models, tmp_path):
    source, out = source_folders.latents(tmp_path / "source", 7), tmp_path / "out"
    (source / "n00000000" / "broken.safetensors").write_bytes(b"no tensors")
    options = ["--autoencoder", "sd_vae", "--autoencoder-path", str(models / "sd_vae"), "--num-classes", "10"]
    assert run(source, out, *options, "--max-drop-share", "0.5") == 0
    manifest = manifest_of(out)
    assert manifest["report"]["dropped"] == {BAD_LATENT: 1}
    assert "mirror" in manifest["augmentation"]
    index = load_index(out)
    assert (index.num_classes, len(index)) == (10, 7)
    reader = ShardReader(index)
    for sample_id in range(7):
        found = load_file(source / reader.read_meta(sample_id)["source"])
        member = reader.read_member(sample_id, "latent")
        assert torch.equal(decode_tensor(member, "latent", ""), found["latent"][0].half())
        assert torch.equal(decode_tensor(member, "flipped", ""), found["latent"][1].half())
        assert reader.read(sample_id).label == int(found["label"])
    config = AutoencoderConfig(kind="sd_vae", path=str(models / "sd_vae"))
    assert load_all(out, config, None) == set(range(7))
    wrong = ["--autoencoder", "pixels", "--factor", "4"]
    assert run(source, tmp_path / "wrong", *wrong) == 2


def test_classes_come_from_folders_lists_and_tars(tmp_path):
    (tmp_path / "list").mkdir()
    for name, source in (
        ("folder", source_folders.folder(tmp_path / "folder", COUNT)),
        ("list", source_folders.jsonl(tmp_path / "list", COUNT)),
        ("tar", source_folders.webdataset(tmp_path / "tar", COUNT)),
    ):
        out = tmp_path / f"out_{name}"
        assert run(source, out, *PIXELS, "--condition", "class") == 0
        index = load_index(out)
        labels = index.columns["label"].tolist()
        if name == "folder":
            assert manifest_of(out)["classes"] == ["class_0", "class_1"]
            assert labels == [0] * 7 + [1] * 6 and index.num_classes == 2
        else:
            assert labels == [n % 3 for n in range(COUNT)] and index.num_classes == 3
        assert load_all(out, AutoencoderConfig(kind="pixels", factor=4), None) == set(range(COUNT))
        stored = tmp_path / f"stored_{name}"
        assert run(source, stored, *PIXELS, "--condition", "class", "--pictures", "png") == 0
        assert load_index(stored).columns["label"].tolist() == labels
        assert load_all(stored, AutoencoderConfig(kind="pixels", factor=4), None) == set(range(COUNT))


def test_a_file_of_classes_is_read_as_an_editor_left_it(tmp_path, capsys):
    source, names = source_folders.folder(tmp_path / "source", COUNT), tmp_path / "classes.txt"
    names.write_bytes("\ufeffclass_0\r\nclass_1\r\n".encode())
    options = [*PIXELS, "--condition", "class", "--classes", str(names)]
    assert run(source, tmp_path / "out", *options) == 0
    assert manifest_of(tmp_path / "out")["classes"] == ["class_0", "class_1"]
    names.write_bytes("class_0\nhöhle\n".encode("latin-1"))
    assert run(source, tmp_path / "other", *options) == 2
    assert f"--classes {names}: expected text in UTF-8" in capsys.readouterr().err


def test_captions_are_found_whatever_the_case_of_their_endings(tmp_path):
    source = tmp_path / "camera"
    source.mkdir()
    for number, ending in enumerate(("txt", "TXT", "JSON")):
        (source / f"{number}.JPG").write_bytes(odd_pictures.encode(odd_pictures.plain(), "JPEG"))
        caption = f"picture {number}"
        text = json.dumps({"caption": caption}) if ending == "JSON" else caption
        (source / f"{number}.{ending}").write_text(text)
    assert run(source, tmp_path / "out", *PIXELS, *WORDS) == 0
    assert sorted(meta["caption"] for meta in metas(tmp_path / "out")) == [f"picture {n}" for n in range(3)]


def test_what_a_folder_does_not_give_is_told(tmp_path, caplog, capsys):
    source = source_folders.folder(tmp_path / "source", 4)
    # Of a telephone; Pillow does not read it.
    (source / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (source / "phone.txt").write_text("a picture")
    (tmp_path / "elsewhere").mkdir()
    (source / "more").symlink_to(tmp_path / "elsewhere")
    assert run(source, tmp_path / "out", *PIXELS, *WORDS, "--max-drop-share", "0.5") == 0
    assert "phone.HEIC: HEIC, which is not read here; convert it to JPEG or PNG" in capsys.readouterr().out
    assert [r.getMessage() for r in caplog.records if "links" in r.getMessage()] == [
        f"{source}: folders that are links are not entered: more"
    ]


def test_the_toy_layout_can_take_its_own_buckets(tmp_path):
    source, out = source_folders.toy(tmp_path / "source", COUNT), tmp_path / "out"
    assert run(source, out, *PIXELS, *WORDS, "--size", "buckets") == 0
    for meta in metas(out):
        number = int(meta["source"].rpartition("/")[2].partition(".")[0])
        # Height first, each side floored to the multiple, stretched as it takes.
        assert [meta["height_px"], meta["width_px"]] == [40 + 8 * (number % 3), 36]
        assert meta["crop_px"][:2] == [0, 0] and meta["extra"]["bucket"].endswith("x37")


def odd_folder(root: Path) -> Path:
    root.mkdir()
    for number, (name, data) in enumerate((odd_pictures.handled() | odd_pictures.refused()).items()):
        (root / f"{number:02d}_{name}.png").write_bytes(data)
        (root / f"{number:02d}_{name}.txt").write_text(name)
    return root


def test_every_odd_picture_is_stored_or_counted(tmp_path, capsys):
    source, out = odd_folder(tmp_path / "source"), tmp_path / "out"
    assert run(source, out, *PIXELS, *WORDS, "--max-drop-share", "0.9") == 0
    report = manifest_of(out)["report"]
    assert report["samples"] == len(odd_pictures.handled())
    assert sum(report["dropped"].values()) == len(odd_pictures.refused())
    assert report["items"] == report["samples"] + sum(report["dropped"].values())
    assert report["dropped"][pictures.EMPTY] == 1 and report["dropped"][pictures.BOMB] == 1
    # Each reason names a file.
    assert all(len(named) > 0 and ".png" in named[0] for named in report["examples"].values())
    assert {m["caption"] for m in metas(out)} == set(odd_pictures.handled())
    printed = capsys.readouterr().out
    assert f"{pictures.TRUNCATED}: " in printed and "transparency on white" in printed


def write_captioned(root: Path, texts: dict[str, bytes]) -> Path:
    root.mkdir()
    for name, text in texts.items():
        (root / f"{name}.png").write_bytes(odd_pictures.handled()["png"])
        (root / f"{name}.txt").write_bytes(text)
    return root


def test_odd_captions_follow_the_rules(tmp_path, caplog):
    texts = {
        "bom": "\ufeffa  word\n in two lines".encode(),
        "empty": b" \n ",
        "latin": "\u00e9t\u00e9".encode("latin-1"),
        "long": b"ab " * 33_334,
        "nul": b"a\x00b",
    }
    source = write_captioned(tmp_path / "source", texts)
    (source / "none.png").write_bytes(odd_pictures.handled()["png"])
    share = ["--max-drop-share", "0.9"]
    assert run(source, tmp_path / "out", *PIXELS, *WORDS, *share, "--max-caption-characters", "100") == 0
    report = manifest_of(tmp_path / "out")["report"]
    assert report["dropped"] == {"empty caption": 1, "no caption": 1, BAD_CAPTION: 1}
    assert report["notes"]["caption cut"] == 1
    assert "caption of 100001 characters cut to 100" in caplog.text
    found = {meta["source"]: meta["caption"] for meta in metas(tmp_path / "out")}
    assert found["bom.png"] == "a word in two lines" and found["nul.png"] == "a b"
    assert len(found["long.png"]) == 100
    assert run(source, tmp_path / "kept", *PIXELS, *WORDS, *share, "--empty-captions", "keep") == 0
    kept = {meta["source"]: meta["caption"] for meta in metas(tmp_path / "kept")}
    assert kept["empty.png"] == kept["none.png"] == ""


def test_paths_that_leave_the_source_are_refused(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(odd_pictures.handled()["png"])
    root = tmp_path / "source"
    root.mkdir()
    (root / "in.png").write_bytes(odd_pictures.handled()["png"])
    out_of_it = ["../secret.png", str(secret), "sub/../../secret.png", "in\x00.png"]
    names = ["in.png", "absent.png", "./in.png", *out_of_it]
    (root / "list.jsonl").write_text("".join(json.dumps({"path": n, "caption": "a"}) + "\n" for n in names))
    share = ["--max-drop-share", "0.9"]
    assert run(root / "list.jsonl", tmp_path / "out", *PIXELS, *WORDS, *share) == 0
    report = manifest_of(tmp_path / "out")["report"]
    assert report["samples"] == 2
    assert report["dropped"] == {ESCAPES: 4, MISSING: 1}
    assert report["examples"][ESCAPES][0] == f"../secret.png is not in {root} (--root)"
    # A wider root is a decision of the user.
    assert run(root / "list.jsonl", tmp_path / "wide", *PIXELS, *WORDS, *share, "--root", str(tmp_path)) == 0
    assert manifest_of(tmp_path / "wide")["report"]["samples"] == 1


@pytest.mark.parametrize("path", [".", "metadata.jsonl"])
def test_a_list_may_lie_in_the_working_folder(path, tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    folder = source_folders.metadata(tmp_path / "source", 6)
    [listed] = folder.rglob("metadata.jsonl")
    monkeypatch.chdir(listed.parent)
    assert run(Path(path), tmp_path / "out", *PIXELS, *WORDS) == 0
    assert manifest_of(tmp_path / "out")["samples"] == 6


def test_shards_may_lie_within_the_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(source_folders.folder(tmp_path / "source", 6))
    here, out = Path(), Path("shards")
    assert run(here, out, *PIXELS, *WORDS) == 0
    # With its sheet, which is a picture, too.
    assert inspect.main([str(out)]) == 0
    assert run(here, out, *PIXELS, *WORDS) == 0
    assert "already there with these settings" in capsys.readouterr().out


def test_odd_tars_are_used_as_far_as_they_go(tmp_path):
    root = tmp_path / "source"
    root.mkdir()
    data = odd_pictures.handled()["png"]
    with tarfile.open(root / "a.tar", "w") as tar:
        source_folders.add_member(tar, "../out.png", data)
        source_folders.add_member(tar, "../out.txt", b"a")
        source_folders.add_member(tar, "only.txt", b"a")
        source_folders.add_member(tar, "good.png", data)
        source_folders.add_member(tar, "good.txt", b"a good one")
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source_folders.webdataset(root, 4)
    whole = (root / "00000.tar").read_bytes()
    with tarfile.open(root / "00000.tar") as tar:
        last = max(info.offset for info in tar)
    # Within the header of the last member: three whole samples, and a fourth without its label.
    (root / "00000.tar").write_bytes(whole[: last + 100])
    assert run(root, tmp_path / "out", *PIXELS, *WORDS, "--max-drop-share", "0.9") == 0
    report = manifest_of(tmp_path / "out")["report"]
    assert "a good one" in {meta["caption"] for meta in metas(tmp_path / "out")}
    assert report["dropped"][ESCAPES] == 1 and report["dropped"][NO_PICTURE] == 1
    assert report["dropped"][UNREADABLE] == 1 and report["samples"] == 5
    (root / "b.tar").write_bytes(b"no tar at all")
    assert run(root, tmp_path / "other", *PIXELS, *WORDS) == 2


def test_latents_that_are_not_finite_are_dropped(models, tmp_path):
    source = source_folders.latents(tmp_path / "source", 6)
    broken = source / "n00000000" / "picture_0.safetensors"
    pair = load_file(broken)
    # 1e5 is finite, but not in float16.
    for value, dtype, dropped in ((float("nan"), "bfloat16", 1), (1e5, "float16", 1), (1e5, "bfloat16", 0)):
        pair["latent"][1, 0, 0, 0] = value
        save_file(pair, broken)
        out = tmp_path / f"{value}_{dtype}"
        options = ["--autoencoder", "sd_vae", "--autoencoder-path", str(models / "sd_vae"), "--dtype", dtype]
        assert run(source, out, *options, "--max-drop-share", "0.5") == 0
        assert manifest_of(out)["report"]["samples"] == 6 - dropped


def test_a_dry_run_weighs_the_shards_exactly(tmp_path, capsys):
    source, out = odd_folder(tmp_path / "source"), tmp_path / "out"
    options = [*PIXELS, *WORDS, "--max-drop-share", "0.9", "--flip"]
    assert run(source, out, *options, "--dry-run") == 0
    assert not out.exists()
    weighed = capsys.readouterr().out
    assert "nothing was written" in weighed and "as ids" in weighed
    assert run(source, out, *options) == 0
    written = capsys.readouterr().out
    assert weighed.splitlines()[:-1] == written.splitlines()[:-1]
    # The line of the shards is of bytes that lie there.
    total = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert f"{total / 2**20:.1f} MiB in all" in written
    assert sum(entry["bytes"] for entry in manifest_of(out)["report"]["shards"].values()) == total


def test_a_dry_run_needs_no_weights(models, tmp_path, capsys):
    bare = tmp_path / "models"
    for kind in ("dc_ae", "gemma"):
        (bare / kind).mkdir(parents=True)
        for file in (models / kind).iterdir():
            if file.suffix != ".safetensors":
                (bare / kind / file.name).write_bytes(file.read_bytes())
    source, out = source_folders.folder(tmp_path / "source", 6), tmp_path / "out"

    def options(folder: Path) -> list[str]:
        return [
            "--autoencoder", "dc_ae", "--autoencoder-path", str(folder / "dc_ae"),
            "--text-encoder", "gemma", "--text-encoder-path", str(folder / "gemma"),
        ]  # fmt: skip

    assert run(source, out, *options(bare), "--dry-run") == 0
    weighed = capsys.readouterr().out
    assert run(source, out, *options(models)) == 0
    assert weighed.splitlines()[:-1] == capsys.readouterr().out.splitlines()[:-1]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of 60 pictures and what an uninterrupted run makes of it."""
    root = tmp_path_factory.mktemp("many")
    source_folders.folder(root / "source", 60)
    assert run(root / "source", root / "out", *PIXELS, *WORDS) == 0
    return root / "source", file_hashes(root / "out")


def test_ranks_and_workers_write_the_same_files(many, tmp_path, capsys):
    source, expected = many
    for rank in (2, 0, 1):
        place = ["--rank", str(rank), "--world-size", "3"]
        assert run(source, tmp_path / "ranks", *PIXELS, *WORDS, *place) == 0
        assert (tmp_path / "ranks" / "manifest.json").exists() == (rank == 1)
    assert "rank 2 of 3 is done; 8 of 12 parts are still to come" in capsys.readouterr().out
    assert file_hashes(tmp_path / "ranks") == expected
    assert run(source, tmp_path / "workers", *PIXELS, *WORDS, "--workers", "2") == 0
    assert file_hashes(tmp_path / "workers") == expected


def test_a_launcher_sets_rank_and_world_size(many, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(many[0], tmp_path / "out", *PIXELS, *WORDS) == 0
    assert "rank 1 of 2 is done; 6 of 12 parts" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "2")
    assert run(many[0], tmp_path / "out", *PIXELS, *WORDS) == 2
    assert "--rank: expected 0 to 1, received 2" in capsys.readouterr().err


# Every os.replace is a border between two states on the disk: the settings, then shard and report of each
# part, the null states, the index, the manifest.
DYING = """
import os, signal, sys
from data_pipeline import prepare
left = int(sys.argv[1])
replace = os.replace
def dying(source, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    left -= 1
os.replace = dying
sys.exit(prepare.main(sys.argv[2:]))
"""


def test_a_killed_run_goes_on_to_the_same_files(many, tmp_path):
    source, expected = many
    # 12 parts of two renames each, the settings, null states, index and manifest: 28 renames.
    arguments = [str(source), "--no-progress", "--device", "cpu", *RULES, *PIXELS, *WORDS]
    points = {1: "first shard", 2: "first report", 11: "a later shard", 27: "manifest"}
    running = {
        point: subprocess.Popen(
            [sys.executable, "-c", DYING, str(point), *arguments, "--out", str(tmp_path / str(point))]
        )
        for point in points
    }
    for point, process in running.items():
        out = tmp_path / str(point)
        assert process.wait(timeout=120) == -signal.SIGKILL, points[point]
        assert not (out / "manifest.json").exists()
        kept = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
        finished = len(list((out / ".prepare").glob("0*.json")))
        assert run(source, out, *PIXELS, *WORDS) == 0
        assert file_hashes(out) == expected
        unchanged = [name for name, time_ns in kept.items() if (out / name).stat().st_mtime_ns == time_ns]
        assert len(unchanged) == finished, "finished parts are not done again"


def test_killed_workers_leave_with_their_parent(many, tmp_path):
    source, expected = many
    out = tmp_path / "out"
    options = ["--no-progress", "--device", "cpu", "--workers", "2", *RULES, *PIXELS, *WORDS]
    process = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline.prepare", str(source), "--out", str(out), *options],
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(".prepare/0*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()

    def alive() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    while alive():
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.02)
    assert run(source, out, *PIXELS, *WORDS) == 0
    assert file_hashes(out) == expected


def test_a_finished_folder_is_left_as_it_is(many, tmp_path, capsys):
    source, _ = many
    out = tmp_path / "out"
    options = [*PIXELS, *WORDS, "--limit", "10"]
    assert run(source, out, *options) == 0
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert not (out / ".prepare").exists()
    assert run(source, out, *options) == 0
    assert "already there" in capsys.readouterr().out
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert run(source, out, *options, "--max-aspect", "2") == 2
    assert "settings.sizes.max_aspect (there 4.0, asked 2.0)" in capsys.readouterr().err


def test_other_settings_and_other_sources_are_refused_midway(many, tmp_path, capsys):
    source, _ = many
    out = tmp_path / "out"
    assert run(source, out, *PIXELS, *WORDS, "--rank", "0", "--world-size", "2") == 0
    assert run(source, out, *PIXELS, *WORDS, "--dtype", "bfloat16") == 2
    assert "settings.dtype (there 'float16', asked 'bfloat16')" in capsys.readouterr().err
    other = source_folders.folder(tmp_path / "other", 61)
    assert run(other, out, *PIXELS, *WORDS) == 2
    assert "source.items (there 60, asked 61)" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    assert run(source, tmp_path / "full", *PIXELS, *WORDS) == 2
    assert "is not empty" in capsys.readouterr().err


def test_other_weights_are_refused_and_another_place_of_the_same_is_not(models, tmp_path, capsys):
    source, out = source_folders.folder(tmp_path / "source", 6), tmp_path / "out"
    moved, changed = (shutil.copytree(models / "sd_vae", tmp_path / name) for name in ("moved", "changed"))
    weights = load_file(file := next(changed.glob("*.safetensors")))
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] + 1}, file)

    def at(folder: Path) -> list[str]:
        return ["--autoencoder", "sd_vae", "--autoencoder-path", str(folder), *WORDS]

    assert run(source, out, *at(models / "sd_vae"), "--rank", "0", "--world-size", "2") == 0
    assert run(source, out, *at(changed)) == 2
    assert "revisions.autoencoder (there 'blake2b:" in capsys.readouterr().err
    assert run(source, out, *at(moved)) == 0
    assert len(load_index(out)) == 6


def test_drops_stop_a_long_run_early(tmp_path, monkeypatch, capsys):
    source, out = odd_folder(tmp_path / "source"), tmp_path / "out"
    for path in source.glob("0*.*"):
        path.write_bytes(b"")
    monkeypatch.setattr(prepare, "EARLY_ITEMS", 5)
    assert run(source, out, *PIXELS, *WORDS) == 2
    assert "5 of 5 items are dropped" in capsys.readouterr().err
    assert not list(out.glob("*.tar")) and len(list((out / ".prepare").glob("0*.json"))) == 1
    assert run(source, tmp_path / "dry", *PIXELS, *WORDS, "--dry-run") == 0


def test_too_many_drops_stop_the_run_and_can_be_allowed(tmp_path, capsys):
    source, out = odd_folder(tmp_path / "source"), tmp_path / "out"
    assert run(source, out, *PIXELS, *WORDS) == 2
    message = capsys.readouterr().err
    assert "8 of 29 items are dropped, more than --max-drop-share 0.1" in message
    assert pictures.TRUNCATED in message and not (out / "manifest.json").exists()
    shards = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert run(source, out, *PIXELS, *WORDS, "--max-drop-share", "0.5") == 0
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")} == shards


def test_a_source_without_anything_usable_is_an_error(tmp_path, capsys):
    root = write_captioned(tmp_path / "source", {"a": b""})
    assert run(root, tmp_path / "out", *PIXELS, *WORDS, "--max-drop-share", "1") == 2
    assert "no item of the source can be used: {'empty caption': 1}" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["png", "original"])
def test_stored_pictures_are_encoded_to_the_latents_of_a_direct_preparation(form, tmp_path):
    source = odd_folder(tmp_path / "source")
    share = ["--max-drop-share", "0.9"]
    assert run(source, tmp_path / "latents", *PIXELS, *WORDS, *share) == 0
    assert run(source, tmp_path / form, *PIXELS, *WORDS, *share, "--pictures", form) == 0
    index = load_index(tmp_path / form)
    assert index.online == ("picture",) and (index.channels, index.text_width) == (48, 8)
    direct, online = loaded(tmp_path / "latents"), loaded(tmp_path / form)
    assert direct.keys() == online.keys() and len(direct) == len(odd_pictures.handled())
    for sample_id, (tokens, text) in direct.items():
        # Latents were rounded to 16 bits: pixels in [-1, 1], so half a unit of 2^-11.
        torch.testing.assert_close(online[sample_id][0], tokens, rtol=0, atol=2**-12)
        assert torch.equal(online[sample_id][1], text)
    if form == "original":
        # The bytes of the source, where the format is one of the three that shards hold.
        reader = ShardReader(index)
        members = {reader.read_meta(n)["source"]: reader.read_member(n, "latent") for n in range(len(index))}
        jpeg = next(name for name in members if name.endswith("_jpeg.png"))
        assert members[jpeg] == (source / jpeg).read_bytes()


def loaded(out: Path, text: TextEncoderConfig | None = None) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and first caption's states of every sample, through the training loader."""
    config = DataConfig(
        shards=str(out),
        tokens_per_pack=256,
        packs_per_step=1,
        autoencoder=AutoencoderConfig(kind="pixels", factor=4),
        text_encoder=text or TextEncoderConfig(kind="words", width=8),
        caption_dropout=0.0,
        encode_online=bool(load_index(out).online),
    )
    probe = build_loader(config, patch_size=1, num_steps=0)
    found = {}
    for step in build_loader(config, patch_size=1, num_steps=probe.steps_per_epoch):
        for batch in step:
            assert batch.text_LE is not None and batch.text_lengths is not None
            tokens = batch.latents_TC.split([h * w for h, w in batch.grids])
            texts = batch.text_LE.split(list(batch.text_lengths))
            found.update(zip(batch.sample_ids, zip(tokens, texts, strict=True), strict=True))
    return found


@pytest.mark.parametrize("form", ["ids", "caption"])
def test_ids_and_captions_are_encoded_to_the_states_of_a_direct_preparation(form, models, tmp_path, capsys):
    source = source_folders.folder(tmp_path / "source", 6)
    options = [*PIXELS, "--text-encoder", "gemma", "--text-encoder-path", str(models / "gemma")]
    options += ["--captions", "first", "--dtype", "bfloat16"]
    assert run(source, tmp_path / "states", *options) == 0
    assert run(source, tmp_path / form, *options, "--text", form) == 0
    index = load_index(tmp_path / form)
    assert index.online == (form,) and index.text_width == 16
    text = TextEncoderConfig(kind="gemma", path=str(models / "gemma"))
    direct, online = loaded(tmp_path / "states", text), loaded(tmp_path / form, text)
    for sample_id, (tokens, states) in direct.items():
        assert torch.equal(online[sample_id][0], tokens)
        # Weights in bfloat16, whose sums change with the padding of a batch.
        torch.testing.assert_close(online[sample_id][1], states, rtol=0.05, atol=0.06)
    if form == "ids":
        report = manifest_of(tmp_path / form)["report"]
        assert report["text_tokens"] == int(index.columns["text_length"].sum())
        # Ids are smaller than states by the width; the report says by how much.
        assert "as 16-bit states" in capsys.readouterr().out


def test_shards_that_differ_in_what_is_still_to_be_encoded_are_refused(tmp_path):
    source = source_folders.folder(tmp_path / "source", 6)
    for form in ("png", "latent"):
        assert run(source, tmp_path / form, *PIXELS, *WORDS, "--pictures", form, "--captions", "first") == 0
    (tmp_path / "png" / "part-000000.tar").rename(tmp_path / "latent" / "other.tar")
    with pytest.raises(DataError, match="differ in what they leave to encode while training"):
        build_index(tmp_path / "latent", progress=False)


def test_inspect_shows_stored_pictures_and_what_was_dropped(tmp_path, capsys):
    source, out = odd_folder(tmp_path / "source"), tmp_path / "out"
    options = [*PIXELS, *WORDS, "--pictures", "png", "--text", "caption", "--max-drop-share", "0.9"]
    assert run(source, out, *options) == 0
    capsys.readouterr()
    assert inspect.main([str(out), "--samples", "9"]) == 0
    printed = capsys.readouterr().out
    assert "to be encoded    picture and caption, in the training process" in printed
    assert "dropped          8 of the source" in printed and f"1  {pictures.BOMB}" in printed
    with Image.open(out / "contact_sheet.png") as sheet:
        assert len(np.unique(np.asarray(sheet))) > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*PIXELS], "--text-encoder: captions need one"),
        ([*PIXELS, *WORDS, "--condition", "class"], "class labels need none"),
        ([*PIXELS, *WORDS, "--text", "ids"], "the words encoder has no token ids"),
        (["--autoencoder", "dc_ae", *WORDS], "error: --autoencoder-path: required for kind dc_ae"),
        (["--autoencoder", "dc_ae", "--autoencoder-path", "/nowhere", *WORDS], "no config of kind dc_ae"),
        ([*PIXELS, *WORDS, "--per-shard", "0"], "--per-shard: expected at least 1"),
        ([*PIXELS, *WORDS, "--max-area", "big"], "--max-area: expected a number of pixels or HEIGHTxWIDTH"),
        ([*PIXELS, *WORDS, "--workers", "0"], "--workers: expected at least 1"),
        ([*PIXELS, *WORDS, "--flip", "--pictures", "png"], "--flip stores a second latent"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    many, tmp_path, capsys, options, message
):
    assert run(many[0], tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sources_that_are_not_there_are_refused(tmp_path, capsys):
    assert run(tmp_path / "absent", tmp_path / "out", *PIXELS, *WORDS) == 2
    assert "expected a folder, a .jsonl, .parquet or .tar file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "out", *PIXELS, *WORDS) == 2
    assert "no items for a source of kind 'folder'" in capsys.readouterr().err


def test_a_csv_of_captions_is_refused_with_the_command_that_converts_it(tmp_path, capsys):
    photos = tmp_path / "my photos"
    photos.mkdir()
    # As a spreadsheet writes it.
    (photos / "metadata.csv").write_bytes("\ufefffile_name,text\r\na.png,eine Drei für dich\r\n".encode())
    assert run(photos, tmp_path / "out", *PIXELS, *WORDS) == 2
    said = capsys.readouterr().err
    command = next(line for line in said.splitlines() if line.startswith("  python -c"))
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    row = json.loads((photos / "metadata.jsonl").read_text())
    assert row == {"file_name": "a.png", "text": "eine Drei für dich"}
    # Beside pictures with captions of their own, a table is one of many files.
    (photos / "metadata.jsonl").unlink()
    (photos / "a.txt").write_text("a three")
    assert sources.detect_kind(photos) == "folder"


def test_several_splits_of_parquet_are_not_mixed(tmp_path, capsys):
    source = source_folders.embedded(tmp_path, COUNT)
    shards = sorted((source / "data").iterdir())
    (source / "data" / "test-00000-of-00001.parquet").write_bytes(shards[1].read_bytes())
    assert run(source, tmp_path / "out", *PIXELS, *WORDS) == 2
    assert (
        "data/test-00000-of-00001.parquet" in (said := capsys.readouterr().err) and "'FOLDER/train-*" in said
    )
    items = sources.open_source(source / "data" / "train-*.parquet")
    assert len(items) == COUNT
    assert items.read(COUNT - 1).source == f"{shards[1].name}:{COUNT - COUNT // 2 - 1} {COUNT - 1}.png"
    # What a crawler leaves beside its pictures is no list of them.
    (source / "data" / "a.png").write_bytes(b"")
    assert sources.detect_kind(source) == "folder"


def test_tables_with_pictures_are_known_by_their_footers(tmp_path):
    source = source_folders.embedded(tmp_path, COUNT)
    before = sources.open_source(source).fingerprint()
    assert sources.open_source(source).fingerprint() == before
    shard = source / "data" / "train-00001-of-00002.parquet"
    shard.write_bytes((source / "data" / "train-00000-of-00002.parquet").read_bytes())
    assert sources.open_source(source).fingerprint() != before


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch, capsys):
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(tmp_path / "list.parquet", tmp_path / "out", *PIXELS, *WORDS) == 2
    assert "reading parquet needs pyarrow; install it (pip install pyarrow)" in capsys.readouterr().err


def test_the_stored_picture_counts_are_those_of_the_index(many, tmp_path):
    source, _ = many
    out = tmp_path / "out"
    assert run(source, out, *PIXELS, *WORDS) == 0
    report, index = manifest_of(out)["report"], load_index(out)
    assert sum(report["sizes"].values()) == report["samples"] == len(index)
    assert report["text_tokens"] >= int(np.sum(index.columns["text_length"]))
    assert set(report["shards"]) == set(index.shards)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_ctrl_c_ends_it_with_one_word_and_the_same_command_goes_on(workers, many, tmp_path):
    source, out = many[0], tmp_path / "out"
    arguments = [str(source), "--out", str(out), *PIXELS, *WORDS, "--per-shard", "2", "--no-progress"]
    command = [sys.executable, "-m", "data_pipeline.prepare", *arguments, "--workers", workers]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not any(out.glob("*.tar")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)
    assert (process.returncode, said) == (-signal.SIGINT, ("", "interrupted\n"))
    assert prepare.main(arguments) == 0 and not (out / ".prepare").exists()
