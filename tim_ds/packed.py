"""Packed sequences: the images (or captions) of one micro-batch, laid end to end without padding.

This is the contract between the data, the objective, the network and the sampler; it depends on torch alone.

Letters used in shapes: T image tokens of the pack, L text tokens of the pack, S segments (one an image),
C channels of a token, E width of a text state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tim_ds.errors import ShapeError

STAGED_BYTES = 2**16
"""Up to so many bytes CUDA takes from pageable memory at once; of more it may first finish its stream."""


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on `device`. The host does not wait; larger tensors go through pinned memory, which torch keeps."""
    device = torch.device(device)
    if device.type == "cuda" and x.device.type == "cpu" and x.numel() * x.element_size() > STAGED_BYTES:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def _moved(x: Tensor, device: torch.device | str, non_blocking: bool) -> Tensor:
    return to_device(x, device) if non_blocking else x.to(device)


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each segment of a packed sequence begins, and what grid it has.

    Built once on the CPU (`from_grids`, `from_lengths`), moved once (`to`). The host-side tuples are kept, so
    nothing in a training step asks the device for a length.

    Shapes:
        cu_seqlens: int32 [S+1], starts at 0, ends at T.   segment_ids: int32 [T].
        token_rows, token_cols: int32 [T], position of the token in its own grid (absent for text).
    """

    lengths: tuple[int, ...]
    grids: tuple[tuple[int, int], ...] | None
    cu_seqlens: Tensor
    segment_ids: Tensor
    token_rows: Tensor | None
    token_cols: Tensor | None

    @classmethod
    def from_grids(cls, grids: Sequence[tuple[int, int]]) -> Segments:
        """Segments of images with `grids` = [(height, width)] in tokens; tokens are row-major.

        Raises:
            ShapeError: if a side is smaller than one token.
        """
        grids = tuple((int(h), int(w)) for h, w in grids)
        for i, (h, w) in enumerate(grids):
            if h < 1 or w < 1:
                raise ShapeError(f"segment {i}: grid must be at least 1x1 tokens, received {h}x{w}")
        base = cls.from_lengths([h * w for h, w in grids])
        # All images at once: a pack may hold hundreds, and a step makes such segments several times.
        width_T = torch.tensor([w for _, w in grids], dtype=torch.int32).index_select(0, base.segment_ids)
        index_T = torch.arange(base.num_tokens, dtype=torch.int32)
        index_T = index_T - base.cu_seqlens.index_select(0, base.segment_ids)
        rows_T = torch.div(index_T, width_T, rounding_mode="floor")
        return replace(base, grids=grids, token_rows=rows_T, token_cols=index_T - rows_T * width_T)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> Segments:
        """Segments without a grid (captions). A length of zero is allowed: an image without text.

        Raises:
            ShapeError: if a length is negative.
        """
        lengths = tuple(int(n) for n in lengths)
        if any(n < 0 for n in lengths):
            raise ShapeError(f"segment lengths must not be negative, received {lengths}")
        ids = torch.repeat_interleave(
            torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths, dtype=torch.int64)
        )
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, None, starts, ids, None, None)

    @property
    def num_segments(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Segments:
        """The same segments with their tensors on `device`."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else _moved(x, device, non_blocking)

        return replace(
            self,
            cu_seqlens=_moved(self.cu_seqlens, device, non_blocking),
            segment_ids=_moved(self.segment_ids, device, non_blocking),
            token_rows=move(self.token_rows),
            token_cols=move(self.token_cols),
        )

    def expand(self, value_S: Tensor) -> Tensor:
        """Per-segment values to per-token values: [S, ...] -> [T, ...]."""
        if value_S.shape[0] != self.num_segments:
            raise ShapeError(
                f"expected {self.num_segments} values, one a segment, received {value_S.shape[0]}"
            )
        return value_S.index_select(0, self.segment_ids)

    def mean(self, value_T: Tensor) -> Tensor:
        """Mean over the tokens of each segment: [T] -> [S]. Every segment must hold a token."""
        total = value_T.new_zeros(self.num_segments).index_add(0, self.segment_ids, value_T)
        count = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).to(value_T.dtype)
        return total / count

    def split(self, value_T: Tensor) -> tuple[Tensor, ...]:
        """One view a segment, in order."""
        return torch.split(value_T, list(self.lengths))

    def token_index(self, indices: Sequence[int]) -> Tensor:
        """int64 token positions of the segments `indices`, in that order, on this device."""
        starts = [0, *accumulate(self.lengths)]
        length_S = torch.tensor([self.lengths[i] for i in indices], dtype=torch.int64)
        # From a token among those that are chosen to its place in the pack, by segment.
        first_S = torch.tensor([starts[i] for i in indices], dtype=torch.int64)
        offset_S = first_S - (length_S.cumsum(0) - length_S)
        index = torch.repeat_interleave(offset_S, length_S) + torch.arange(int(length_S.sum()))
        return to_device(index, self.cu_seqlens.device)

    def select(self, indices: Sequence[int]) -> Segments:
        """Segments `indices` as a pack of their own (an index may repeat)."""
        if self.grids is not None:
            chosen = Segments.from_grids([self.grids[i] for i in indices])
        else:
            chosen = Segments.from_lengths([self.lengths[i] for i in indices])
        return chosen.to(self.cu_seqlens.device, non_blocking=True)

    def joined(self, count: int) -> Segments:
        """Every `count` neighbours as one segment, without grid; with a count of 1, these segments."""
        if count == 1:
            return self
        lengths = [sum(self.lengths[i : i + count]) for i in range(0, self.num_segments, count)]
        return Segments.from_lengths(lengths).to(self.cu_seqlens.device, non_blocking=True)


class Condition(Protocol):
    """What the images of a pack are made from. Objective and sampler ask no more of one, so that a network of
    another kind may read a condition of another kind; `TiM` reads `TextCondition` and `ClassCondition`.
    """

    @property
    def num_segments(self) -> int:
        """Images."""
        ...

    def select(self, indices: Sequence[int]) -> Condition:
        """That of the images `indices`, in that order (an index may repeat)."""
        ...

    def repeat(self, times: int) -> Condition:
        """For a pack in which every image stands `times` times, one behind the other."""
        ...

    def join(self, others: Sequence[Any]) -> Condition:
        """This one, then `others`, which are of the same class."""
        ...

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Condition: ...


@dataclass(frozen=True, eq=False)
class TextCondition:
    """Captions of the pack's images, packed as a sequence of their own.

    Shapes:
        states_LE: [L, E] text states; segments: one text segment a caption, in the order of the images.
    """

    states_LE: Tensor
    segments: Segments
    images_per_caption: int = 1
    """How many images read each caption; they lie one behind the other in the pack. The network embeds a
    caption once, whatever their number."""

    def __post_init__(self) -> None:
        if self.images_per_caption < 1:
            raise ShapeError(f"images_per_caption: expected at least 1, received {self.images_per_caption}")
        if self.states_LE.ndim != 2 or self.states_LE.shape[0] != self.segments.num_tokens:
            raise ShapeError(
                f"text states: expected [{self.segments.num_tokens}, E], "
                f"received {list(self.states_LE.shape)}"
            )

    @property
    def num_segments(self) -> int:
        """Images, not captions."""
        return self.segments.num_segments * self.images_per_caption

    def captions_of(self, indices: Sequence[int]) -> list[int]:
        """The captions that the images `indices` read, one for each of them."""
        return [i // self.images_per_caption for i in indices]

    def select(self, indices: Sequence[int]) -> TextCondition:
        """The captions of the images `indices`, one for each of them."""
        captions = self.captions_of(indices)
        index = self.segments.token_index(captions)
        return TextCondition(self.states_LE.index_select(0, index), self.segments.select(captions))

    def repeat(self, times: int) -> TextCondition:
        """For a pack in which every image stands `times` times, one behind the other."""
        return replace(self, images_per_caption=self.images_per_caption * times)

    def join(self, others: Sequence[TextCondition]) -> TextCondition:
        """The captions of several packs, one after the other.

        Raises:
            ShapeError: if captions have different numbers of images.
        """
        parts = [self, *others]
        images_per_caption = {part.images_per_caption for part in parts}
        if len(images_per_caption) > 1:
            raise ShapeError(f"conditions with {sorted(images_per_caption)} images a caption do not join")
        states = torch.cat([part.states_LE for part in parts])
        segments = Segments.from_lengths([n for part in parts for n in part.segments.lengths])
        return replace(self, states_LE=states, segments=segments.to(states.device, non_blocking=True))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TextCondition:
        return replace(
            self,
            states_LE=_moved(self.states_LE, device, non_blocking),
            segments=self.segments.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True, eq=False)
class ClassCondition:
    """Class labels of the pack's images; the null label is the number of classes. labels_S: int64 [S]."""

    labels_S: Tensor

    @property
    def num_segments(self) -> int:
        return self.labels_S.shape[0]

    def select(self, indices: Sequence[int]) -> ClassCondition:
        index = to_device(torch.tensor(list(indices), dtype=torch.int64), self.labels_S.device)
        return ClassCondition(self.labels_S.index_select(0, index))

    def repeat(self, times: int) -> ClassCondition:
        """For a pack in which every image stands `times` times, one behind the other."""
        return ClassCondition(self.labels_S.repeat_interleave(times))

    def join(self, others: Sequence[ClassCondition]) -> ClassCondition:
        """The labels of several packs, one after the other."""
        return ClassCondition(torch.cat([part.labels_S for part in (self, *others)]))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> ClassCondition:
        return ClassCondition(self.labels_S.to(device, non_blocking=non_blocking))


@dataclass(frozen=True, eq=False)
class Direction:
    """How the inputs of some images move; a network that is given one also returns how F moves with them.

    r and the condition stand still.

    Shapes:
        dx_TC: [T', C], the tokens of the segments `indices`, in that order.
        dt_S: [S'], of the *conditioning* time c_noise(t).
    """

    indices: tuple[int, ...]
    """Segments that move, at least one; none repeats."""
    dx_TC: Tensor
    dt_S: Tensor


@dataclass(frozen=True, eq=False)
class Copies:
    """Some images once more, at other states and times; a network that is given them also returns F there.

    They are evaluated without gradient in the traversal of the main forward. r and the condition are those
    of the image.

    Shapes:
        x_TC: [n T', C], t_S: [n S'], a *conditioning* time each: `count` = n copies of the first of the
        images `indices`, one behind the other, then those of the next.
    """

    indices: tuple[int, ...]
    """Images that are copied, at least one; none repeats."""
    count: int
    x_TC: Tensor
    t_S: Tensor


class NetworkOutput(NamedTuple):
    """What one forward returns: F_TC [T, C], and [T, z_dim] features of the REPA projector when asked for."""

    F_TC: Tensor
    features_TZ: Tensor | None
    dF_TC: Tensor | None = None
    """[T', C]: the derivative of F along a `Direction`, when one was given; it carries no gradient."""
    copies_F_TC: Tensor | None = None
    """[n T', C]: F at the `Copies`, when there were any; it carries no gradient."""


class Network(Protocol):
    """The transition network as the objective and the sampler see it.

    t_S and r_S are *conditioning* times, c_noise(t) and c_noise(r), [S]; x_TC is [T, C].

    Dtypes:
        of t_S and r_S: in training that of `objective.time_sampling.Times`, float32 unless they were drawn in
        float64; in sampling that of x_TC, at least float32.
    """

    def __call__(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput: ...


class CarryingNetwork(Network, Protocol):
    """A network that can carry a direction, or copies of some images, along with its value.

    F and the features are the same bits with and without them, and so are their gradients.
    """

    carries_copies: bool
    """Whether it takes copies; a network without this attribute does not."""

    def __call__(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
        direction: Direction | None = None,
        copies: Copies | None = None,
    ) -> NetworkOutput: ...


def concatenate(parts: Sequence[Condition]) -> Condition:
    """The conditions of several packs, one after the other.

    Raises:
        ShapeError: unless they are of one kind, at least one, and join.
    """
    kinds = sorted({type(part).__name__ for part in parts})
    if len(kinds) != 1:
        raise ShapeError(f"conditions of one kind expected, received {', '.join(kinds) or 'none'}")
    return parts[0].join(parts[1:])


def patchify(latent: Tensor, patch_size: int) -> Tensor:
    """One image's latent [C, H, W] -> tokens [h*w, p*p*C], row-major.

    The last axis is ordered (row in patch, col in patch, channel), as the network's output is.

    Raises:
        ShapeError: if a side is not a multiple of `patch_size`.
    """
    c, height, width = latent.shape
    p = patch_size
    if height % p or width % p:
        raise ShapeError(f"latent {height}x{width} is not a multiple of the patch size {p}")
    x = latent.reshape(c, height // p, p, width // p, p)
    return x.permute(1, 3, 2, 4, 0).reshape((height // p) * (width // p), p * p * c)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of `patchify`: tokens [h*w, p*p*C] of one image -> latent [C, H, W]."""
    h, w = grid
    p = patch_size
    if tokens.shape[0] != h * w or tokens.shape[1] % (p * p):
        raise ShapeError(f"tokens {list(tokens.shape)} do not form a grid {h}x{w} of patches {p}x{p}")
    x = tokens.reshape(h, w, p, p, -1)
    return x.permute(4, 0, 2, 1, 3).reshape(-1, h * p, w * p)
