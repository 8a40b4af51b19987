"""Shards in a bucket, over the protocol of S3: a server of moto's behind one that fails and dawdles as told.

pip install -e ".[s3]" "moto[s3]" flask flask-cors
python -m pytest -m slow tests/data_pipeline/test_s3.py
"""

from __future__ import annotations

import http.client
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import index as index_module
from data_pipeline import prepare as prepare_module
from data_pipeline import storage as storage_module
from data_pipeline.batch import PackedBatch
from data_pipeline.config import AutoencoderConfig, DataConfig, TextEncoderConfig
from data_pipeline.errors import DataError
from data_pipeline.index import INDEX_NAME, build_index, load_index
from data_pipeline.loader import StepLoader, build_loader
from data_pipeline.reader import ShardReader
from data_pipeline.storage import Remote
from tests.data_pipeline import source_folders

pytestmark = pytest.mark.slow

BUCKET = "s3://shards/set"
STEPS = 12


class Gateway(ThreadingHTTPServer):
    """Hands requests on to an S3 server, or fails them."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.port = port
        self.failures = 0
        """So many of the next requests for a tar are answered with 503 SlowDown."""
        self.cut = 0
        """So many of the next answers about a tar break off in the middle."""
        self.delay_s = 0.0
        self.failed = 0
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up has closed its end; that is what the tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Gateway
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, is_tar = self.server, ".tar" in self.path and self.command == "GET"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if is_tar:
            time.sleep(server.delay_s)
            if server.failures > 0:
                server.failures -= 1
                server.failed += 1
                self._answer(503, {}, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>")
                return
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        headers = {name: value for name, value in self.headers.items() if name != "Connection"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        kept = {n: v for n, v in answer.getheaders() if n.lower() not in ("connection", "transfer-encoding")}
        if is_tar and server.cut > 0:
            server.cut -= 1
            server.failed += 1
            self.close_connection = True
            kept["Content-Length"], content = str(len(content)), content[: len(content) // 2]
        self._answer(answer.status, kept, content)
        connection.close()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in {name.lower() for name in headers}:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def moto_port() -> Iterator[int]:
    import logging

    # 100 MB with what it needs, so not among the packages for development.
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[s3]' flask flask-cors")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def gateway(moto_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    server = Gateway(moto_port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage_module, "FIRST_PAUSE_S", 0.01)
    # File systems of fsspec live as long as their process, and remember their server.
    from s3fs import S3FileSystem  # pyright: ignore[reportMissingImports]  # likewise

    S3FileSystem.clear_instance_cache()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 captioned pictures in five shards, as `prepare` writes them."""
    folder = tmp_path_factory.mktemp("s3")
    source = source_folders.folder(folder / "source", 40)
    options = ["--autoencoder", "pixels", "--factor", "4", "--text-encoder", "words", "--text-width", "8"]
    options += ["--max-area", "64x64", "--flip", "--per-shard", "8"]
    assert prepare_module.main([str(source), "--out", str(folder / "shards"), *options]) == 0
    return folder / "shards"


@pytest.fixture
def bucket(gateway: Gateway, prepared: Path) -> Iterator[Gateway]:
    """The same in a bucket."""
    import fsspec

    files = fsspec.filesystem("s3")
    files.mkdir("shards")
    for path in prepared.iterdir():
        files.put(str(path), f"shards/set/{path.name}")
    yield gateway
    gateway.failures = gateway.cut = 0
    gateway.delay_s = 0.0
    files.rm("shards", recursive=True)


def config_of(shards: Path | str, **changes: Any) -> DataConfig:
    return DataConfig(
        shards=str(shards),
        tokens_per_pack=1024,
        packs_per_step=2,
        autoencoder=AutoencoderConfig(kind="pixels", factor=4),
        text_encoder=TextEncoderConfig(kind="words", width=8),
        **changes,
    )


def packs_of(loader: StepLoader[PackedBatch]) -> list[PackedBatch]:
    return list(chain.from_iterable(loader))


def assert_same(expected: list[PackedBatch], received: list[PackedBatch]) -> None:
    assert len(expected) == len(received) > STEPS
    for a, b in zip(expected, received, strict=True):
        assert (a.keys, a.dropped_S, b.num_replaced) == (b.keys, b.dropped_S, 0)
        assert a.text_LE is not None and b.text_LE is not None
        assert torch.equal(a.latents.values, b.latents.values) and torch.equal(a.text_LE, b.text_LE)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bucket_gives_the_index_of_the_same_shards_on_a_disk(
    bucket: Gateway, prepared: Path, tmp_path: Path, processes: int
) -> None:
    out = tmp_path / "index"
    assert index_module.main([BUCKET, "--out", str(out), "--processes", str(processes)]) == 0
    assert (out / INDEX_NAME).read_bytes() == (prepared / INDEX_NAME).read_bytes()
    assert index_module.main([BUCKET, "--out", str(out), "--verify"]) == 0
    assert build_index(f"{BUCKET}/part-*[0-2].tar", progress=False).shards == tuple(
        f"part-{number:06d}.tar" for number in range(3)
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_reads_a_bucket_as_it_reads_a_disk(
    bucket: Gateway, prepared: Path, tmp_path: Path, workers: int
) -> None:
    expected = packs_of(build_loader(config_of(prepared), patch_size=1, num_steps=STEPS))
    loader = build_loader(config_of(BUCKET, workers=workers), patch_size=1, num_steps=STEPS)
    # Processes are forked while this one holds connections, twice.
    for _ in range(2):
        assert_same(expected, packs_of(loader))
    build_index(BUCKET, progress=False).save(tmp_path / "index")
    kept_here = config_of(BUCKET, workers=workers, index=str(tmp_path / "index"))
    assert_same(expected, packs_of(build_loader(kept_here, patch_size=1, num_steps=STEPS)))
    assert loader.num_retries == loader.num_damaged == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_requests_that_fail_or_break_off_are_made_again_and_counted(
    bucket: Gateway, prepared: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    expected = packs_of(build_loader(config_of(prepared), patch_size=1, num_steps=STEPS))
    loader = build_loader(config_of(BUCKET, workers=workers), patch_size=1, num_steps=STEPS)
    bucket.failed, bucket.failures, bucket.cut = 0, 3, 2
    assert_same(expected, packs_of(loader))
    # Each of them is seen here: neither s3fs nor botocore tries again behind our back.
    assert bucket.failed == loader.num_retries == 5
    assert re.search(r"s3://shards/set: \d requests failed or took too long so far", caplog.text)


def test_a_slow_bucket_is_given_up_after_the_time_limit_and_counted(bucket: Gateway) -> None:
    index = load_index(BUCKET)
    remote = Remote(BUCKET, attempts=2, timeout_s=0.3, first_pause_s=0.01)
    bucket.delay_s = 2.0
    started = time.monotonic()
    with pytest.raises(DataError, match=r"part-000000\.tar:.*cannot be read \(2 tries failed.*Timeout"):
        ShardReader(index, remote).read(0)
    assert time.monotonic() - started < 1.5 and remote.num_retries == 1
    # The connections that were given up do not stand in the way of the next.
    bucket.delay_s = 0.0
    assert ShardReader(index, remote).read(0).latent.shape[0] == index.channels


def test_a_bucket_that_fails_for_good_stops_the_run_within_seconds(bucket: Gateway) -> None:
    loader = build_loader(config_of(BUCKET, workers=2), patch_size=1, num_steps=STEPS)
    bucket.failures = 10**6
    started = time.monotonic()
    with pytest.raises(DataError, match=r"9 of \d+ samples read by .* are damaged.*4 tries failed.*later"):
        packs_of(loader)
    assert time.monotonic() - started < 20


def test_what_is_not_in_the_bucket_is_named(bucket: Gateway, prepared: Path) -> None:
    import fsspec

    files = fsspec.filesystem("s3")
    with pytest.raises(DataError, match=r"s3://shards/other/index\.safetensors: no index"):
        load_index("s3://shards/other")
    with pytest.raises(DataError, match="the server lists none"):
        build_index("s3://nothing/here", progress=False)
    files.rm_file("shards/set/part-000001.tar")
    with pytest.raises(DataError, match=r"part-000001\.tar: missing, but the index lists it"):
        load_index(BUCKET, verify=True)
    # Another index in the place of the one that was read before.
    changed = build_index(BUCKET, progress=False)
    changed.save(prepared.parent / "changed")
    files.put(str(prepared.parent / "changed" / INDEX_NAME), f"shards/set/{INDEX_NAME}")
    assert load_index(BUCKET, verify=True).hash == changed.hash != load_index(prepared).hash
