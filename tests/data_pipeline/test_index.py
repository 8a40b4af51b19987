"""The index: found in one pass over any tar, kept beside it, refused when it no longer fits."""

import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save

from data_pipeline import index as index_module
from data_pipeline.errors import DataError
from data_pipeline.index import build_index, load_index
from data_pipeline.reader import ShardReader
from data_pipeline.schema import Sample
from data_pipeline.shards import write_shard
from tests.data_pipeline.conftest import CHANNELS, TEXT_WIDTH, text_samples, write_tar


def latent_bytes(**tensors):
    return save(tensors or {"latent": torch.zeros(CHANNELS, 2, 2)})


def test_a_stored_index_equals_the_built_one(text_folder):
    built, loaded = build_index(text_folder, progress=False), load_index(text_folder)
    assert loaded.hash == built.hash
    assert (loaded.shards, loaded.shard_bytes, loaded.channels) == (built.shards, built.shard_bytes, CHANNELS)
    for name, column in built.columns.items():
        np.testing.assert_array_equal(loaded.columns[name], column)
    assert len(loaded) == 150


def test_rows_point_at_what_was_written(text_folder):
    index = load_index(text_folder)
    reader = ShardReader(index)
    for number, written in enumerate(text_samples(150)):
        read = reader.read(number)
        assert written.latent is not None and written.states is not None and read.states is not None
        assert torch.equal(read.latent, written.latent)
        assert torch.equal(read.states, written.states)
        assert index.name(number) == f"shard-{number // 40:06d}.tar:{written.key}"
        assert reader.read_meta(number) == written.meta


def test_labels_and_class_count_are_read(class_folder):
    index = load_index(class_folder)
    assert (index.num_classes, index.text_width, index.has_text) == (10, 0, False)
    assert index.columns["label"].tolist() == [n % 10 for n in range(60)]


def test_the_number_of_classes_may_exceed_the_labels(class_folder):
    assert build_index(class_folder, num_classes=1000, progress=False).num_classes == 1000
    with pytest.raises(DataError, match="label 9 with num_classes 5"):
        build_index(class_folder, num_classes=5, progress=False)


def test_shards_of_other_writers_are_indexed(tmp_path):
    # GNU tar with a long name, members in another order, a folder entry, an unknown member, bf16.
    key = "a" * 90 + "/" + "b" * 40
    latent = torch.arange(CHANNELS * 4.0).reshape(CHANNELS, 2, 2).bfloat16()
    states = torch.ones(3, TEXT_WIDTH)
    members = [
        (f"{key}.text.safetensors", save({"states": states})),
        (f"{key}.jpg", b"not read"),
        (f"{key}.latent.safetensors", save({"latent": latent})),
    ]
    write_tar(tmp_path / "x.tar", members, tar_format=tarfile.GNU_FORMAT)
    index = build_index(tmp_path, progress=False)
    read = ShardReader(index).read(0)
    assert index.key(0) == key
    assert torch.equal(read.latent, latent)
    assert read.states is not None and torch.equal(read.states, states)
    assert ShardReader(index).read_meta(0) == {}


def test_the_hash_depends_on_content_and_is_reproducible(tmp_path):
    for name, count in (("a", 20), ("b", 20), ("c", 21)):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "s.tar", text_samples(count))
    a, b, c = (build_index(tmp_path / name, progress=False) for name in "abc")
    assert a.hash == b.hash != c.hash
    assert (tmp_path / "a" / "s.tar").read_bytes() == (tmp_path / "b" / "s.tar").read_bytes()


def test_a_missing_index_names_the_command_that_builds_it(tmp_path):
    with pytest.raises(DataError, match=r"no index.*python -m data_pipeline\.index"):
        load_index(tmp_path)


def test_an_altered_index_is_refused(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    path = folder / "index.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    # Loading maps the file and reads no row; asked to, it reads them all.
    assert load_index(folder).hash == load_index(text_folder).hash
    with pytest.raises(DataError, match="does not match its hash"):
        load_index(folder, verify=True)
    assert index_module.main([str(folder), "--verify"]) == 2
    assert index_module.main([str(text_folder), "--verify"]) == 0
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match="not a readable index"):
        load_index(folder)
    path.write_bytes(data[:100])
    with pytest.raises(DataError, match="not a readable index"):
        load_index(folder)


def test_a_shard_that_changed_or_vanished_is_refused(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes() + b"\0" * 512)
    with pytest.raises(DataError, match=r"shard-000001\.tar: expected \d+ bytes, received \d+"):
        load_index(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: missing"):
        load_index(folder)


def test_an_index_of_another_format_is_refused(text_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(text_folder, tmp_path / "copy")
    monkeypatch.setattr(index_module, "FORMAT", 99)
    with pytest.raises(DataError, match=r"index format 3, expected 99; rebuild it with"):
        load_index(folder)


@pytest.mark.parametrize("cut", ["inside_a_member", "before_the_end_mark"])
def test_the_whole_samples_of_a_truncated_tar_are_kept(tmp_path, cut):
    path = tmp_path / "s.tar"
    write_shard(path, text_samples(5))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + (-(-last.size // 512)) * 512
    path.write_bytes(path.read_bytes()[: last.offset_data + 10 if cut == "inside_a_member" else end])
    index = build_index(tmp_path, progress=False)
    assert [index.key(n) for n in range(len(index))] == [f"s{n:05d}" for n in range(4)]
    assert index.num_bad == 1 and index.bad[0][0] == "s.tar:s00004"
    assert "truncated tar" in index.bad[0][1] or "not a readable tar" in index.bad[0][1]
    with pytest.raises(DataError, match=r"1 of 5 samples break the schema \(allowed: 0\).*\n.*s\.tar:s00004"):
        build_index(tmp_path, progress=False, max_bad_share=0)


BAD_SAMPLES = {
    "no_latent": ([("k.cls", b"1")], "expected a member latent.safetensors"),
    "text_and_label": (
        [
            ("k.latent.safetensors", latent_bytes()),
            ("k.cls", b"1"),
            ("k.text.safetensors", save({"states": torch.zeros(1, 2)})),
        ],
        "expected either",
    ),
    "neither_text_nor_label": ([("k.latent.safetensors", latent_bytes())], "expected either"),
    "label_is_no_number": ([("k.cls", b"cat"), ("k.latent.safetensors", latent_bytes())], "received 'cat'"),
    "not_safetensors": (
        [("k.cls", b"1"), ("k.latent.safetensors", b"junk" * 9)],
        "not a readable safetensors",
    ),
    "wrong_tensor": (
        [("k.cls", b"1"), ("k.latent.safetensors", latent_bytes(z=torch.zeros(1, 2, 2)))],
        "expected a tensor 'latent', received \\['z'\\]",
    ),
    "wrong_rank": (
        [("k.cls", b"1"), ("k.latent.safetensors", latent_bytes(latent=torch.zeros(2, 2)))],
        "expected shape \\[C, h, w\\], received \\[2, 2\\]",
    ),
    "integers": (
        [("k.cls", b"1"), ("k.latent.safetensors", latent_bytes(latent=torch.zeros(1, 2, 2).int()))],
        "received torch.int32",
    ),
    "too_tall_for_its_column": (
        [
            ("k.cls", b"1"),
            ("k.latent.safetensors", latent_bytes(latent=torch.zeros(4, 1 << 16, 1).half())),
        ],
        "sides below 65536 cells",
    ),
    "not_finite": (
        [("k.cls", b"1"), ("k.latent.safetensors", latent_bytes(latent=torch.full((1, 2, 2), torch.nan)))],
        "NaN or infinity",
    ),
    "empty_text": (
        [
            ("k.latent.safetensors", latent_bytes()),
            ("k.text.safetensors", save({"states": torch.zeros(0, 2)})),
        ],
        "n of at least 1",
    ),
    "escaping_name": ([("../k.cls", b"1")], "not a sample key"),
    "same_key_twice": (
        [
            ("k.cls", b"1"),
            ("k.latent.safetensors", latent_bytes()),
            ("m.cls", b"1"),
            ("m.latent.safetensors", latent_bytes()),
            ("k.cls", b"1"),
            ("k.latent.safetensors", latent_bytes()),
        ],
        "key given twice",
    ),
    "other_channels": (
        [("k.cls", b"1"), ("k.latent.safetensors", latent_bytes(latent=torch.zeros(9, 2, 2)))],
        "expected 4 channels and 0, received 9 channels and states of width 0",
    ),
    "captions_among_labels": (
        [
            ("k.latent.safetensors", latent_bytes()),
            ("k.text.safetensors", save({"states": torch.zeros(1, 2)})),
        ],
        "received 4 channels and states of width 2",
    ),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_sample_that_breaks_the_schema_is_left_out_and_named(tmp_path, name):
    members, message = BAD_SAMPLES[name]
    good = [
        (f"{key}.{extension}", data)
        for key in ("x", "y", "z")
        for extension, data in (("cls", b"2"), ("latent.safetensors", latent_bytes()))
    ]
    write_tar(tmp_path / "s.tar", members + good)
    index = build_index(tmp_path, progress=False)
    assert [index.key(n) for n in range(len(index))][-3:] == ["x", "y", "z"]
    assert index.num_bad == 1 == len(index.bad)
    assert index.bad[0][0].startswith("s.tar:") and re.search(message, index.bad[0][1])
    index.save()
    assert load_index(tmp_path).bad == index.bad
    reader = ShardReader(index)
    assert all(reader.read(n).label in (1, 2) for n in range(len(index)))


def test_too_many_bad_samples_refuse_the_index(tmp_path):
    good = [
        (f"g{n:04d}.{e}", d)
        for n in range(400)
        for e, d in (("cls", b"1"), ("latent.safetensors", latent_bytes()))
    ]
    bad = [(f"b{n}.latent.safetensors", b"junk") for n in range(9)]
    write_tar(tmp_path / "s.tar", good + bad)
    with pytest.raises(
        DataError, match=r"9 of 409 samples break the schema \(allowed: 8\); the first:\n  s\.tar:b0"
    ):
        build_index(tmp_path, progress=False)
    assert len(build_index(tmp_path, progress=False, max_bad_share=0.05)) == 400


def test_a_folder_without_a_usable_sample_is_refused(tmp_path):
    write_tar(tmp_path / "s.tar", [("k.latent.safetensors", b"junk")])
    with pytest.raises(DataError, match=r"1 of 1 samples break the schema.*\n.*s\.tar:k: expected either"):
        build_index(tmp_path, progress=False)
    write_tar(tmp_path / "s.tar", [])
    with pytest.raises(DataError, match="hold no sample at all"):
        build_index(tmp_path, progress=False)


def test_processes_build_the_same_index(text_folder):
    alone = build_index(text_folder, progress=False)
    assert build_index(text_folder, progress=False, processes=2).hash == alone.hash


def test_samples_are_grouped_by_size(text_folder):
    index = load_index(text_folder)
    assert int(index.shapes[:, 2].sum()) == 150
    assert np.array_equal(np.sort(index.members), np.arange(150))
    for n in (0, 77, 149):
        same = index.same_size(n)
        assert n in same and len(set(index.grids(same, 1))) == 1
        for shape in index.smaller_shapes(n):
            assert index.shapes[shape, :2].prod() <= np.prod(index.grids(np.array([n]), 1))
    groups = index.groups(2)
    assert np.all(np.diff(groups.lengths) >= 0) and len(groups) == 150
    for length, start, count in zip(groups.lengths, groups.starts, groups.counts, strict=True):
        assert {int(np.prod(grid)) for grid in index.grids(groups.members[start : start + count], 2)} == {
            int(length)
        }


def test_the_index_is_plain_safetensors(text_folder):
    index = load_index(text_folder)
    stored = load_file(text_folder / "index.safetensors")
    assert np.array_equal(stored["offset"], index.columns["offset"])
    assert np.array_equal(stored["members"], index.members)


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected a folder of webdataset shards .* a folder without any"):
        build_index(tmp_path, progress=False)
    with pytest.raises(DataError, match="received no such folder"):
        build_index(tmp_path / "absent", progress=False)


def test_the_patch_size_must_divide_every_latent(text_folder):
    index = load_index(text_folder)
    assert index.groups(2).lengths[0] == 1
    with pytest.raises(DataError, match=r"of 150 latents are no multiple of the patch size 4, one is shard-"):
        index.groups(4)


def test_command_line_builds_the_index(class_folder, tmp_path, capsys):
    shutil.copy(class_folder / "shard-000000.tar", tmp_path)
    assert index_module.main([str(tmp_path), "--num-classes", "12"]) == 0
    assert "40 samples in 1 shards" in capsys.readouterr().out
    assert load_index(tmp_path).num_classes == 12
    assert index_module.main([str(tmp_path / "nowhere")]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", "/a", "a/../b", "a.b", "a//b"])
def test_keys_that_cannot_be_member_names_are_not_written(tmp_path, key):
    with pytest.raises(DataError, match="not a sample key"):
        write_shard(tmp_path / "s.tar", [Sample(key, torch.zeros(1, 1, 1), label=0)])
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_key_is_not_written(tmp_path):
    sample = Sample("k", torch.zeros(1, 1, 1), label=0)
    with pytest.raises(DataError, match="given twice"):
        write_shard(tmp_path / "s.tar", [sample, sample])
    assert list(tmp_path.iterdir()) == []
