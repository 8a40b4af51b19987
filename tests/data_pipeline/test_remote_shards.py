"""The index of shards at a URL: the bytes of the one that the same shards give on a disk."""

from __future__ import annotations

import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from data_pipeline import index as index_module
from data_pipeline import inspect, remote_shards
from data_pipeline import storage as storage_module
from data_pipeline.errors import DataError
from data_pipeline.index import INDEX_NAME, build_index, load_index
from data_pipeline.loader import build_loader
from data_pipeline.remote_shards import RemoteShard, expand, find_shards
from data_pipeline.schema import MANIFEST_NAME, NULL_NAME
from data_pipeline.storage import Remote
from tests.data_pipeline.conftest import CHANNELS, data_config, text_samples, write_folder, write_tar
from tests.data_pipeline.test_storage import Server, serving

BLOCK = 1 << 13
"""A shard of the tests has a dozen of them, or two."""


@pytest.fixture(autouse=True)
def _small_blocks_and_short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_shards, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(storage_module, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def shards(text_folder: Path, tmp_path: Path) -> Path:
    """The shards alone, as somebody else might offer them."""
    folder = tmp_path / "offered"
    folder.mkdir()
    for path in text_folder.glob("*.tar"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def served(shards: Path) -> Iterator[Server]:
    with serving(shards) as server:
        yield server


def index_bytes(folder: Path) -> bytes:
    return (folder / INDEX_NAME).read_bytes()


def test_shards_at_a_url_give_the_index_of_the_same_shards_on_a_disk(
    served: Server, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, extra in enumerate(([], ["--processes", "2"])):
        out = tmp_path / f"index-{number}"
        assert index_module.main([served.url, "--out", str(out), *extra]) == 0
        assert index_bytes(out) == index_bytes(text_folder)
        printed = capsys.readouterr().out
        assert f"150 samples in 4 shards, hash {load_index(text_folder).hash}" in printed
        assert f"data.shards={served.url} data.index={out}" in printed


def test_shards_of_others_and_broken_ones_give_the_same_index_too(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    latent = save({"latent": torch.zeros(CHANNELS, 2, 2)})
    # Longer than all blocks that are held, and members in between that nobody reads.
    large = save({"latent": torch.arange(CHANNELS * 80 * 160.0).reshape(CHANNELS, 80, 160)})
    assert len(large) > remote_shards.KEPT * BLOCK
    members = [
        (f"{'a' * 90}/{'b' * 40}.cls", b"1"),
        (f"{'a' * 90}/{'b' * 40}.latent.safetensors", latent),
        ("big.thumbnail", bytes(3 * BLOCK)),
        ("big.latent.safetensors", large),
        ("big.notes", bytes(9 * BLOCK)),
        ("big.cls", b"3"),
        ("bad.latent.safetensors", b"junk"),
        ("bad.cls", b"2"),
        ("last.cls", b"2"),
        ("last.latent.safetensors", latent),
    ]
    write_tar(folder / "x.tar", members, tar_format=tarfile.GNU_FORMAT)
    write_tar(folder / "cut.tar", members)
    with tarfile.open(folder / "cut.tar") as tar:
        end = tar.getmembers()[-1].offset_data + 10
    (folder / "cut.tar").write_bytes((folder / "cut.tar").read_bytes()[:end])
    write_tar(folder / "empty.tar", [])
    here = build_index(folder, progress=False)
    assert len(here) == 5 and here.num_bad == 3
    with serving(folder) as server:
        there = build_index(server.url, progress=False)
    assert there.hash == here.hash and there.bad == here.bad
    assert index_bytes(there.save(tmp_path / "a").parent) == index_bytes(here.save(tmp_path / "b").parent)


def test_a_shard_is_streamed_once_and_few_of_its_blocks_are_held(
    served: Server, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    plain = RemoteShard._block

    def counting(self: RemoteShard, number: int) -> memoryview:
        block = plain(self, number)
        held.append(len(self._blocks))
        return block

    monkeypatch.setattr(RemoteShard, "_block", counting)
    build_index(served.url, progress=False)
    assert max(held) <= remote_shards.KEPT
    for path in shards.glob("*.tar"):
        blocks = -(-path.stat().st_size // BLOCK)
        # A tar ends in up to 10,240 bytes of zeros, which nobody has to see.
        assert blocks - 2 <= served.requests[path.name] <= blocks and blocks > remote_shards.KEPT


def test_what_a_server_does_not_list_is_named_by_braces_or_one_by_one(
    served: Server, shards: Path, text_folder: Path
) -> None:
    # The page of a folder in place of its files.
    (shards / "index.html").write_text("<html>nothing to see</html>")
    with pytest.raises(
        DataError, match=r"the server lists none.*name the shards, as in .*\{000000\.\.000127\}"
    ):
        build_index(served.url, progress=False)
    expected = load_index(text_folder).hash
    braces = f"{served.url}/shard-{{000000..000003}}.tar"
    assert build_index(braces, progress=False).hash == expected
    one_by_one = [f"{served.url}/shard-00000{n}.tar" for n in (2, 0, 1, 3, 0)]
    assert build_index(one_by_one, progress=False).hash == expected
    with pytest.raises(DataError, match=r"http://127.*/shard-000004\.tar: missing"):
        build_index(f"{served.url}/shard-{{000003..000004}}.tar", progress=False)


def test_a_pattern_is_asked_of_a_server_that_lists(served: Server) -> None:
    assert find_shards([f"{served.url}/shard-*2.tar"]) == (served.url, ("shard-000002.tar",))
    with pytest.raises(DataError, match=r"\* in the last part of a URL alone"):
        find_shards([f"{served.url}/*/x.tar"])


def test_shards_of_several_folders_are_named_from_the_one_they_share(tmp_path: Path) -> None:
    for name, first in (("train/a", 0), ("train/b", 20)):
        write_folder(tmp_path / "data" / name, text_samples(40)[first : first + 20])
    with serving(tmp_path / "data") as server:
        index = build_index([f"{server.url}/train/{{a,b}}"], progress=False)
        assert index.folder == f"{server.url}/train"
        assert index.shards == ("a/shard-000000.tar", "b/shard-000000.tar") and len(index) == 40
        index.save(tmp_path / "index")
        config = data_config(tmp_path, shards=index.folder, index=str(tmp_path / "index"))
        (tmp_path / "index" / NULL_NAME).write_bytes((tmp_path / "data/train/a" / NULL_NAME).read_bytes())
        (step, *_) = build_loader(config, patch_size=1, num_steps=1)
        assert sum(batch.num_replaced for batch in step) == 0
        # The same shards on a disk, below one folder.
        local = data_config(tmp_path / "data" / "train", index=str(tmp_path / "index"))
        (same, *_) = build_loader(local, patch_size=1, num_steps=1)
        assert [b.keys for b in same] == [b.keys for b in step]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plain", ["plain"]),
        ("a{08..11}", ["a08", "a09", "a10", "a11"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("x{,-y}", ["x", "x-y"]),
    ],
)
def test_braces_stand_for_names(text: str, words: list[str]) -> None:
    assert expand(text) == words


@pytest.mark.parametrize(
    ("locations", "message"),
    [
        (["http://h/a{1..}.tar"], r"expected \{first\.\.last\} or \{one,two\} in braces, received \{1\.\.\}"),
        (["http://h/a{3..1}.tar"], r"\{3\.\.1\} counts -1 names"),
        (["http://h/{0..9999}/{0..9999}.tar"], "more than 1,000,000 names"),
        (["http://h/{a{b,c}}.tar"], "braces in pairs"),
        (["http://h/a.tar", "http://g/b.tar"], "expected shards below one URL"),
        (["http://h/a.tar", "photos"], "photos: expected a URL"),
    ],
)
def test_locations_that_name_no_shards_are_refused(locations: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_shards(locations)


def test_requests_that_fail_are_made_again_and_counted(
    served: Server, text_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served.failures = 3
    assert build_index(served.url, progress=False).hash == load_index(text_folder).hash
    assert re.search(r"3 requests failed or took too long, and were made again", caplog.text)


def test_a_shard_that_cannot_be_read_refuses_the_index(
    served: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "ATTEMPTS", 2)
    served.failures = 10**6
    assert index_module.main([served.url, "--out", str(tmp_path / "out")]) == 2
    assert re.search(
        r"error: http://127.*/shard-000000\.tar: cannot be read \(2 tries.*503", capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    served.failures, served.ranges = 0, False
    with pytest.raises(DataError, match="the server ignores byte ranges"):
        build_index(served.url, progress=False)


def test_a_url_needs_a_folder_for_its_index(served: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert index_module.main([served.url]) == 2
    assert "--out: required for shards at a URL" in capsys.readouterr().err
    with pytest.raises(DataError, match="needs a folder of its own"):
        build_index(served.url, progress=False).save()


def test_a_loader_reads_shards_at_a_url_by_an_index_kept_here(
    served: Server, text_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    build_index(served.url, progress=False).save(out)
    with pytest.raises(DataError, match=r"no index; .*build it with .* --out FOLDER. and name that folder"):
        build_loader(data_config(text_folder, shards=served.url), patch_size=1, num_steps=1)
    config = data_config(text_folder, shards=served.url, index=str(out))
    with pytest.raises(DataError, match=rf"{out}/null\.safetensors or .*/null\.safetensors: missing"):
        build_loader(config, patch_size=1, num_steps=1)
    shutil.copy(text_folder / NULL_NAME, out)
    local = [b for s in build_loader(data_config(text_folder), patch_size=1, num_steps=3) for b in s]
    remote = [b for s in build_loader(config, patch_size=1, num_steps=3) for b in s]
    for a, b in zip(local, remote, strict=True):
        assert (a.sample_ids, a.keys, a.dropped_S, b.num_replaced) == (b.sample_ids, b.keys, b.dropped_S, 0)
        assert a.text_LE is not None and b.text_LE is not None
        assert torch.equal(a.latents_TC, b.latents_TC) and torch.equal(a.text_LE, b.text_LE)


def test_what_lies_beside_the_index_is_told_by_inspect(
    served: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "index"
    build_index(served.url, progress=False).save(out)
    (out / MANIFEST_NAME).write_text('{"report": {"dropped": {"too small": 7}}}')
    assert inspect.main([served.url, "--index", str(out), "--no-sheet"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^samples\s+150$", printed, re.M) and "7 of the source" in printed


def test_verifying_finds_a_shard_at_a_url_that_changed(
    served: Server, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "index"
    build_index(served.url, progress=False).save(out)
    verify = [served.url, "--out", str(out), "--verify"]
    assert index_module.main(verify) == 0
    path = shards / "shard-000002.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    assert index_module.main(verify) == 2
    assert re.search(r"shard-000002\.tar: expected \d+ bytes, received \d+", capsys.readouterr().err)
    path.unlink()
    assert index_module.main(verify) == 2
    assert "shard-000002.tar: missing, but the index lists it" in capsys.readouterr().err


def test_a_file_at_a_url_reads_and_seeks_like_a_file(served: Server, shards: Path) -> None:
    path = shards / "shard-000001.tar"
    with RemoteShard(Remote(served.url), path.name) as shard, open(path, "rb") as stream:
        size = path.stat().st_size
        for start, count in ((0, 10), (BLOCK - 5, 10), (5, 12 * BLOCK), (size - 7, 100), (size, 1), (3, 0)):
            assert shard.seek(start) == stream.seek(start) == shard.tell()
            assert shard.read(count) == stream.read(count)
            assert shard.tell() == stream.tell()
