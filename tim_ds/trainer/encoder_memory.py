"""Memory of the frozen encoders of a run: of those that encode while training, and of those that previews and
evaluations draw with."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from data_pipeline.encoders.autoencoder import build_autoencoder, decode_bytes
from data_pipeline.encoders.footprint import Footprint, autoencoder_footprint, text_footprint
from data_pipeline.errors import DataError
from data_pipeline.online import encoder_footprints
from tim_ds.config.recipe import Recipe, latent_stride, parse_size
from tim_ds.model.memory import sampling_bytes


@dataclass(frozen=True, slots=True)
class EncoderMemory:
    """Bytes of one rank."""

    resident: int = 0
    """On the device: weights of the encoders that run while training."""
    encoding: int = 0
    """On the device, between steps: the largest batch of one of them."""
    waiting: int = 0
    """In host memory of the ranks that decode: weights of the autoencoder, unless it runs while training."""
    waiting_everywhere: bool = False
    """Whether all ranks decode, and not rank 0 alone."""
    preparing: int = 0
    """In host memory of rank 0, before the first step: weights of the text encoder, on their way."""
    drawing: int = 0
    """On the device of rank 0: the captions that are encoded before the first step, or between steps the
    largest picture, with the weights that this needs."""
    running: str = ""
    """What encodes while training, for people."""
    unknown: tuple[str, ...] = ()
    """What could not be told, and why."""


def encoder_memory(
    recipe: Recipe, images: int, image_tokens: int, online: Collection[str] | None, *, split: bool = False
) -> EncoderMemory:
    """What the encoders of a run need.

    Args:
        images, image_tokens: of a pack, and of each of its images.
        online: what the shards leave to encode, as their index says; None: all that the recipe allows.
        split: as in `decodes_everywhere`.
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
    memory = EncoderMemory(
        resident=sum(one.weights for one in running.values()),
        encoding=max((one.peak for one in running.values()), default=0),
        running=", ".join(running),
    )
    try:
        memory = _with_drawing(memory, recipe, running, split=split)
    except DataError as error:
        unknown.append(str(error))
    return replace(memory, unknown=tuple(dict.fromkeys(unknown)))


def decodes_everywhere(recipe: Recipe, *, split: bool) -> bool:
    """Whether every rank has pictures of its own to draw: those of benchmarks, which the ranks share.

    Args:
        split: whether ZeRO-3 splits the weights, so that all ranks draw the same.
    """
    evaluation = recipe.train.evaluation
    return bool(evaluation.every_steps and evaluation.benchmarks) and not split


def _with_drawing(
    memory: EncoderMemory, recipe: Recipe, running: Mapping[str, Footprint], *, split: bool
) -> EncoderMemory:
    """The same with what previews and evaluations need."""
    largest = max(_sizes_drawn(recipe), key=math.prod, default=None)
    if largest is None:
        return memory
    data = recipe.data
    unit = latent_stride(data.autoencoder) * recipe.model.patch_size
    # What runs while training is on the device anyway.
    autoencoder = text_encoder = 0
    if "autoencoder" not in running:
        autoencoder = autoencoder_footprint(data.autoencoder, 1, unit, unit).weights
    guided = 2 if recipe.sampler.cfg_scale != 1.0 else 1
    tokens = guided * math.prod(largest) // unit**2
    drawing = autoencoder + max(
        decode_bytes(build_autoencoder(data.autoencoder, weights=False), *largest),
        sampling_bytes(recipe.model, tokens),
    )
    if data.text_encoder is not None:
        found = text_footprint(data.text_encoder, 1)
        text_encoder = 0 if "text_encoder" in running else found.weights
        drawing = max(drawing, text_encoder + found.peak)
    return replace(
        memory,
        waiting=autoencoder,
        waiting_everywhere=decodes_everywhere(recipe, split=split),
        preparing=text_encoder,
        drawing=drawing,
    )


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
