"""Members are read as views of the sample's bytes, each distinct header parsed once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from data_pipeline import reader as reader_module
from data_pipeline.errors import DataError
from data_pipeline.index import build_index, load_index
from data_pipeline.reader import ShardReader
from tests.data_pipeline.conftest import write_tar


def class_shard(folder: Path, members: list[bytes]) -> Path:
    files = []
    for n, member in enumerate(members):
        files += [(f"k{n}.latent.safetensors", member), (f"k{n}.cls", b"1")]
    write_tar(folder / "s.tar", files)
    build_index(folder, progress=False).save()
    return folder


def test_each_distinct_header_is_parsed_once(tmp_path, monkeypatch):
    shapes = [(4, 2, 3), (4, 3, 2)]
    stored = [torch.randn(shapes[n % 2]).half() for n in range(12)]
    folder = class_shard(tmp_path, [save({"latent": x, "flipped": x.flip(-1)}) for x in stored])
    parsed = []

    def counting(data):
        parsed.append(data)
        return original(data)

    original = reader_module.load
    monkeypatch.setattr(reader_module, "load", counting)
    for sample, expected in zip(ShardReader(load_index(folder)).read_all(range(12)), stored, strict=True):
        assert not isinstance(sample, DataError) and sample.flipped is not None
        assert torch.equal(sample.latent, expected) and torch.equal(sample.flipped, expected.flip(-1))
    assert len(parsed) == len(shapes)


def test_a_known_header_does_not_vouch_for_a_member_of_another_size(tmp_path):
    whole = save({"latent": torch.ones(4, 2, 2).half()})
    folder = class_shard(tmp_path, [whole, whole])
    index = build_index(folder, progress=False)
    index.columns["latent_size"][1] -= 2
    reader = ShardReader(index)
    reader.read(0)
    with pytest.raises(DataError, match=r"s\.tar:k1: not a readable safetensors member"):
        reader.read(1)


def test_data_that_begin_between_two_values_are_read_too(tmp_path):
    # The format lets a header have any length; most writers pad it to a multiple of 8.
    values = torch.arange(16.0).half().reshape(4, 2, 2)
    entry = {"latent": {"dtype": "F16", "shape": [4, 2, 2], "data_offsets": [0, 32]}}
    header = json.dumps(entry).encode()
    header += b" " * (1 - len(header) % 2)
    assert len(header) % 2 == 1
    member = len(header).to_bytes(8, "little") + header + values.numpy().tobytes()
    folder = class_shard(tmp_path, [member, member])
    reader = ShardReader(load_index(folder))
    assert all(torch.equal(reader.read(n).latent, values) for n in (0, 1))


def test_a_kept_sample_does_not_keep_the_bytes_that_it_was_read_from(tmp_path):
    folder = class_shard(tmp_path, [save({"latent": torch.ones(4, 2, 2).half()})])
    read = ShardReader(load_index(folder)).read(0)
    kept = read.copied()
    read.latent.zero_()
    assert bool((kept.latent == 1).all()) and kept.label == 1
