"""Noise of a sampling run: one generator an image, so that a picture depends on its seed and size alone.

Letters used in shapes: T image tokens of the pack, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tim_ds.errors import RequestError


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a seed. They live on the CPU because a device's generator gives other numbers."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def initial_noise(grids: Sequence[tuple[int, int]], token_channels: int, seeds: Sequence[int]) -> Tensor:
    """Unit noise that the images of a pack start from.

    Shapes:
        grids: (height, width) in tokens of each image. Returns float32 [T, C] on the CPU, C = token_channels.
    Raises:
        RequestError: if there is not one seed an image.
    """
    streams = _streams(grids, seeds)
    return _draw(grids, token_channels, streams, torch.float32)


def step_noise(
    grids: Sequence[tuple[int, int]], token_channels: int, seeds: Sequence[int]
) -> Iterator[Tensor]:
    """Fresh unit noise for each stochastic step, from where `initial_noise` left every image's generator.

    Shapes:
        Yields float64 [T, C] on the CPU.
    Raises:
        RequestError: if there is not one seed an image.
    """
    streams = _streams(grids, seeds)
    _draw(grids, token_channels, streams, torch.float32)

    def draws() -> Iterator[Tensor]:
        while True:
            yield _draw(grids, token_channels, streams, torch.float64)

    return draws()


def _streams(grids: Sequence[tuple[int, int]], seeds: Sequence[int]) -> list[torch.Generator]:
    if len(seeds) != len(grids):
        raise RequestError(f"seeds: expected {len(grids)}, one an image, received {len(seeds)}")
    return generators(seeds)


def _draw(
    grids: Sequence[tuple[int, int]], channels: int, streams: Sequence[torch.Generator], dtype: torch.dtype
) -> Tensor:
    parts = [
        torch.randn(h * w, channels, generator=g, dtype=dtype)
        for (h, w), g in zip(grids, streams, strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty(0, channels, dtype=dtype)
