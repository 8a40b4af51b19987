"""What a forward carries beside the value on its way to the blocks: a direction, or copies of images.

Both enter the embedders in the value's own calls (`x`, `t`, `delta`), each of which replaces what it is
given by what belongs to its output, and then become the stream that passes the blocks. In a block a tangent
goes with the value from product to product; copies follow the whole block behind it. Neither calls a module
again: ZeRO-3 gathers weights by module call, and one more in some steps would break its trace.

T' tokens and S' images that are carried (every copy is one), D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from tim_ds.errors import ShapeError
from tim_ds.model import ops
from tim_ds.model.config import ModelConfig
from tim_ds.model.context import BlockContext, CopiesStream
from tim_ds.model.shapes import check_copies, check_direction
from tim_ds.model.tangent import OtherValues, Side, Tangent, TangentStream
from tim_ds.packed import Condition, Copies, Direction, Segments, TextCondition


class Carried(Protocol):
    """What is carried beside latent tokens `x`, times `t` and intervals `delta` = t - r."""

    @property
    def x(self) -> Side: ...

    @property
    def t(self) -> Side: ...

    @property
    def delta(self) -> Side: ...

    def of_still(self, embedded_SD: Tensor) -> list[Tensor]:
        """What belongs beside an embedding of something that does not move: [S', D], or nothing."""
        ...

    def stream(
        self,
        config: ModelConfig,
        condition: Condition,
        beside_interval: Sequence[Tensor],
        label_SD: Tensor | None,
    ) -> TangentStream | CopiesStream:
        """What passes the blocks, once the embedders have replaced what `x`, `t` and `delta` hold.

        Args:
            beside_interval: the terms of what belongs beside the interval embedding, [S', D] each.
            label_SD: the embedded labels of a class-conditional network.
        """
        ...


@dataclass(eq=False)
class CarriedDirection:
    """The tangents of what enters the network. The condition stands still."""

    indices: tuple[int, ...]
    segments: Segments
    x: Tangent
    t: Tangent
    delta: Tangent

    @classmethod
    def of(cls, direction: Direction, segments: Segments) -> CarriedDirection:
        x = Tangent(ops.plan_tangent(segments, direction.indices), direction.dx_TC)
        t = Tangent(ops.plan_segment_tangent(segments, direction.indices), direction.dt_S)
        # r stands still, so t - r moves as t does.
        return cls(direction.indices, segments, x, t, t.fork())

    def of_still(self, embedded_SD: Tensor) -> list[Tensor]:
        return []

    def stream(
        self,
        config: ModelConfig,
        condition: Condition,
        beside_interval: Sequence[Tensor],
        label_SD: Tensor | None,
    ) -> TangentStream:
        # `t` is embedded by now: [S', D]. r alone may be what the interval embedding sees: it does not move.
        interval_SD = reduce(torch.add, beside_interval, torch.zeros_like(self.t.value))
        residual_TD = ops.at_least_float32(self.x.value)
        cross_plan = None
        if isinstance(condition, TextCondition):
            captions = condition.captions_of(self.indices)
            cross_plan = ops.plan_attention_tangent(self.segments, condition.segments, self.indices, captions)
        return TangentStream(
            plan=self.x.plan,
            value=residual_TD,
            segment_plan=self.t.plan,
            residual_TD=residual_TD,
            modulation_SD=self.t.value + interval_SD,
            interval_SD=interval_SD,
            self_plan=ops.plan_attention_tangent(self.segments, self.segments, self.indices, self.indices),
            cross_plan=cross_plan,
        )


@dataclass(eq=False)
class CarriedCopies:
    """Copies of images: a pack of their own, with r and the condition of the image."""

    copies: Copies
    segments: Segments
    """Of the copies."""
    original_S: Tensor
    """The image of every copy, int64 [S']."""
    x: OtherValues
    t: OtherValues
    delta: OtherValues

    @classmethod
    def of(cls, copies: Copies, segments: Segments, r_S: Tensor) -> CarriedCopies:
        originals = [i for i in copies.indices for _ in range(copies.count)]
        original_S = torch.tensor(originals).to(r_S.device, non_blocking=True)
        delta_S = copies.t_S - r_S.index_select(0, original_S)
        x, t, delta = OtherValues(copies.x_TC), OtherValues(copies.t_S), OtherValues(delta_S)
        return cls(copies, segments.select(originals), original_S, x, t, delta)

    def of_still(self, embedded_SD: Tensor) -> list[Tensor]:
        return [embedded_SD.detach().index_select(0, self.original_S)]

    def stream(
        self,
        config: ModelConfig,
        condition: Condition,
        beside_interval: Sequence[Tensor],
        label_SD: Tensor | None,
    ) -> CopiesStream:
        # Summed in the order of the value, for the same rounding.
        interval_SD = reduce(torch.add, beside_interval)
        labels = [] if label_SD is None else self.of_still(label_SD)
        modulation_SD = reduce(torch.add, labels, self.t.value + interval_SD)
        text_index, cross_plan = None, None
        if isinstance(condition, TextCondition):
            captions = condition.captions_of(self.copies.indices)
            text_index = condition.segments.token_index(captions)
            # All copies of an image read its caption as one segment.
            readers = self.segments.joined(self.copies.count)
            cross_plan = ops.plan_attention(readers, condition.segments.select(captions))
        x_TD = ops.at_least_float32(self.x.value)
        context = BlockContext.of(
            config, self.segments, x_TD.dtype, modulation_SD, interval_SD, cross_plan=cross_plan
        )
        return CopiesStream(x_TD, context, text_index)


def carry(
    config: ModelConfig, segments: Segments, r_S: Tensor, direction: Direction | None, copies: Copies | None
) -> Carried | None:
    """What a forward over `segments` is asked to carry, if anything.

    Raises:
        ShapeError: if it does not fit the pack, or both are asked for.
    """
    if direction is not None and copies is not None:
        raise ShapeError("direction and copies: a forward carries one of them, received both")
    if direction is not None:
        check_direction(config, direction, segments)
        return CarriedDirection.of(direction, segments)
    if copies is not None:
        check_copies(config, copies, segments)
        return CarriedCopies.of(copies, segments, r_S)
    return None
