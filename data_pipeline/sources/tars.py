"""Existing webdataset tars."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.pictures import Refused
from data_pipeline.sources.item import (
    ESCAPES,
    NO_PICTURE,
    PICTURE_ENDINGS,
    UNREADABLE,
    Item,
    display,
    with_sidecars,
)
from data_pipeline.sources.listing import Lister


class WebdatasetSource:
    """Samples of existing webdataset tars: members that share a key and lie side by side."""

    kind = "webdataset"

    def __init__(self, path: Path, keep: tuple[str, ...] = ()) -> None:
        self._keep = keep
        self._paths = [path] if path.is_file() else sorted(path.glob("*.tar"), key=lambda p: p.name)
        self._files: dict[int, BinaryIO] = {}
        shards: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        lister = Lister()
        for shard, tar in enumerate(self._paths):
            for key, start, end in _tar_samples(tar):
                shards.append(shard)
                starts.append(start)
                ends.append(end)
                lister.add(tar.name, key, end - start)
        # Columns of integers, not objects: 20 bytes a sample.
        self._shards = np.asarray(shards, dtype=np.int32)
        self._starts = np.asarray(starts, dtype=np.int64)
        self._ends = np.asarray(ends, dtype=np.int64)
        self._hash = lister.hexdigest()

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def fingerprint(self) -> str:
        return self._hash

    def read(self, number: int) -> Item:
        shard = int(self._shards[number])
        path = self._paths[shard]
        if shard not in self._files:
            for stream in self._files.values():
                stream.close()
            self._files = {shard: open(path, "rb")}  # noqa: SIM115  # kept for the shard's next sample
        members, key = self._members(self._files[shard], number, path)
        source = f"{path.name}:{key}"
        pictures = [ending for ending in members if ending.rpartition(".")[2].lower() in PICTURE_ENDINGS]
        if not pictures:
            raise Refused(NO_PICTURE, f"{source}: members {sorted(members)}")
        return with_sidecars(
            source,
            members[sorted(pictures)[0]],
            members.get("txt", members.get("caption")),
            members.get("json"),
            self._keep,
            label=members.get("cls"),
        )

    def _members(self, stream: BinaryIO, number: int, path: Path) -> tuple[dict[str, bytes], str]:
        start, end = int(self._starts[number]), int(self._ends[number])
        stream.seek(start)
        members: dict[str, bytes] = {}
        key = ""
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for info in tar:
                    if info.offset >= end:
                        break
                    if not info.isfile():
                        continue
                    key, ending = _split_member(info.name)
                    if _escapes(info.name):
                        raise Refused(ESCAPES, f"{path.name}:{info.name[:200]}")
                    extracted = tar.extractfile(info)
                    members[ending.lower()] = extracted.read() if extracted else b""
        except (tarfile.TarError, OSError, EOFError) as error:
            raise Refused(UNREADABLE, f"{path.name}:{display(key)} at byte {start}: {error}") from error
        if not members:
            raise Refused(UNREADABLE, f"{path.name} breaks off at byte {start}")
        return members, display(key)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def _escapes(name: str) -> bool:
    return name.startswith("/") or ".." in PurePosixPath(name).parts or "\x00" in name


def _split_member(name: str) -> tuple[str, str]:
    """(key, ending) of a member: the ending starts at the first dot of the last part, as in webdataset."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending


def _tar_samples(path: Path) -> Iterator[tuple[str, int, int]]:
    """(key, first byte, end) of each run of members that share a key.

    Where a tar breaks off, what came before is used and the rest counts as one item, which cannot be read.

    Raises:
        DataError: if the file is no tar at all.
    """
    current: str | None = None
    start = end = 0
    size = path.stat().st_size
    broken = False
    try:
        with tarfile.open(path, mode="r:") as tar:
            try:
                for info in tar:
                    if not info.isfile() or not _split_member(info.name)[1]:
                        continue
                    key = _split_member(info.name)[0]
                    if key != current:
                        if current is not None:
                            yield current, start, end
                        current, start = key, info.offset
                    end = info.offset_data + -(-info.size // 512) * 512
            except (tarfile.TarError, EOFError):
                broken = True
            # A complete tar ends in two zero blocks.
            broken = broken or size < tar.offset + 1024
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a readable tar ({error}); copy it again or take it away") from error
    if current is not None:
        yield current, start, end
    if broken and end <= size:
        # What follows is missing, the last sample is not.
        yield "", size, size
