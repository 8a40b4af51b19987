"""The ranks find each other before anything else, and who does not come is named.

The process group would wait for a missing rank as long as a collective may take, and then say how many are
missing, not which. Here every rank leaves its name in the key-value store of the launcher and waits for the
others. The first to give up writes down who is missing, and all end with that sentence.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise
from typing import Any, NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

START_WITHIN_S = 600.0
"""Default: longer than a large job takes until its last process has imported its libraries."""

_INTERVAL_S = 1.0
_VERDICT = "verdict"
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankAbsentError(Exception):
    """Ranks that never started; every rank that did raises it."""


class Connection(NamedTuple):
    """What a process knows of the job before there is a process group.

    To be kept until the process group has its own store, which the same process serves where rank 0 does.
    """

    rank: int
    size: int
    store: Any

    def own_store(self, name: str) -> Store:
        """The key-value store by a connection of its own and under keys of its own: it can be asked from any
        thread, whatever the collectives do."""
        # What an attempt that torchrun has given up wrote is not of the next.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return PrefixStore(f"tim_ds/{name}/{attempt}", self.store.clone())


def connect(within_s: float) -> Connection | None:
    """Reach the store of the launcher, or that of rank 0, which serves it to the process group later.

    Returns:
        None for a single rank, or where the launcher does not say who the ranks are.
    Raises:
        RankAbsentError: if rank 0 keeps it and is not there within `within_s` seconds.
    """
    if any(name not in os.environ for name in _REQUIRED) or os.environ["WORLD_SIZE"] == "1":
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            host,
            port,
            is_master=serves,
            timeout=timedelta(seconds=within_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistNetworkError as error:
        if serves:
            raise
        raise RankAbsentError(
            f"rank 0 did not start within {within_s:g} s: nobody answers at {host}:{port}"
        ) from error
    return Connection(rank, size, store)


def meet(connection: Connection, within_s: float) -> None:
    """Wait until every rank of the launcher is there.

    Raises:
        RankAbsentError: if one is not there `within_s` seconds after the first of the others.
    """
    end = time.monotonic() + within_s
    try:
        store = connection.own_store("meeting")
        store.set(str(connection.rank), socket.gethostname())
        keys = [str(rank) for rank in range(connection.size)]
        while True:
            # Short, so that a signal is not kept waiting.
            with suppress(dist.DistStoreError):
                store.wait(keys, timedelta(seconds=_INTERVAL_S))
                return
            if time.monotonic() > end:
                store.compare_set(_VERDICT, "", _absence(store, keys, within_s))
            if store.check([_VERDICT]):
                raise RankAbsentError(store.get(_VERDICT).decode())
    except RankAbsentError:
        if connection.rank == 0:
            # It usually keeps the store that the others read this from.
            time.sleep(3 * _INTERVAL_S)
        raise
    except (dist.DistError, RuntimeError) as error:
        raise RankAbsentError(
            f"rank 0, or the launcher, has ended while the ranks met ({str(error).splitlines()[0]})"
        ) from error


def _absence(store: Store, keys: Sequence[str], within_s: float) -> str:
    """Who is missing, and on which hosts those are that came."""
    there = [int(key) for key in keys if store.check([key])]
    absent = sorted({int(key) for key in keys} - {*there})
    hosts = Counter(store.get(str(rank)).decode() for rank in there)
    told = ", ".join(f"{count} on {host}" for host, count in hosts.items())
    return (
        f"rank{'s' if len(absent) > 1 else ''} {ranges(absent)} of {len(keys)} did not start within "
        f"{within_s:g} s (--start-within); there are {told}"
    )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: `3, 8 to 15`."""
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1), len(numbers)]
    runs = [numbers[start:end] for start, end in pairwise(starts)]
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
