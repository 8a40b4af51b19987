"""Memory of the frozen encoders of a run: of those that encode while training, and of those that previews and
evaluations draw with."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from data_pipeline.encoders.autoencoder import build_autoencoder, decode_bytes
from data_pipeline.encoders.footprint import Footprint, autoencoder_footprint, text_footprint
from data_pipeline.errors import DataError
from data_pipeline.online import encoder_footprints
from tim_ds.config.recipe import Recipe, latent_stride, parse_size
from tim_ds.model.memory import sampling_bytes

CAPTIONS_DRAWN = 32
"""Captions that a drawing encodes at once, at the most that is usual."""


@dataclass(frozen=True, slots=True)
class EncoderMemory:
    """Bytes of one rank."""

    resident: int = 0
    """On the device: weights of the encoders that run while training."""
    encoding: int = 0
    """On the device, between steps: the largest batch of one of them."""
    waiting: int = 0
    """In host memory: weights of the encoders that pictures are drawn with."""
    drawing: int = 0
    """On the device, between steps: these weights and the largest picture."""
    running: str = ""
    """What encodes while training, for people."""
    unknown: tuple[str, ...] = ()
    """What could not be told, and why."""


def encoder_memory(
    recipe: Recipe, images: int, image_tokens: int, online: Collection[str] | None
) -> EncoderMemory:
    """What the encoders of a run need.

    Args:
        images, image_tokens: of a pack, and of each of its images.
        online: what the shards leave to encode, as their index says; None: all that the recipe allows.
    """
    # As square as so many tokens can be.
    height = math.isqrt(image_tokens)
    grid = (height, math.ceil(image_tokens / height))
    unknown = []
    running: dict[str, Footprint] = {}
    try:
        patch = recipe.model.patch_size
        running = encoder_footprints(recipe.data, images, grid, patch_size=patch, online=online)
    except DataError as error:
        unknown.append(str(error))
    waiting = drawing = 0
    try:
        waiting, drawing = _drawing(recipe)
    except DataError as error:
        unknown.append(str(error))
    return EncoderMemory(
        resident=sum(one.weights for one in running.values()),
        encoding=max((one.peak for one in running.values()), default=0),
        waiting=waiting,
        drawing=drawing,
        running=", ".join(running),
        unknown=tuple(dict.fromkeys(unknown)),
    )


def _drawing(recipe: Recipe) -> tuple[int, int]:
    """Bytes of the encoders that pictures are drawn with, and what a drawing takes of the device."""
    largest = max(_sizes_drawn(recipe), key=math.prod, default=None)
    if largest is None:
        return 0, 0
    data = recipe.data
    unit = latent_stride(data.autoencoder) * recipe.model.patch_size
    encoders = [autoencoder_footprint(data.autoencoder, 1, unit, unit)]
    if data.text_encoder is not None:
        encoders.append(text_footprint(data.text_encoder, CAPTIONS_DRAWN))
    guided = 2 if recipe.sampler.cfg_scale != 1.0 else 1
    tokens = guided * math.prod(largest) // unit**2
    work = max(
        decode_bytes(build_autoencoder(data.autoencoder, weights=False), *largest),
        sampling_bytes(recipe.model, tokens),
        encoders[-1].peak,
    )
    weights = sum(one.weights for one in encoders)
    return weights, weights + work


def _sizes_drawn(recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Sizes in pixels that previews and evaluations draw."""
    preview, evaluation = recipe.train.preview, recipe.train.evaluation
    if preview.every_steps:
        yield from map(parse_size, preview.sizes)
    if evaluation.every_steps:
        yield from map(parse_size, evaluation.sizes)
        yield from (parse_size(one.size) for one in evaluation.benchmarks)
        if evaluation.kinds:
            # Of handwriting: small.
            yield (1, 1)
