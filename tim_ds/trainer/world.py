"""The ranks of a run, and the few things they say to each other. Started and stopped by `engine/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

T = TypeVar("T")


@dataclass(eq=False)
class World:
    """This process among the processes of the run. Every method that communicates is called by all ranks."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shared_error: BaseException | None = None
    """The error that ended the run on every rank alike; see `raise_everywhere`."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
        return value

    def gather(self, value: T) -> list[T]:
        """What each rank passed, in the order of ranks (any picklable object)."""
        if self.size == 1:
            return [value]
        gathered: list[T | None] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered  # type: ignore[return-value]  # every entry was filled by its rank

    def from_main(self, value: T) -> T:
        """Rank 0's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def store(self, name: str) -> Store:
        """The key-value store of the group, by a connection of its own and under keys of its own: it can be
        asked from any thread, whatever the collectives do."""
        group_store: Any = dist.distributed_c10d._get_default_store()
        return PrefixStore(f"tim_ds/{name}", group_store.clone())

    def together(self, action: Callable[[], T], errors: tuple[type[Exception], ...]) -> T:
        """Do something on every rank and return this rank's result.

        Raises:
            One of `errors`, on every rank, if a rank raised one.
        """
        result: Any = None
        problem: Exception | None = None
        try:
            result = action()
        except errors as error:
            problem = error
        for error in self.gather(problem):
            if error is not None:
                self.raise_everywhere(problem or error)
        return result

    def raise_everywhere(self, error: Exception) -> NoReturn:
        """Raise an error that every rank raises at this point, so that one of them need report it."""
        self.shared_error = error
        raise error
