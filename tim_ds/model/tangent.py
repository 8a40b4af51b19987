"""The derivative's stream: what travels beside the value of one forward, in the same traversal.

Every module that is given a `Side` computes its value as it always does, and replaces the tangent in it by
that of its output, from values it has at hand. A `Side` is a plain object and not a tensor on purpose:
DeepSpeed's hooks count and wrap the tensors that enter and leave a module, and a tangent has no gradient.

T' tokens and S' segments that move, L' text tokens that they read, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tim_ds.model import ops
from tim_ds.packed import Segments


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a tensor, known on the host: a slice where they are neighbours, else an index."""

    chosen: slice | Tensor

    @classmethod
    def of_segments(cls, indices: Sequence[int], device: torch.device) -> Rows:
        """The rows `indices` of a tensor with one row a segment."""
        if _consecutive(indices):
            return cls(slice(indices[0], indices[-1] + 1))
        return cls(torch.tensor(list(indices), dtype=torch.int64).to(device, non_blocking=True))

    @classmethod
    def of_tokens(cls, segments: Segments, indices: Sequence[int]) -> Rows:
        """The rows of the tokens of the segments `indices`."""
        if _consecutive(indices):
            start = sum(segments.lengths[: indices[0]])
            return cls(slice(start, start + sum(segments.lengths[indices[0] : indices[-1] + 1])))
        return cls(segments.token_index(indices))

    def of(self, x: Tensor) -> Tensor:
        """These rows of x, without gradient."""
        x = x.detach()
        return x[self.chosen] if isinstance(self.chosen, slice) else x.index_select(0, self.chosen)


def _consecutive(indices: Sequence[int]) -> bool:
    return list(indices) == list(range(indices[0], indices[0] + len(indices)))


@dataclass(eq=False)
class Side:
    """A tangent on its way through the network, beside a value of which some rows move."""

    rows: Rows
    """The rows of the value that have a tangent."""
    value: Tensor
    """Their tangent."""

    def fork(self) -> Side:
        """The same tangent, to go another way."""
        return Side(self.rows, self.value)


@dataclass(eq=False)
class TangentStream(Side):
    """The tangent of the image tokens, and the context of a block for the moving segments.

    `value` is the tangent of the tensor that a block has in hand, `residual_TD` that of the residual stream.
    """

    segments: Segments
    """The moving segments as a pack of their own."""
    segment_rows: Rows
    residual_TD: Tensor
    modulation_SD: Tensor
    """dc of the moving segments, [S', D]."""
    interval_SD: Tensor
    """Tangent of their interval embedding, [S', D]."""
    table: ops.RotaryTable
    self_plan: ops.AttentionPlan
    text_rows: Rows | None
    """Their captions' tokens; None in a class-conditional network."""
    cross_plan: ops.AttentionPlan | None
    recomputing: bool = False

    def modulation(self) -> Side:
        return Side(self.segment_rows, self.modulation_SD)

    def interval(self) -> Side:
        return Side(self.segment_rows, self.interval_SD)

    def add_branch(self, branch_TD: Tensor, gate_SD: Tensor, d_gate_SD: Tensor) -> None:
        """Follow x + gate * branch; `value` is the tangent of the branch."""
        self.residual_TD = ops.gated_residual_tangent(
            self.residual_TD,
            self.rows.of(branch_TD),
            self.value,
            self.segment_rows.of(gate_SD),
            d_gate_SD,
            self.segments.segment_ids,
        )

    def norm(
        self, x_TD: Tensor, scale_SD: Tensor, d_shift_SD: Tensor, d_scale_SD: Tensor, h_dtype: torch.dtype
    ) -> None:
        """Follow the modulated norm of the residual stream x; `value` becomes the tangent of h."""
        self.value = ops.residual_modulated_norm_tangent(
            self.rows.of(x_TD),
            self.residual_TD,
            self.segment_rows.of(scale_SD),
            d_shift_SD,
            d_scale_SD,
            self.segments.segment_ids,
            h_dtype,
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block the stream stands still: activations are recomputed, tangents are not."""
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = False
