"""Samples whose picture or caption is encoded while training: read, encoded, and then like any other.

It costs the encoders' memory and time at every reading, in the training process, and saves the place of their
output on disk. Small sets are encoded once: the loader keeps what it has read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_pipeline import schema
from data_pipeline.config import DataConfig
from data_pipeline.encoders.autoencoder import Autoencoder, build_autoencoder
from data_pipeline.encoders.text import TextEncoder, build_text_encoder
from data_pipeline.errors import DataError
from data_pipeline.index import Index
from data_pipeline.pictures import Refused, apply_fit, normalise, open_picture, to_pixels
from data_pipeline.reader import ShardReader, StoredSample
from data_pipeline.resolution import Fit
from data_pipeline.storage import Storage

BATCH_PIXELS = 1 << 22
"""Pixels of one batch of the autoencoder: four pictures of one megapixel."""

CAPTION_BATCH = 32


class OnlineReader(ShardReader):
    """A reader that encodes what it reads. Weights are loaded at the first reading, on the current device."""

    def __init__(self, index: Index, config: DataConfig, storage: Storage | None = None) -> None:
        if config.workers:
            raise DataError(
                f"data.workers: expected 0, received {config.workers}: the shards in {config.shards} leave "
                f"{' and '.join(index.online)} to be encoded in the training process. Prepare latents and "
                f"states to read them with workers"
            )
        super().__init__(index, storage)
        self._config = config

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        autoencoder = _placed(build_autoencoder(self._config.autoencoder))
        if autoencoder.channels != self.index.channels:
            raise DataError(
                f"data.autoencoder: gives latents of {autoencoder.channels} channels, the shards in "
                f"{self.index.folder} were prepared for {self.index.channels}"
            )
        return autoencoder

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        config = self._config.text_encoder
        assert config is not None
        encoder = _placed(build_text_encoder(config))
        if encoder.width != self.index.text_width:
            raise DataError(
                f"data.text_encoder: gives states of width {encoder.width}, the shards in "
                f"{self.index.folder} were prepared for {self.index.text_width}"
            )
        return encoder

    def read(self, sample_id: int) -> StoredSample:
        """Sample `sample_id`, encoded.

        Raises:
            DataError: naming shard and key, if anything about it is wrong.
        """
        found = self.read_all([sample_id])[0]
        if isinstance(found, DataError):
            raise found
        return found

    def read_all(self, sample_ids: Sequence[int]) -> list[StoredSample | DataError]:
        """`read` of each sample, or the error it raised. Pictures of one size and captions share batches."""
        found: list[StoredSample | DataError | None] = [None] * len(sample_ids)
        latents: dict[int, Tensor] = {}
        flipped: dict[int, Tensor] = {}
        pixels: dict[int, Tensor] = {}
        texts: dict[int, Sequence[Any]] = {}
        stored: dict[int, tuple[Tensor, ...]] = {}
        for place, sample_id in enumerate(sample_ids):
            try:
                span = self._span(sample_id)
                if "picture" in self.index.online:
                    pixels[place] = self._pixels(span, sample_id)
                else:
                    self._stored_latents(span, sample_id, place, latents, flipped)
                if self.index.has_text:
                    self._collect_text(span, sample_id, place, texts, stored)
            except DataError as error:
                found[place] = error
        good = [place for place, error in enumerate(found) if error is None]
        latents.update(self._encode_pixels({place: pixels[place] for place in good if place in pixels}))
        stored.update(self._encode_texts({place: texts[place] for place in good if place in texts}))
        for place in good:
            sample_id = sample_ids[place]
            captions = stored.get(place, ())
            label = None if captions else int(self.index.columns["label"][sample_id])
            sample = StoredSample(
                latents[place], captions[0] if captions else None, label, flipped.get(place), captions[1:]
            )
            tensors = (sample.latent, *captions)
            if all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                found[place] = sample
            else:
                found[place] = DataError(f"{self.index.name(sample_id)}: the encoders give NaN or infinity")
        return [item for item in found if item is not None]

    def _pixels(self, span: bytes, sample_id: int) -> Tensor:
        where = self.index.name(sample_id)
        meta = schema.decode_meta(self._member(span, sample_id, "meta"), where)
        image = decode_picture(self._member(span, sample_id, "latent"), meta, where)
        return to_pixels(image, self._autoencoder.pixel_channels)

    def _stored_latents(
        self,
        span: bytes,
        sample_id: int,
        place: int,
        latents: dict[int, Tensor],
        flipped: dict[int, Tensor],
    ) -> None:
        columns = self.index.columns
        expected = (self.index.channels, int(columns["height"][sample_id]), int(columns["width"][sample_id]))
        tensors = self._tensors(span, sample_id, "latent")
        latents[place] = self._checked(tensors, "latent", expected, sample_id)
        if "flipped" in tensors:
            flipped[place] = self._checked(tensors, "flipped", expected, sample_id)

    def _collect_text(
        self,
        span: bytes,
        sample_id: int,
        place: int,
        texts: dict[int, Sequence[Any]],
        stored: dict[int, tuple[Tensor, ...]],
    ) -> None:
        where = self.index.name(sample_id)
        data = self._member(span, sample_id, "text")
        if "ids" in self.index.online:
            texts[place] = schema.take_variants(schema.decode_tensors(data, where), "ids", where)
        elif "caption" in self.index.online:
            meta = schema.decode_meta(self._member(span, sample_id, "meta"), where)
            texts[place] = [schema.decode_caption(data, where), *meta.get("captions", [])[1:]]
        else:
            stored[place] = schema.take_variants(schema.decode_tensors(data, where), "states", where)

    def _encode_pixels(self, pixels: dict[int, Tensor]) -> dict[int, Tensor]:
        by_size: dict[tuple[int, ...], list[int]] = {}
        for place, tensor in pixels.items():
            by_size.setdefault(tuple(tensor.shape), []).append(place)
        latents: dict[int, Tensor] = {}
        for (_, height, width), places in by_size.items():
            count = max(1, BATCH_PIXELS // (height * width))
            for start in range(0, len(places), count):
                batch = places[start : start + count]
                together = torch.stack([pixels[place] for place in batch]).to(_device())
                encoded = self._autoencoder.encode(normalise(together)).float().cpu()
                latents.update(zip(batch, encoded, strict=True))
        return latents

    def _encode_texts(self, texts: dict[int, Sequence[Any]]) -> dict[int, tuple[Tensor, ...]]:
        if not texts:
            return {}
        encoder: Any = self._text_encoder
        encode = encoder.encode_ids if "ids" in self.index.online else encoder.encode
        flat = [text for captions in texts.values() for text in captions]
        order = sorted(range(len(flat)), key=lambda n: (len(flat[n]), n))
        states: dict[int, Tensor] = {}
        for start in range(0, len(order), CAPTION_BATCH):
            batch = order[start : start + CAPTION_BATCH]
            states.update(zip(batch, encode([flat[n] for n in batch]), strict=True))
        numbers = iter(range(len(flat)))
        return {place: tuple(states[next(numbers)] for _ in captions) for place, captions in texts.items()}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _placed(encoder: Any) -> Any:
    return encoder.to(_device()) if hasattr(encoder, "to") else encoder


def decode_picture(data: bytes, meta: dict[str, Any], where: str) -> Image.Image:
    """A stored picture at the size that its json plans.

    Raises:
        DataError: if it is damaged, or not the picture that the json describes.
    """
    channels_height_width = schema.planned_latent(meta, where)
    stride = int(meta["latent"]["stride"])
    height, width = (side * stride for side in channels_height_width[1:])
    try:
        image = open_picture(data).image
    except Refused as refused:
        raise DataError(f"{where}: {refused}") from refused
    if image.size == (width, height):
        return image
    if [image.height, image.width] != meta.get("original_px"):
        raise DataError(
            f"{where}: expected a picture of {height}x{width} pixels, or the original of "
            f"{meta.get('original_px')}; received {image.height}x{image.width}"
        )
    resized = meta.get("resize_px")
    if not isinstance(resized, list) or len(resized) != 2 or resized[0] < height or resized[1] < width:
        raise DataError(f"{where}: resize_px {resized!r} does not cover {height}x{width} pixels")
    return apply_fit(image, Fit(height, width, resized[0], resized[1]))
