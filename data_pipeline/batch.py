"""PackedBatch: the images of one pack, as the loader hands them on. Imports nothing of tim_ds.

Letters in shapes: T image tokens, C channels of a token, S images, L text tokens, E width of a text state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from data_pipeline.buffers import Buffers

_tokens = Buffers()


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents of one pack as they were stored: half the bytes of float32 tokens to hand between processes and
    to copy to a device, which converts and transposes them in a fraction of the time that a core takes.

    Shapes:
        values: [n], in the dtype of the shards, every image's [C, H, W] flattened, end to end.
    """

    values: Tensor
    grids: tuple[tuple[int, int], ...]
    """(height, width) in tokens of each image."""
    patch_size: int
    """Latent cells a side of a token."""
    channels: int
    """Of a latent cell."""

    def __post_init__(self) -> None:
        expected = self.num_tokens * self.token_channels
        if self.values.shape != (expected,):
            raise ValueError(f"grids hold {expected} values, received {list(self.values.shape)}")

    @cached_property
    def num_tokens(self) -> int:
        return sum(h * w for h, w in self.grids)

    @property
    def token_channels(self) -> int:
        return self.patch_size**2 * self.channels

    def tokens(self) -> Tensor:
        """float32 [T, C], tokens of all images end to end, row-major, last axis (row in patch, col in patch,
        channel); on the device of `values`."""
        p, channels, shape = self.patch_size, self.channels, (self.num_tokens, self.token_channels)
        if self.values.device.type == "cpu":
            tokens = _tokens.take(4 * self.values.numel()).view(torch.float32).view(shape)
        else:
            tokens = torch.empty(shape, dtype=torch.float32, device=self.values.device)
        start = 0
        # One copy for all neighbours of one size: a device is given few large copies, not many small ones.
        for (h, w), run in groupby(self.grids):
            count = sum(1 for _ in run)
            end = start + count * h * w
            stored = self.values[start * self.token_channels : end * self.token_channels]
            stored = stored.view(count, channels, h, p, w, p).permute(0, 2, 4, 3, 5, 1)
            tokens[start:end].view(count, h, w, p, p, channels).copy_(stored)
            start = end
        return tokens

    def pin_memory(self) -> Latents:
        return replace(self, values=self.values.pin_memory())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Latents:
        return replace(self, values=self.values.to(device, non_blocking=non_blocking))


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of one rank, on the CPU.

    Shapes:
        text_LE: float32 [L, E], captions end to end (None for class data).
        labels_S: int64 [S] (None for text data).
        features_TZ: [T, Z] of an image encoder, in its dtype (None without one).
        padding_1E: float32 [1, E], with which every caption is filled up to the longest of the pack; None
            where captions keep their own lengths.
    """

    latents: Latents
    text_LE: Tensor | None
    text_lengths: tuple[int, ...] | None
    labels_S: Tensor | None
    sample_ids: tuple[int, ...]
    """Row of each image in the index: the key of its random draws."""
    keys: tuple[str, ...]
    """shard:name of each image, for messages."""
    epoch: int
    step: int
    """Optimiser step that this pack belongs to."""
    images_in_step: int
    """Images of that step over all packs and ranks: the denominator of the loss."""
    dropped_S: tuple[bool, ...]
    """Whether the caption or label of each image was replaced by the null one."""
    num_replaced: int = 0
    """Images that stand in for damaged samples."""
    features_TZ: Tensor | None = None
    padding_1E: Tensor | None = None

    def __post_init__(self) -> None:
        tokens = self.latents.num_tokens
        if (self.text_LE is None) == (self.labels_S is None):
            raise ValueError("a batch carries either text or labels")
        if self.features_TZ is not None and self.features_TZ.shape[0] != tokens:
            raise ValueError(f"grids hold {tokens} tokens, features_TZ has {self.features_TZ.shape[0]}")
        if self.text_LE is not None and self.text_LE.shape[0] != sum(self.text_lengths or ()):
            raise ValueError("text_lengths do not add up to the rows of text_LE")
        if not len(self.grids) == len(self.sample_ids) == len(self.keys) == len(self.dropped_S):
            raise ValueError("grids, sample_ids, keys and dropped_S must have one entry an image")

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in tokens of each image."""
        return self.latents.grids

    @cached_property
    def latents_TC(self) -> Tensor:
        """float32 [T, C]: `Latents.tokens`, made at the first use."""
        return self.latents.tokens()

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from which copies to a device run beside computation."""

        def pinned(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.pin_memory()

        return replace(
            self,
            latents=self.latents.pin_memory(),
            text_LE=pinned(self.text_LE),
            labels_S=pinned(self.labels_S),
            features_TZ=pinned(self.features_TZ),
        )
