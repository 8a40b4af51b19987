"""The derivative's stream: what travels beside the value of one forward, in the same traversal.

Every module that is given a `Side` computes its value as it always does, and replaces the tangent in it by
that of its output, from values it has at hand. A `Side` is a plain object and not a tensor on purpose:
DeepSpeed's hooks count and wrap the tensors that enter and leave a module, and a tangent has no gradient.

T tokens and S segments of the pack, T' tokens and S' segments that move, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tim_ds.model import ops


@dataclass(eq=False)
class Side:
    """A tangent on its way through the network, beside a value of which some rows move."""

    plan: ops.TangentPlan
    """Which rows of the value have a tangent."""
    value: Tensor
    """Their tangent."""

    def fork(self) -> Side:
        """The same tangent, to go another way."""
        return Side(self.plan, self.value)


@dataclass(eq=False)
class TangentStream(Side):
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
    recomputing: bool = False

    def modulation(self) -> Side:
        return Side(self.segment_plan, self.modulation_SD)

    def interval(self) -> Side:
        return Side(self.segment_plan, self.interval_SD)

    def norm(
        self,
        x_TD: Tensor,
        branch_TD: Tensor | None,
        gate_SD: Tensor | None,
        d_gate_SD: Tensor | None,
        scale_SD: Tensor,
        d_shift_SD: Tensor,
        d_scale_SD: Tensor,
        h_dtype: torch.dtype,
    ) -> None:
        """Follow a branch into the residual stream, which is x with it, and the modulated norm behind.

        `value` is the tangent of the branch, where there is one, and becomes that of h.
        """
        d_branch_TD = None if branch_TD is None else self.value
        self.residual_TD, self.value = ops.residual_modulated_norm_tangent(
            x_TD,
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

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block the stream stands still: activations are recomputed, tangents are not."""
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = False
