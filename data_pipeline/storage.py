"""Bytes by offset from a folder or from a URL (http, s3, gs, ... by fsspec), with retries and time limits."""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipeline.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 4
"""How often a read from a URL is tried."""

TIMEOUT_S = 30.0
"""Longest that one try may take."""

FIRST_PAUSE_S = 0.5
"""Pause before the second try; it doubles with every further one."""

S3_PROTOCOLS = ("s3", "s3a")

S3_CONNECTIONS = 32
"""Of one process to an S3 server; requests beyond it wait for one to be free."""


def is_url(location: Path | str) -> bool:
    return "://" in str(location)


def most_open_files() -> int:
    """Half of the files that this process may have open at once."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class Folder:
    """Files of a local folder. Holds one descriptor a file, opened on first use by the process that reads; of
    more files than `most_open_files`, those that were opened last.
    """

    num_retries = 0
    """A disk is asked once."""

    def __init__(self, location: Path | str) -> None:
        self.location = Path(location)
        self._files: dict[str, int] = {}
        self._pid = os.getpid()

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError, OSError
        """
        return (self.location / name).read_bytes()

    def read_range(self, name: str, offset: int, size: int) -> memoryview:
        """Up to `size` bytes from `offset` on; fewer where the file ends. Writable: tensors may be views.

        Raises:
            OSError
        """
        # Not mapped: a shard that is cut short while it is read must be an error, not a signal that kills.
        data = np.empty(size, np.uint8).data
        return data[: os.preadv(self.descriptor(name), [data], offset)]

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError, OSError
        """
        return (self.location / name).stat().st_size

    def descriptor(self, name: str) -> int:
        """Descriptor of a file. The next call may close it.

        Raises:
            FileNotFoundError, OSError
        """
        if self._pid != os.getpid():
            # A forked worker inherits the parent's descriptors; it opens its own so that close() stays local.
            self._files, self._pid = {}, os.getpid()
        if name not in self._files:
            if len(self._files) >= most_open_files():
                os.close(self._files.pop(next(iter(self._files))))
            self._files[name] = os.open(self.location / name, os.O_RDONLY)
        return self._files[name]

    def close(self) -> None:
        """Close the descriptors that this process opened."""
        if self._pid == os.getpid():
            for descriptor in self._files.values():
                os.close(descriptor)
        self._files = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"location": self.location, "_files": {}, "_pid": -1}


class Remote:
    """Files under a URL. A read that fails or takes longer than `timeout_s` is tried again, and counted."""

    def __init__(
        self,
        location: str,
        *,
        attempts: int | None = None,
        timeout_s: float | None = None,
        first_pause_s: float | None = None,
    ) -> None:
        self.location = str(location).rstrip("/")
        self._attempts = ATTEMPTS if attempts is None else attempts
        self._timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
        self._first_pause_s = FIRST_PAUSE_S if first_pause_s is None else first_pause_s
        # One entry for each: threads append at once, and a fork cannot inherit a list that is locked.
        self._failed: list[int] = []

    @property
    def num_retries(self) -> int:
        """Tries that failed or took too long and were followed by another."""
        return len(self._failed)

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: if there is none.
            OSError: if every try failed; the last failure is its cause.
        """
        return self._try(name, lambda files, path: self._call(files, "cat_file", path))

    def read_range(self, name: str, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset` on. Writable: tensors may be views of it.

        Raises:
            FileNotFoundError: if there is no such file.
            OSError: if every try failed; the last failure is its cause.
        """

        def fetch(files: Any, path: str) -> bytes:
            data = self._call(files, "cat_file", path, start=offset, end=offset + size)
            if len(data) > size:
                raise OSError("the server ignores byte ranges")
            return data

        return memoryview(bytearray(self._try(name, fetch)))

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError, OSError: as `read_range`.
        """

        def ask(files: Any, path: str) -> Any:
            # A listing that the file system remembers may be older than the file.
            files.invalidate_cache(path)
            return self._call(files, "info", path)["size"]

        size = self._try(name, ask)
        if size is None:
            raise OSError("the server does not say how large it is")
        return int(size)

    def names(self, pattern: str) -> list[str]:
        """Names of the files that match a pattern, such as `*.tar`, sorted.

        Raises:
            OSError: as `read_range`; FileNotFoundError where the folder is unknown to the server.
        """

        def ask(files: Any, path: str) -> Any:
            files.invalidate_cache()
            return self._call(files, "glob", path)

        return sorted({str(path).rstrip("/").rpartition("/")[2] for path in self._try(pattern, ask)})

    def close(self) -> None:
        """Nothing is held open."""

    def _call(self, files: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if not files.async_impl:
            # A file system without coroutines brings its own time limits.
            return getattr(files, method)(*args, **kwargs)
        from fsspec.asyn import sync

        return sync(files.loop, getattr(files, f"_{method}"), *args, timeout=self._timeout_s, **kwargs)

    def _try(self, name: str, call: Callable[[Any, str], T]) -> T:
        where = f"{self.location}/{name}"
        pause = self._first_pause_s
        for attempt in range(1, self._attempts + 1):
            try:
                return call(*_file_system(where))
            except (FileNotFoundError, DataError):
                raise
            # Every file system raises classes of its own (aiohttp, botocore, ...), not all of them OSError.
            except Exception as error:
                if attempt == self._attempts:
                    raise OSError(f"{attempt} tries failed, the last with {error!r}") from error
                self._failed.append(attempt)
                logger.info("%s: try %d failed (%r); again in %.1f s", where, attempt, error, pause)
                time.sleep(pause)
                pause *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")


_KEPT: list[Any] = []
"""The file systems of this process, and those that it was forked with. fsspec would drop the latter, and they
close their connections through the epoll that they share with the parent: it never hears of these again, and
its next request over one of them hangs."""


def _file_system(url: str) -> tuple[Any, str]:
    # fsspec starts a thread for its sockets; only runs that read URLs should pay for it. It is asked anew for
    # every read: it keeps one file system a process, and makes another after a fork.
    from fsspec.core import url_to_fs

    is_s3 = url.partition("://")[0] in S3_PROTOCOLS
    try:
        files, path = url_to_fs(url, **(_s3_options() if is_s3 else {}))
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: no reader for this kind of URL ({error})") from error
    if is_s3:
        files.retries = 1
    if not any(files is kept for kept in _KEPT):
        _KEPT.append(files)
    return files, path


def _s3_options() -> dict[str, Any]:
    """s3fs and botocore try again on their own, 25 times in all, uncounted and for minutes: `Remote` does it
    instead. What the user's configuration of fsspec says of a client goes before."""
    from fsspec.config import conf

    client = {
        "retries": {"max_attempts": 0},
        "read_timeout": TIMEOUT_S,
        "max_pool_connections": S3_CONNECTIONS,
    }
    return {"config_kwargs": {**client, **conf.get("s3", {}).get("config_kwargs", {})}}


Storage = Folder | Remote


def open_storage(location: Path | str) -> Storage:
    """The files of a folder or URL."""
    return Remote(str(location)) if is_url(location) else Folder(location)


def read_beside(places: Sequence[str], name: str) -> tuple[str, bytes]:
    """The path and the bytes of a file, from the first of several folders or URLs that holds it.

    Raises:
        FileNotFoundError: if none does.
        OSError: if one cannot be read.
    """
    for place in places:
        try:
            return f"{place}/{name}", open_storage(place).read(name)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(" or ".join(f"{place}/{name}" for place in places))
