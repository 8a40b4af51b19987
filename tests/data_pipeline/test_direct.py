"""Packs read straight into place are those that are read sample by sample, damage included."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from data_pipeline import packs as packs_module
from data_pipeline import storage as storage_module
from data_pipeline.batch import PackedBatch
from data_pipeline.errors import DataError
from data_pipeline.index import build_index, load_index
from data_pipeline.loader import build_loader
from data_pipeline.reader import ShardReader
from data_pipeline.storage import Folder
from tests.data_pipeline.conftest import CHANNELS, TEXT_WIDTH, data_config, write_tar

COUNT = 60


def write_variants(folder: Path, *, dtype: torch.dtype, with_text: bool) -> Path:
    """Pictures of two sizes with mirror images and, for text, one to three captions of various lengths."""
    rng = torch.Generator().manual_seed(0)
    members = []
    for n in range(COUNT):
        height, width = ((2, 4), (4, 2), (2, 2))[n % 3]
        latent = torch.randn(CHANNELS, height, width, generator=rng).to(dtype)
        members.append((f"k{n:03d}.latent.safetensors", save({"latent": latent, "flipped": latent.flip(-1)})))
        if with_text:
            names = ("states", "states.1", "states.2")[: 1 + n % 3]
            texts = {
                name: torch.randn(1 + (n + k) % 5, TEXT_WIDTH, generator=rng).half()
                for k, name in enumerate(names)
            }
            members.append((f"k{n:03d}.text.safetensors", save(texts)))
        else:
            members.append((f"k{n:03d}.cls", str(n % 7).encode()))
    folder.mkdir()
    write_tar(folder / "s.tar", members)
    if with_text:
        (folder / "null.safetensors").write_bytes(save({"states": torch.full((1, TEXT_WIDTH), -1.0)}))
    build_index(folder, progress=False).save()
    return folder


def packs_of(folder: Path, *, num_steps: int = 12, **changes: object) -> list[PackedBatch]:
    with_text = load_index(folder).has_text
    config = data_config(
        folder, tokens_per_pack=32, **(changes if with_text else {"text_encoder": None, **changes})
    )
    return [b for step in build_loader(config, patch_size=1, num_steps=num_steps) for b in step]


def assert_same(expected: list[PackedBatch], received: list[PackedBatch]) -> None:
    assert len(expected) == len(received)
    for a, b in zip(expected, received, strict=True):
        assert (a.sample_ids, a.keys, a.grids, a.dropped_S) == (b.sample_ids, b.keys, b.grids, b.dropped_S)
        assert (a.text_lengths, a.num_replaced, a.epoch) == (b.text_lengths, b.num_replaced, b.epoch)
        assert a.latents.values.dtype == b.latents.values.dtype
        assert torch.equal(a.latents.values, b.latents.values)
        for name in ("text_LE", "labels_S"):
            x, y = getattr(a, name), getattr(b, name)
            assert x is y is None or (x.dtype == y.dtype and torch.equal(x, y)), name


@pytest.mark.parametrize("with_text", [True, False], ids=["text", "class"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_packs_are_those_that_are_read_sample_by_sample(tmp_path, monkeypatch, dtype, with_text):
    folder = write_variants(tmp_path / "data", dtype=dtype, with_text=with_text)
    with monkeypatch.context() as patch:
        patch.setattr(ShardReader, "read_all", lambda *_: pytest.fail("a sample was read as a whole"))
        direct = packs_of(folder)
    assert {b.epoch for b in direct} >= {0, 1}
    monkeypatch.setattr(packs_module, "open_direct", lambda _: None)
    assert_same(packs_of(folder), direct)


def test_a_batch_outlives_the_packs_that_follow_it(tmp_path):
    folder = write_variants(tmp_path / "data", dtype=torch.float16, with_text=True)
    config = data_config(folder, tokens_per_pack=32)
    copies, held = [], []
    for step in build_loader(config, patch_size=1, num_steps=10):
        held += step
        copies += [(b.latents.values.clone(), b.text_LE.clone()) for b in step if b.text_LE is not None]
    assert len(held) == len(copies) == 40
    for batch, (values, text) in zip(held, copies, strict=True):
        assert torch.equal(batch.latents.values, values) and torch.equal(batch.text_LE, text)


def flip_byte(folder: Path, place: int) -> None:
    with open(folder / "s.tar", "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 0xFF]))


@pytest.mark.parametrize("part", ["latent_at", "flipped_at", "text_start"])
def test_damage_is_replaced_alike_whoever_has_met_it_before(tmp_path, part):
    # Only half of the epochs read the damaged half of a sample: memory of the others must not change a pack.
    folder = write_variants(tmp_path / "data", dtype=torch.float16, with_text=True)
    index = load_index(folder)
    clean = packs_of(folder, num_steps=24)
    for sample in (3, 17, 40):
        columns = index.columns
        flip_byte(folder, int(columns["offset"][sample] + columns[part][sample]) + 9)
    whole = packs_of(folder, num_steps=24)
    assert_same(whole, packs_of(folder, num_steps=24, workers=2))
    config = data_config(folder, tokens_per_pack=32)
    resumed = build_loader(config, patch_size=1, start_step=13, num_steps=11)
    assert_same(whole[13 * 4 :], [b for step in resumed for b in step])
    assert sum(b.num_replaced for b in whole) >= 3
    for before, after in zip(clean, whole, strict=True):
        replaced = [a != b for a, b in zip(before.sample_ids, after.sample_ids, strict=True)]
        assert {i for i, r in zip(before.sample_ids, replaced, strict=True) if r} <= {3, 17, 40}
        if not any(replaced):
            assert torch.equal(before.latents.values, after.latents.values)


def test_more_shards_than_files_may_be_open(text_folder, monkeypatch):
    expected = packs_of(text_folder)
    most = 0

    def counted(self, name):
        nonlocal most
        found = original(self, name)
        most = max(most, len(self._files))
        return found

    original = Folder.descriptor
    monkeypatch.setattr(Folder, "descriptor", counted)
    monkeypatch.setattr(storage_module, "most_open_files", lambda: 2)
    assert_same(expected, packs_of(text_folder))
    assert most == 2


def test_a_checksum_vouches_for_the_size(tmp_path):
    # As many values, so the bytes are those of the row: only the size is wrong.
    folder = write_variants(tmp_path / "data", dtype=torch.float16, with_text=False)
    index = build_index(folder, progress=False)
    height, width = (index.columns[name] for name in ("height", "width"))
    height[0], width[0] = width[0], height[0]
    reader = ShardReader(index)
    direct = packs_module.open_direct(reader)
    assert direct is not None
    assert direct.latents(np.array([1, 2]), np.array([False, True])) is not None
    assert direct.latents(np.array([1, 0]), np.array([False, False])) is None
    with pytest.raises(DataError, match=r"s\.tar:k000: latent: the index says"):
        reader.read(0)


def test_latents_of_two_types_are_read_sample_by_sample(tmp_path):
    members = []
    for n, dtype in enumerate((torch.float16, torch.bfloat16)):
        members.append((f"k{n}.latent.safetensors", save({"latent": torch.ones(CHANNELS, 2, 2).to(dtype)})))
        members.append((f"k{n}.cls", b"1"))
    write_tar(tmp_path / "s.tar", members)
    build_index(tmp_path, progress=False).save()
    index = load_index(tmp_path)
    assert index.latent_dtype == "" and packs_module.open_direct(ShardReader(index)) is None
    config = data_config(tmp_path, text_encoder=None, packs_per_step=1)
    (batch,) = next(iter(build_loader(config, patch_size=1, num_steps=1)))
    assert torch.equal(batch.latents_TC, torch.ones(8, CHANNELS))


def test_a_mirror_image_of_another_size_is_left_out_of_the_index(tmp_path):
    latent = torch.zeros(CHANNELS, 2, 4)
    other = {"latent": latent, "flipped": latent.transpose(1, 2).contiguous()}
    members = [("a.latent.safetensors", save({"latent": latent})), ("a.cls", b"0")]
    members += [("b.latent.safetensors", save(other)), ("b.cls", b"0")]
    write_tar(tmp_path / "s.tar", members)
    index = build_index(tmp_path, progress=False)
    assert len(index) == 1 and index.key(0) == "a"
    assert "flipped: expected the shape of the latent [4, 2, 4], received [4, 4, 2]" in index.bad[0][1]
