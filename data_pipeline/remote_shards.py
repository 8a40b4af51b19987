"""Shards at URLs, for who reads them from end to end: which there are, and the bytes of one in order."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product, takewhile
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.storage import Remote, is_url

BLOCK_BYTES = 1 << 23
"""Bytes of one request."""

AHEAD = 3
"""Blocks that are fetched before they are asked for."""

KEPT = 8
"""Blocks of a shard that are held at most, those on their way included."""

MAX_SHARDS = 1_000_000
"""Names that braces may stand for."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def find_shards(locations: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The URL of the folder that shards have in common, and their names in it, sorted.

    Args:
        locations: URLs, each of a shard, of several (`{000..127}` counts, `{a,b}` lists, `*` in the last part
            is asked of the server) or of a folder, whose `*.tar` are asked for.

    Raises:
        DataError: if there are none, if a server cannot list them, or if they have no folder in common.
    """
    for location in locations:
        if not is_url(location):
            raise DataError(f"{location}: expected a URL; a local folder of shards is indexed by itself")
    found = sorted({url for location in locations for one in expand(location) for url in _listed(one)})
    parts = [url.split("/") for url in found]
    folders = [part[:-1] for part in parts]
    # Of words in order, what the first and the last have in common is common to all.
    together = zip(min(folders), max(folders), strict=False)
    common = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], together)]
    # At least the scheme, an empty part and the host or bucket.
    if len(common) < 3:
        raise DataError(
            f"{found[0]} and {found[-1]}: expected shards below one URL, which data.shards can name"
        )
    return "/".join(common), tuple("/".join(part[len(common) :]) for part in parts)


def expand(text: str) -> list[str]:
    """Every word that `text` stands for: `{08..11}` is 08, 09, 10, 11, and `{a,b}` is a, b.

    Raises:
        DataError: if braces hold neither, or stand for more than a million words.
    """
    pieces = _BRACES.split(text)
    if any(brace in piece for piece in pieces[::2] for brace in "{}"):
        raise DataError(f"{text}: expected braces in pairs, none within another")
    choices: list[list[str]] = []
    total = 1
    for place, piece in enumerate(pieces):
        choices.append([piece] if place % 2 == 0 else _choices(piece, text))
        total *= len(choices[-1])
        if total > MAX_SHARDS:
            raise DataError(f"{text}: stands for more than {MAX_SHARDS:,} names")
    return ["".join(words) for words in product(*choices)]


def _choices(inner: str, text: str) -> list[str]:
    counted = _RANGE.fullmatch(inner)
    if counted is None:
        if "," not in inner:
            raise DataError(
                f"{text}: expected {{first..last}} or {{one,two}} in braces, received {{{inner}}}"
            )
        return inner.split(",")
    first, last = (int(end) for end in counted.groups())
    if last < first or last - first >= MAX_SHARDS:
        raise DataError(f"{text}: {{{inner}}} counts {last - first + 1:,} names")
    width = len(counted[1])
    return [f"{number:0{width}}" for number in range(first, last + 1)]


def _listed(url: str) -> Iterator[str]:
    """The shards of a URL without braces."""
    folder, _, name = url.rpartition("/")
    if "*" in folder:
        raise DataError(f"{url}: expected * in the last part of a URL alone")
    if name.endswith(".tar") and "*" not in name:
        yield url
        return
    if "*" not in name:
        folder, name = url.rstrip("/"), "*.tar"
    hint = f"name the shards, as in {folder}/part-{{000000..000127}}.tar"
    try:
        names = Remote(folder).names(name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error}); {hint}") from error
    if not names:
        raise DataError(
            f"{folder}/{name}: expected webdataset shards (*.tar), the server lists none; if it lists "
            f"nothing at all, {hint}"
        )
    for name in names:
        yield f"{folder}/{name}"


class RemoteShard(io.RawIOBase):
    """A file at a URL, read mostly forwards: block by block, the next ones on their way, the last ones kept.

    Raises:
        OSError: if a read failed in every try, by this class and by its methods.
    """

    def __init__(self, remote: Remote, name: str) -> None:
        super().__init__()
        self._remote = remote
        self._name = name
        self.size = remote.size(name)
        self._position = 0
        self._blocks: dict[int, Future[memoryview]] = {}
        self._threads = ThreadPoolExecutor(AHEAD + 1, thread_name_prefix="shard")

    @property
    def num_retries(self) -> int:
        return self._remote.num_retries

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """As many bytes as `buffer` takes, fewer only at the end of the file."""
        into = memoryview(buffer).cast("B")
        wanted = max(0, min(len(into), self.size - self._position))
        done = 0
        while done < wanted:
            number, start = divmod(self._position, BLOCK_BYTES)
            piece = self._block(number)[start : start + wanted - done]
            into[done : done + len(piece)] = piece
            done += len(piece)
            self._position += len(piece)
        return done

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._blocks.clear()
        super().close()

    def _block(self, number: int) -> memoryview:
        end = -(-self.size // BLOCK_BYTES)
        for wanted in range(number, min(number + AHEAD + 1, end)):
            if wanted not in self._blocks:
                self._blocks[wanted] = self._threads.submit(self._fetch, wanted)
        while len(self._blocks) > KEPT:
            # What lies furthest back is asked for last; before the first block that is wanted, what is ahead.
            behind = min(self._blocks)
            del self._blocks[behind if behind < number else max(self._blocks)]
        return self._blocks[number].result()

    def _fetch(self, number: int) -> memoryview:
        start = number * BLOCK_BYTES
        size = min(BLOCK_BYTES, self.size - start)
        data = self._remote.read_range(self._name, start, size)
        if len(data) != size:
            raise OSError(f"expected {size} bytes at {start}, received {len(data)}: it changed meanwhile")
        return data
