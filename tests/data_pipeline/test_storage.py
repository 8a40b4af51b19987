"""Reads by offset over HTTP: ranges, retries, time limits, and the loader on top."""

import gc
import multiprocessing
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from data_pipeline import index as index_module
from data_pipeline import inspect
from data_pipeline import storage as storage_module
from data_pipeline.errors import DataError
from data_pipeline.index import load_index
from data_pipeline.loader import build_loader
from data_pipeline.reader import ShardReader
from data_pipeline.storage import Folder, Remote
from tests.data_pipeline.conftest import data_config


class Server(ThreadingHTTPServer):
    """Serves a folder with byte ranges, and fails or dawdles as it is told."""

    daemon_threads = True

    def __init__(self, folder):
        self.folder = str(folder)
        self.ranges = True
        self.failures = 0
        """So many of the next requests for a tar are answered with 503."""
        self.delay_s = 0.0
        self.requests = Counter()
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request, client_address):
        """A client that gave up has closed its end; that is what the tests are about."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def __init__(self, *args, **kwargs):
        super().__init__(*args, directory=args[2].folder, **kwargs)

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests[name] += 1
        if name.endswith(".tar"):
            time.sleep(self.server.delay_s)
            if self.server.failures > 0:
                self.server.failures -= 1
                self.send_error(503)
                return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span is None or not self.server.ranges:
            super().do_GET()
            return
        path = self.translate_path(self.path)
        first, last = int(span[1]), int(span[2])
        try:
            with open(path, "rb") as stream:
                stream.seek(first)
                body = stream.read(last - first + 1)
        except FileNotFoundError:
            self.send_error(404)
            return
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/*")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def serving(folder) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


@pytest.fixture
def served(text_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage_module, "FIRST_PAUSE_S", 0.01)
    folder = shutil.copytree(text_folder, tmp_path / "served")
    with serving(folder) as server:
        yield server


def impatient(url: str, **changes) -> Remote:
    return Remote(url, **{"attempts": 3, "timeout_s": 5.0, "first_pause_s": 0.01, **changes})


def test_a_range_is_the_bytes_that_a_folder_holds(served, text_folder):
    remote, local = impatient(served.url), Folder(text_folder)
    name = "shard-000001.tar"
    assert remote.size(name) == local.size(name)
    for offset, size in ((0, 512), (1000, 777), (local.size(name) - 10, 10)):
        assert remote.read_range(name, offset, size) == local.read_range(name, offset, size)
    assert remote.read("null.safetensors") == local.read("null.safetensors")


def test_a_loader_reads_a_url_as_it_reads_a_folder(served, text_folder):
    local = [b for s in build_loader(data_config(text_folder), patch_size=1, num_steps=3) for b in s]
    for workers in (0, 1):
        config = data_config(served.url, workers=workers)
        remote = [b for s in build_loader(config, patch_size=1, num_steps=3) for b in s]
        assert len(local) == len(remote)
        for a, b in zip(local, remote, strict=True):
            assert a.sample_ids == b.sample_ids and a.keys == b.keys and b.num_replaced == 0
            assert torch.equal(a.latents_TC, b.latents_TC)


def test_the_index_of_a_url_is_fetched_once_and_again_when_it_changes(served, text_folder, tmp_path):
    index = load_index(served.url, verify=True)
    assert index.hash == load_index(text_folder).hash and index.folder == served.url
    fetched = served.requests["index.safetensors"]
    load_index(served.url)
    # Size, length of the header, header: the rows are not fetched again.
    assert served.requests["index.safetensors"] - fetched <= 3
    (tmp_path / "served" / "shard-000003.tar").unlink()
    changed = index_module.build_index(tmp_path / "served", progress=False)
    changed.save()
    assert load_index(served.url).hash == changed.hash != index.hash


def test_failing_requests_are_tried_again(served):
    index = load_index(served.url)
    served.failures = 2
    sample = ShardReader(index, impatient(served.url, attempts=3)).read(0)
    assert sample.latent.shape[0] == index.channels and served.failures == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_counts_the_requests_that_were_made_again(served, workers, caplog):
    loader = build_loader(data_config(served.url, workers=workers), patch_size=1, num_steps=3)
    served.failures = 3
    assert sum(len(step) for step in loader) == 12
    assert (loader.num_retries, loader.num_damaged, served.failures) == (3, 0, 0)
    assert re.search(r"127\.0\.0\.1:\d+: \d requests failed or took too long so far", caplog.text)


def test_a_request_that_fails_every_time_names_shard_key_and_cause(served):
    index = load_index(served.url)
    served.failures = 1000
    with pytest.raises(DataError, match=r"shard-000000\.tar:s00000: cannot be read \(3 tries failed.*503"):
        ShardReader(index, impatient(served.url)).read(0)
    assert served.requests["shard-000000.tar"] == 3


def test_a_slow_server_is_given_up_after_the_time_limit(served):
    index = load_index(served.url)
    served.delay_s = 1.0
    started = time.monotonic()
    with pytest.raises(DataError, match=r"s00000: cannot be read \(2 tries failed.*Timeout"):
        ShardReader(index, impatient(served.url, attempts=2, timeout_s=0.1)).read(0)
    assert time.monotonic() - started < 0.9


def read_in_another_process(remote: Remote) -> None:
    assert len(remote.read_range("shard-000000.tar", 0, 10)) == 10
    gc.collect()


def test_a_process_that_was_forked_leaves_the_connections_of_its_parent_alone(served, monkeypatch):
    # Connections that are kept open, as those of S3 and of most servers are.
    monkeypatch.setattr(Handler, "protocol_version", "HTTP/1.1")
    remote = impatient(served.url, attempts=1)
    remote.read_range("shard-000000.tar", 0, 10)
    child = multiprocessing.get_context("fork").Process(target=read_in_another_process, args=(remote,))
    child.start()
    child.join(timeout=10)
    assert child.exitcode == 0
    assert len(remote.read_range("shard-000000.tar", 5, 10)) == 10


def test_a_server_without_ranges_is_named_as_such(served):
    index = load_index(served.url)
    served.ranges = False
    with pytest.raises(DataError, match="the server ignores byte ranges"):
        ShardReader(index, impatient(served.url, attempts=1)).read(3)


def test_a_missing_remote_file_is_not_asked_for_again(served, tmp_path):
    with pytest.raises(FileNotFoundError):
        impatient(served.url).read_range("nothing.tar", 0, 10)
    assert served.requests["nothing.tar"] == 1
    (tmp_path / "served" / "index.safetensors").unlink()
    with pytest.raises(DataError, match=r"http://127.*/index\.safetensors: no index; upload"):
        load_index(served.url)


def test_a_server_that_dies_while_training_stops_the_run(served, monkeypatch):
    monkeypatch.setattr(storage_module, "ATTEMPTS", 2)
    loader = build_loader(data_config(served.url), patch_size=1, num_steps=6)
    served.failures = 10**6
    with pytest.raises(DataError, match=r"9 of \d+ samples read by .* are damaged.*2 tries failed"):
        list(loader)


def test_a_url_of_an_unknown_kind_is_refused():
    with pytest.raises(DataError, match=r"nokind://x/index\.safetensors: no reader for this kind .*nokind"):
        load_index("nokind://x")


def test_inspect_describes_a_url(served, capsys):
    assert inspect.main([served.url, "--no-sheet"]) == 0
    assert re.search(r"^samples\s+150$", capsys.readouterr().out, re.M)
    assert inspect.main([served.url]) == 2
    assert "--sheet: required" in capsys.readouterr().err
