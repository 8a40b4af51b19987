"""PackedBatch: the images of one pack, as the loader hands them on. Imports nothing of tim_ds.

Letters in shapes: T image tokens, C channels of a token, S images, L text tokens, E width of a text state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of one rank, on the CPU.

    Shapes:
        latents_TC: float32 [T, C], tokens of all images end to end, row-major, last axis
            (row in patch, col in patch, channel).
        text_LE: float32 [L, E], captions end to end (None for class data).
        labels_S: int64 [S] (None for text data).
        features_TZ: [T, Z] of an image encoder, in its dtype (None without one).
    """

    latents_TC: Tensor
    grids: tuple[tuple[int, int], ...]
    """(height, width) in tokens of each image."""
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

    def __post_init__(self) -> None:
        tokens = sum(h * w for h, w in self.grids)
        if self.latents_TC.shape[0] != tokens:
            raise ValueError(f"grids hold {tokens} tokens, latents_TC has {self.latents_TC.shape[0]}")
        if (self.text_LE is None) == (self.labels_S is None):
            raise ValueError("a batch carries either text or labels")
        if self.features_TZ is not None and self.features_TZ.shape[0] != tokens:
            raise ValueError(f"grids hold {tokens} tokens, features_TZ has {self.features_TZ.shape[0]}")
        if self.text_LE is not None and self.text_LE.shape[0] != sum(self.text_lengths or ()):
            raise ValueError("text_lengths do not add up to the rows of text_LE")
        if not len(self.grids) == len(self.sample_ids) == len(self.keys) == len(self.dropped_S):
            raise ValueError("grids, sample_ids, keys and dropped_S must have one entry an image")

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from which copies to a device run beside computation."""

        def pinned(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.pin_memory()

        return replace(
            self,
            latents_TC=self.latents_TC.pin_memory(),
            text_LE=pinned(self.text_LE),
            labels_S=pinned(self.labels_S),
            features_TZ=pinned(self.features_TZ),
        )
