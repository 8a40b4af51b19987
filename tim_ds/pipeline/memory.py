"""What pictures take of a device's memory, and which of them fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.encoders.autoencoder import Autoencoder, decode_bytes
from data_pipeline.encoders.text import TextEncoder
from tim_ds.errors import RequestError
from tim_ds.model.config import ModelConfig
from tim_ds.model.memory import available_bytes, gib, sampling_bytes
from tim_ds.pipeline.request import Size
from tim_ds.sampler.config import SamplerConfig

LEAST_TOKENS = 4096
"""Of one network call, whatever the estimate says."""


@dataclass(frozen=True, eq=False)
class MemoryEstimate:
    """Of the peak beyond what is on `device`, which is the network's."""

    model: ModelConfig
    autoencoder: Autoencoder
    text_encoder: TextEncoder | None
    device: torch.device

    @property
    def unit(self) -> int:
        """Pixels a side of one token."""
        return self.autoencoder.stride * self.model.patch_size

    def needed_bytes(self, size: Size, config: SamplerConfig) -> int:
        """For one picture: sampling it, decoding it, or an encoder that comes for its captions, whichever
        takes more."""
        height, width = size
        tokens = (height // self.unit) * (width // self.unit) * (2 if config.cfg_scale != 1.0 else 1)
        return max(
            sampling_bytes(self.model, tokens),
            decode_bytes(self.autoencoder, height, width) + self._coming_bytes(self.autoencoder),
            self._coming_bytes(self.text_encoder),
        )

    def _coming_bytes(self, encoder: Any) -> int:
        """Weights that an encoder brings to the device when it works."""
        if getattr(encoder, "device", self.device) == self.device:
            return 0
        return sum(tensor.nbytes for tensor in (*encoder.model.parameters(), *encoder.model.buffers()))

    def fitting_tokens(self) -> int:
        """The largest power of two, from LEAST_TOKENS on, that a network call can hold in what is left."""
        available = available_bytes(self.device)
        tokens = LEAST_TOKENS
        while available is not None and tokens < 2**20:
            if sampling_bytes(self.model, 2 * tokens) > 0.8 * available:
                break
            tokens *= 2
        return tokens

    def refuse_too_large(self, sizes: Sequence[Size], config: SamplerConfig) -> None:
        """Raises RequestError if the largest picture takes more than the device has left."""
        i, (height, width) = max(enumerate(sizes), key=lambda entry: entry[1][0] * entry[1][1])
        needed, available = self.needed_bytes((height, width), config), available_bytes(self.device)
        if available is None or needed <= available:
            return
        raise RequestError(
            f"sizes[{i}]: {height}x{width}: sampling and decoding it takes about {gib(needed)} at its peak, "
            f"{gib(available)} are left on {self.device}; {self._what_fits(available, config)}"
        )

    def _what_fits(self, available: int, config: SamplerConfig) -> str:
        def is_within(units: int) -> bool:
            side = units * self.unit
            return self.needed_bytes((side, side), config) <= available

        fits, beyond = 0, 1
        while is_within(beyond):
            fits, beyond = beyond, 2 * beyond
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if is_within(middle):
                fits = middle
            else:
                beyond = middle
        if not fits:
            return "no size fits; free memory, or choose another device"
        side = fits * self.unit
        return f"squares fit up to {side}x{side}, other shapes up to as many pixels"
