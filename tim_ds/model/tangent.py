"""What travels beside the value of one forward, in the same traversal: a tangent, or other values.

Every module that is given a `Side` computes its value as it always does, and replaces what the side holds by
what belongs to its output: a tangent, from values it has at hand, or its own output for other inputs. A
`Side` is a plain object and not a tensor on purpose: DeepSpeed's hooks count and wrap the tensors that enter
and leave a module, and what travels beside has no gradient.

T tokens and S segments of the pack, T' tokens and S' segments that move, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tim_ds.model import ops


class Side(Protocol):
    """What goes through a module in the same call as its main value, without gradient."""

    value: Tensor

    def fork(self) -> Side:
        """The same, to go another way."""
        ...

    def linear(self, weight: Tensor, bias: Tensor | None) -> None:
        """Follow a matrix product in the dtype of its weight."""
        ...

    def through(
        self,
        function: Callable[[Tensor], Tensor],
        tangent: Callable[[Tensor, Tensor], Tensor],
        main: Tensor,
    ) -> None:
        """Follow an elementwise function, of which `tangent` is the rule and which the main value `main`
        passes too."""
        ...


@dataclass(eq=False)
class OtherValues:
    """Values for other inputs, on their way through the same modules."""

    value: Tensor

    def fork(self) -> OtherValues:
        return OtherValues(self.value)

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
class Tangent:
    """A tangent on its way through the network, beside a value of which some rows move."""

    plan: ops.TangentPlan
    """Which rows of the value have a tangent."""
    value: Tensor
    """Their tangent."""

    def fork(self) -> Tangent:
        return Tangent(self.plan, self.value)

    @torch.no_grad()
    def linear(self, weight: Tensor, bias: Tensor | None) -> None:
        self.value = nnf.linear(self.value.to(weight.dtype), weight)

    @torch.no_grad()
    def through(
        self,
        function: Callable[[Tensor], Tensor],
        tangent: Callable[[Tensor, Tensor], Tensor],
        main: Tensor,
    ) -> None:
        self.value = tangent(self.plan.rows_of(main), self.value)


@dataclass(eq=False)
class TangentStream(Tangent):
    """The tangent of the image tokens, and what the blocks need to carry it.

    `value` is the tangent of the tensor that a block has in hand, `residual_TD` that of the residual stream.
    """

    segment_plan: ops.TangentPlan
    residual_TD: Tensor
    modulation_SD: Tensor
    """dc of the moving segments, [S', D]."""
    interval_SD: Tensor
    """Tangent of their interval embedding, [S', D]."""
    self_plan: ops.AttentionTangentPlan
    cross_plan: ops.AttentionTangentPlan | None
    """None in a class-conditional network."""

    def modulation(self) -> Tangent:
        return Tangent(self.segment_plan, self.modulation_SD)

    def interval(self) -> Tangent:
        return Tangent(self.segment_plan, self.interval_SD)

    def norm(
        self,
        x_after_TD: Tensor,
        branch_TD: Tensor | None,
        gate_SD: Tensor | None,
        d_gate_SD: Tensor | None,
        scale_SD: Tensor,
        d_shift_SD: Tensor,
        d_scale_SD: Tensor,
        h_dtype: torch.dtype,
    ) -> None:
        """Follow a branch into the residual stream, and the modulated norm behind.

        `x_after_TD` is the stream with the branch. `value` is the tangent of the branch, where there is one,
        and becomes that of h.
        """
        d_branch_TD = None if branch_TD is None else self.value
        self.residual_TD, self.value = ops.residual_modulated_norm_tangent(
            x_after_TD,
            self.residual_TD,
            branch_TD,
            d_branch_TD,
            gate_SD,
            d_gate_SD,
            scale_SD,
            d_shift_SD,
            d_scale_SD,
            self.plan,
            h_dtype,
        )

    def add_branch(self, branch_TD: Tensor, gate_SD: Tensor, d_gate_SD: Tensor) -> None:
        """Follow x + gate * branch; `value` is the tangent of the branch."""
        self.residual_TD = ops.gated_residual_tangent(
            self.residual_TD, branch_TD, self.value, gate_SD, d_gate_SD, self.plan
        )
