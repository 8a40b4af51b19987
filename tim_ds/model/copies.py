"""What travels beside the value of one forward, in the same traversal: here, some of its images once more.

n copies an image, n T' tokens and n S' images that are copied, L' text tokens that they read, N heads, H head
width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tim_ds.model import ops

if TYPE_CHECKING:
    from tim_ds.model.blocks import BlockContext


@dataclass(eq=False)
class Beside:
    """Other values on their way through the same modules."""

    value: Tensor

    def fork(self) -> Beside:
        return Beside(self.value)

    @torch.no_grad()
    def linear(self, weight: Tensor, bias: Tensor | None) -> None:
        self.value = nnf.linear(self.value.to(weight.dtype), weight, bias)

    @torch.no_grad()
    def through(
        self,
        function: Callable[[Tensor], Tensor],
        tangent: Callable[[Tensor, Tensor], Tensor],
        main: Tensor,
    ) -> None:
        self.value = function(self.value)


@dataclass(eq=False)
class CopiesStream:
    """The copies between two blocks; a block evaluates itself on them behind the main stream."""

    value: Tensor
    """The residual stream of the copies; behind the final layer, F."""
    context: BlockContext
    """Of the copies as a pack of their own, without captions."""
    text_index: Tensor | None
    """int64 [L']: the captions of the images among those of the pack; None in a class-conditional network."""

    def keys_and_values(self, of_main: ops.KeysValues | None) -> ops.KeysValues | None:
        """Of the captions that the copies read; the main stream has them already."""
        if of_main is None or self.text_index is None:
            return None
        k_LNH, v_LNH = (x.detach().index_select(0, self.text_index) for x in of_main)
        return k_LNH, v_LNH
