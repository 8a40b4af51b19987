"""What all blocks of one forward share, and the streams that pass them beside the main one.

T image tokens, L text tokens, S segments, D model width; n copies an image, n T' tokens and n S' images that
are copied, L' text tokens that they read, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tim_ds.model import ops
from tim_ds.model.config import ModelConfig
from tim_ds.model.tangent import TangentStream
from tim_ds.packed import Segments


@dataclass(eq=False)
class Pause:
    """Whether what travels beside the main stream stands still."""

    is_on: bool = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Activations are recomputed within: of the main stream alone."""
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False


@dataclass(frozen=True, eq=False)
class BlockContext:
    """What all blocks of one forward share."""

    segments: Segments
    modulation_SD: Tensor
    """c: the vector that drives every AdaLN generator, float32 [S, D]."""
    interval_SD: Tensor
    """The raw interval embedding, for the distance-aware term, float32 [S, D]."""
    table: ops.RotaryTable
    """Rotary positions of the image tokens."""
    chunks: ops.ChunkPlan
    self_plan: ops.AttentionPlan
    text_LD: Tensor | None
    """Embedded and normalised captions (None in a class-conditional network). The norm in front of every
    cross-attention has no parameters and the captions do not change, so it is taken once a forward."""
    cross_plan: ops.AttentionPlan | None
    beside: TangentStream | CopiesStream | None = None
    """What the forward carries, if anything."""
    pause: Pause = field(default_factory=Pause)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        segments: Segments,
        dtype: torch.dtype,
        modulation_SD: Tensor,
        interval_SD: Tensor,
        *,
        text_LD: Tensor | None = None,
        cross_plan: ops.AttentionPlan | None = None,
        beside: TangentStream | CopiesStream | None = None,
    ) -> BlockContext:
        """Of the images `segments`, whose residual stream is in `dtype`."""
        return cls(
            segments=segments,
            modulation_SD=modulation_SD,
            interval_SD=interval_SD,
            table=ops.rotary_table(segments, config.head_dim, config.rope_layout, dtype),
            chunks=ops.plan_chunks(segments),
            self_plan=ops.plan_attention(segments, segments),
            text_LD=text_LD,
            cross_plan=cross_plan,
            beside=beside,
        )

    @property
    def active_tangent(self) -> TangentStream | None:
        """The tangent, unless activations are being recomputed: it passes every block once."""
        return self.beside if isinstance(self.beside, TangentStream) and not self.pause.is_on else None

    @property
    def active_copies(self) -> CopiesStream | None:
        """The copies, unless activations are being recomputed."""
        return self.beside if isinstance(self.beside, CopiesStream) and not self.pause.is_on else None


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
