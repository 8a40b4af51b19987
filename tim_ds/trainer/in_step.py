"""Drawing by all ranks together, which they leave together where it fails on one of them.

Under ZeRO-3 a module that is entered gathers its weights from all ranks. A rank that left a forward by an
exception would leave the others waiting in such a gather, for good. Here the ranks ask each other, before
every module that may gather, whether one of them has failed. The answer is waited for: that is drawing's to
pay, no training step does. All leave at the same module. What was entered is left through its hooks, so that
ZeRO holds afterwards what it held before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from tim_ds.errors import NonFiniteError
from tim_ds.trainer.world import World

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LeftError(Exception):
    """Raised where nothing failed: another rank did, and all have left."""


class OutOfStepError(RuntimeError):
    """The ranks may stand at different collectives: the run cannot go on."""


def is_split(network: nn.Module, world: World) -> bool:
    """Whether ZeRO-3 split the weights among several ranks, which then have to draw together."""
    return world.size > 1 and any(hasattr(p, "ds_id") for p in network.parameters())


class InStep:
    """What ranks do together with a network.

    Args:
        network: inside the root module. Its weights are split if ZeRO-3 split them.
        world: every rank makes the same calls.
    """

    def __init__(self, network: nn.Module, world: World) -> None:
        self._network = network
        self._world = world
        self.needed = is_split(network, world)
        """Whether a forward of the network is one of all ranks."""
        # Made here: a rank that has no memory left has to say so.
        self._flag = torch.zeros((), device=world.device)
        self._error: BaseException | None = None
        self._outside = False
        """Whether what runs is neither a module's own code nor the caller's: hooks and messages."""

    def run(self, action: Callable[[], T]) -> T:
        """The result of `action`, which calls the network as often on every rank.

        Raises:
            LeftError: where it went well until another rank failed.
            OutOfStepError: if a hook of ZeRO, or a message, failed.
            Whatever `action` raised on this rank.
        """
        if not self.needed:
            return action()
        self._error = None
        with self._shielded():
            try:
                result = action()
            except Exception as error:
                if self._outside or isinstance(error, OutOfStepError):
                    raise OutOfStepError(f"{type(error).__name__}: {error}") from error
                if self._error is None:
                    self._leave(error)
                raise
            self._ask()
        return result

    def tried(self, action: Callable[[], T]) -> tuple[T | None, str | None]:
        """`run`, with what went wrong on this rank; where another failed, neither a result nor a problem."""
        try:
            return self.run(action), None
        except OutOfStepError:
            raise
        except LeftError:
            # The rank that failed tells why.
            return None, None
        except Exception as error:
            return None, told(error)

    def attempt(self, action: Callable[[], T]) -> tuple[T | None, str | None]:
        """The result of `action`; or, on every rank, what went wrong on the first where something did."""
        result, problem = self.tried(action)
        problems = [text for text in self._world.gather(problem) if text is not None]
        return (None, problems[0]) if problems else (result, None)

    def _ask(self) -> None:
        """Whether all go on. Raises LeftError if not."""
        if self._error is None and self._one_failed(False):
            self._error = LeftError("another rank failed")
        if self._error is not None:
            raise self._error

    def _leave(self, error: BaseException) -> None:
        """Answer the question that the other ranks ask next, or ask now."""
        self._error = error
        self._one_failed(True)

    def _one_failed(self, failed: bool) -> bool:
        self._outside = True
        answer = bool(self._world.sum(self._flag.fill_(failed)))
        self._outside = False
        return answer

    @contextmanager
    def _shielded(self) -> Iterator[None]:
        """Within, an error that a module raises is kept until the network's forward is over."""
        hooked = [module for module in self._network.modules() if module._forward_pre_hooks]
        if self._network not in hooked:
            hooked.insert(0, self._network)
        handles: list[Any] = []
        own = {}
        for module in hooked:
            own[module] = module.__dict__.get("forward")
            handles.append(module.register_forward_pre_hook(self._entering, prepend=True))
            handles.append(module.register_forward_hook(self._left))
            module.forward = self._shield(module, module.forward)
        try:
            yield
        finally:
            for module, forward in own.items():
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward
            for handle in handles:
                handle.remove()
            self._outside = False

    def _entering(self, module: nn.Module, _: Any) -> None:
        self._ask()
        # ZeRO's own hooks follow.
        self._outside = True

    def _shield(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that returns None where it failed: the hooks after a forward run then, too."""

        def shielded(*arguments: Any, **named: Any) -> Any:
            self._outside = False
            result = None
            try:
                result = forward(*arguments, **named)
                if module is self._network:
                    self._ask()
            except Exception as error:
                if self._outside:
                    raise
                if self._error is None:
                    self._leave(error)
            self._outside = True
            return None if self._error is not None else result

        return shielded

    def _left(self, module: nn.Module, *_: Any) -> None:
        self._outside = False
        if module is self._network and self._error is not None:
            raise self._error


def told(error: Exception) -> str:
    """An error of a drawing or a score in one line. The log gets all of it, unless it says where it was."""
    if not isinstance(error, NonFiniteError):
        logger.error("drawing or scoring failed", exc_info=error)
    return f"{type(error).__name__}: {error}"
