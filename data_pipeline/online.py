"""Samples whose picture or caption is encoded while training, and features of pictures for alignment.

Reading and decoding happen wherever the loader reads, in workers too: `OnlineReader`. The frozen networks
run in the training process, on its device: `FrozenEncoders`. They belong to the loader, so neither DeepSpeed
nor a checkpoint ever sees them. A run on shards of latents and states makes neither of the two, and loads
neither transformers nor diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_pipeline import schema
from data_pipeline.config import DataConfig
from data_pipeline.encoders.autoencoder import Autoencoder, build_autoencoder
from data_pipeline.encoders.footprint import (
    Footprint,
    autoencoder_footprint,
    image_footprint,
    text_footprint,
)
from data_pipeline.encoders.identity import check_here, latent_shape, revision, text_width
from data_pipeline.encoders.image import ImageEncoder, build_image_encoder, feature_width
from data_pipeline.encoders.text import TextEncoder, build_text_encoder
from data_pipeline.errors import DataError
from data_pipeline.index import Index, Row
from data_pipeline.pictures import Refused, apply_fit, normalise, open_picture, to_pixels
from data_pipeline.reader import ShardReader, StoredSample
from data_pipeline.resolution import Fit
from data_pipeline.storage import Storage

LATENT_PIXELS = 1 << 20
"""Pixels of one batch of the autoencoder; a larger picture goes alone. A DC-AE takes 2.5 GiB for so many, and
four times that for four times as many; its 419 launches carry 5.2 TFLOP, so a device waits for none."""
FEATURE_PIXELS = 1 << 22
"""Of one batch of the image encoder, which takes less than half a GiB and a tenth of that work a pixel."""

CAPTION_BATCH = 32


@dataclass(frozen=True, eq=False)
class RawSample:
    """One sample as it was read: what is stored is decoded, what is left to encode is not encoded.

    Shapes:
        latent, flipped: [C, h, w].   pixels: uint8 [1 or 3, H, W].   each of states: [n, E].
    """

    latent: Tensor | None
    flipped: Tensor | None
    pixels: Tensor | None
    """The picture, where the shards hold it and no latent."""
    states: tuple[Tensor, ...]
    texts: tuple[Any, ...]
    """Token ids (int32 [n] each) or captions, where the shards hold them and no states."""
    label: int | None

    def mirrored(self) -> RawSample:
        """The same with the picture mirrored, left to right: what is encoded then are its features, too."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.flip(-1))


class OnlineReader(ShardReader):
    """Reads samples whose encoding is left to `FrozenEncoders`. Workers may have it, forked or spawned."""

    def __init__(self, index: Index, pixel_channels: int, storage: Storage | None = None) -> None:
        super().__init__(index, storage)
        self._pixel_channels = pixel_channels

    def read_raw(self, sample_ids: Sequence[int]) -> list[RawSample | DataError]:
        """The samples, each with its checksum and shapes checked, or the error of its reading."""
        return self._each(self._raw_or_error, self.index.rows(sample_ids))

    def _raw_or_error(self, row: Row) -> RawSample | DataError:
        try:
            return self._raw(row)
        except DataError as error:
            return error

    def _raw(self, row: Row) -> RawSample:
        online = self.index.online
        span = self._span(row)
        latent = flipped = pixels = None
        if "picture" in online:
            pixels = self._pixels(span, row)
        else:
            latent, flipped = self._latents(span, row)
        if not self.index.has_text:
            return RawSample(latent, flipped, pixels, (), (), row.label)
        where = self.index.name(row.sample_id)
        data = self._member(span, row, "text")
        states: tuple[Tensor, ...] = ()
        texts: tuple[Any, ...] = ()
        if "ids" in online:
            texts = schema.take_variants(schema.decode_tensors(data, where), "ids", where)
        elif "caption" in online:
            meta = schema.decode_meta(self._member(span, row, "meta"), where)
            texts = (schema.decode_caption(data, where), *meta.get("captions", [])[1:])
        else:
            states = schema.take_variants(schema.decode_tensors(data, where), "states", where)
        return RawSample(latent, flipped, pixels, states, texts, None)

    def _pixels(self, span: memoryview, row: Row) -> Tensor:
        where = self.index.name(row.sample_id)
        meta = schema.decode_meta(self._member(span, row, "meta"), where)
        image = decode_picture(self._member(span, row, "latent"), meta, where)
        return to_pixels(image, self._pixel_channels)


class FrozenEncoders:
    """The networks that a run uses and does not train, in the training process, each in its own dtype.

    Weights are loaded at the first use. Pictures of one size, and captions, share batches within a call: one
    call a pack, whose content does not depend on the number of ranks. What a batch holds alters a result by
    rounding alone: float32 for autoencoders, bfloat16 for language models.

    Args:
        patch_size: latent cells a side of a token.
        device: where the weights live and run.
    Raises:
        DataError: if an encoder does not make what the shards were planned for, or has nothing to encode.
    """

    def __init__(self, index: Index, config: DataConfig, *, patch_size: int, device: torch.device) -> None:
        self._index = index
        self._config = config
        self._patch_size = patch_size
        self._device = device
        self._check()

    def _check(self) -> None:
        index, config = self._index, self._config
        shape = latent_shape(config.autoencoder)
        if shape.channels != index.channels:
            raise DataError(
                f"data.autoencoder: gives latents of {shape.channels} channels, the shards in "
                f"{index.folder} were prepared for {index.channels}"
            )
        if "picture" in index.online:
            reader = ShardReader(index)
            planned = reader.read_meta(0).get("latent", {}).get("stride")
            reader.close()
            if planned != shape.stride:
                raise DataError(
                    f"data.autoencoder: a cell is {shape.stride} pixels a side, the pictures in "
                    f"{index.folder} were prepared for {planned}; their sizes are multiples of that"
                )
        if self._reads_captions and config.text_encoder is not None:
            width = text_width(config.text_encoder)
            if width != index.text_width:
                raise DataError(
                    f"data.text_encoder: gives states of width {width}, the shards in "
                    f"{index.folder} were prepared for {index.text_width}"
                )
        if config.image_encoder is not None:
            feature_width(config.image_encoder)
            if "picture" not in index.online and config.autoencoder.kind != "pixels":
                raise DataError(
                    f"data.image_encoder: reads pictures, the shards in {index.folder} hold latents of "
                    f"{config.autoencoder.kind}; prepare them with --pictures png or original"
                )

    @property
    def _reads_captions(self) -> bool:
        return "ids" in self._index.online or "caption" in self._index.online

    @property
    def padding_state(self) -> Tensor | None:
        """What captions of a pack are filled up with; None where they are not, or not encoded here."""
        return self._text_encoder.padding_state if self._reads_captions else None

    def describe(self) -> dict[str, dict[str, Any]]:
        """Kind, path and revision of each encoder that runs, for the record."""
        config, parts = self._config, {}
        if "picture" in self._index.online:
            parts["autoencoder"] = config.autoencoder
        if self._reads_captions:
            parts["text_encoder"] = config.text_encoder
        if config.image_encoder is not None:
            parts["image_encoder"] = config.image_encoder
        return {
            name: {"kind": part.kind, "path": part.path, "revision": revision(part.path)}
            for name, part in parts.items()
            if part is not None
        }

    @property
    def autoencoder(self) -> Autoencoder | None:
        """The one that encodes pictures, which others may use between steps; None where the shards hold
        latents."""
        return self._autoencoder if "picture" in self._index.online else None

    @property
    def text_encoder(self) -> TextEncoder | None:
        """Likewise of captions; None where the shards hold states, or labels."""
        return self._text_encoder if self._reads_captions else None

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        return self._placed(build_autoencoder(self._config.autoencoder))

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        config = self._config.text_encoder
        assert config is not None  # the loader checks that text data have one
        return self._placed(build_text_encoder(config))

    @cached_property
    def _image_encoder(self) -> ImageEncoder:
        config = self._config.image_encoder
        assert config is not None  # asked for only where there is one
        return self._placed(build_image_encoder(config))

    def _placed(self, encoder: Any) -> Any:
        return encoder.to(self._device) if hasattr(encoder, "to") else encoder

    def encode(self, samples: Sequence[RawSample], names: Sequence[str]) -> list[StoredSample | DataError]:
        """The samples as a reader of latents and states would give them, with features where they are wanted.

        Args:
            names: of the samples, for messages.
        Returns:
            For each sample, or an error in place of one whose encoding is not finite.
        """
        # Nothing here reads or moves a global random state: the encoders draw nothing.
        pictures = {n: raw.pixels for n, raw in enumerate(samples) if raw.pixels is not None}
        latents = self._in_batches(pictures, self._latents, LATENT_PIXELS)
        captions = self._texts(samples)
        features: dict[int, Tensor] = {}
        mirrored: dict[int, Tensor] = {}
        if self._config.image_encoder is not None:
            features = self._features({n: raw.latent for n, raw in enumerate(samples)}, pictures)
            mirrored = self._features({n: raw.flipped for n, raw in enumerate(samples)}, {})
        found: list[StoredSample | DataError] = []
        for n, raw in enumerate(samples):
            latent = latents[n] if raw.latent is None else raw.latent
            states = raw.states or captions.get(n, ())
            made = [latents[n]] if n in latents else []
            made += [*captions.get(n, ()), *(part[n] for part in (features, mirrored) if n in part)]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in made):
                found.append(DataError(f"{names[n]}: the encoders give NaN or infinity"))
                continue
            found.append(
                StoredSample(
                    latent,
                    states[0] if states else None,
                    raw.label,
                    raw.flipped,
                    tuple(states[1:]),
                    features.get(n),
                    mirrored.get(n),
                )
            )
        return found

    def _in_batches(
        self, pictures: dict[int, Tensor], encode: Callable[[Tensor], Tensor], most_pixels: int
    ) -> dict[int, Tensor]:
        """`encode` of every uint8 [C, H, W], those of one size in common batches [B, C, H, W] of [-1, 1]."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for place, tensor in pictures.items():
            by_size.setdefault(tuple(tensor.shape), []).append(place)
        results: dict[int, Tensor] = {}
        for (_, height, width), places in by_size.items():
            count = max(1, most_pixels // (height * width))
            for start in range(0, len(places), count):
                batch = places[start : start + count]
                together = torch.stack([pictures[place] for place in batch]).to(self._device)
                pixels = together if together.is_floating_point() else normalise(together)
                results.update(zip(batch, encode(pixels).cpu(), strict=True))
        return results

    def _latents(self, pixels: Tensor) -> Tensor:
        return self._autoencoder.encode(pixels).float()

    def _features(self, latents: dict[int, Tensor | None], pictures: dict[int, Tensor]) -> dict[int, Tensor]:
        """[h * w, Z] of each picture; a latent of `pixels` is one, exactly."""
        decoded = {
            n: self._autoencoder.decode(latent[None].float())[0]
            for n, latent in latents.items()
            if latent is not None
        }
        unit = self._patch_size * latent_shape(self._config.autoencoder).stride
        config = self._config.image_encoder
        assert config is not None  # the caller looked

        def encode(pixels: Tensor) -> Tensor:
            grid = (pixels.shape[2] // unit, pixels.shape[3] // unit)
            features = self._image_encoder.features(pixels, grid)
            # No more digits than the weights have: they are moved and kept.
            return (
                features.bfloat16() if config.kind != "patches" and config.dtype == "bfloat16" else features
            )

        return self._in_batches({**decoded, **pictures}, encode, FEATURE_PIXELS)

    def _texts(self, samples: Sequence[RawSample]) -> dict[int, tuple[Tensor, ...]]:
        texts = {n: raw.texts for n, raw in enumerate(samples) if raw.texts}
        if not texts:
            return {}
        encoder: Any = self._text_encoder
        encode = encoder.encode_ids if "ids" in self._index.online else encoder.encode
        flat = [text for captions in texts.values() for text in captions]
        order = sorted(range(len(flat)), key=lambda n: (len(flat[n]), n))
        states: dict[int, Tensor] = {}
        for start in range(0, len(order), CAPTION_BATCH):
            batch = order[start : start + CAPTION_BATCH]
            states.update(zip(batch, encode([flat[n] for n in batch]), strict=True))
        numbers = iter(range(len(flat)))
        return {place: tuple(states[next(numbers)] for _ in captions) for place, captions in texts.items()}


def encoder_footprints(
    config: DataConfig,
    pictures: int,
    grid: tuple[int, int],
    *,
    patch_size: int,
    online: Collection[str] | None,
) -> dict[str, Footprint]:
    """What each encoder that runs while training takes of the device, for packs of equal pictures.

    Args:
        pictures: of a pack.
        grid: (height, width) of each in tokens.
        online: what the shards leave to encode, as their index says; None: all that the config allows.
    Raises:
        DataError: if there is no config of an encoder at its path.
    """
    if online is None:
        online = ("picture", "caption") if config.encode_online else ()
    if not online and config.image_encoder is None:
        return {}
    check_here(config.autoencoder.path, "data.autoencoder.path")
    unit = patch_size * latent_shape(config.autoencoder).stride
    height, width = (side * unit for side in grid)

    def batch(most_pixels: int) -> int:
        return min(pictures, max(1, most_pixels // (height * width)))

    found = {}
    if "picture" in online:
        found["autoencoder"] = autoencoder_footprint(config.autoencoder, batch(LATENT_PIXELS), height, width)
    if ("ids" in online or "caption" in online) and config.text_encoder is not None:
        # A sample may have several captions, all of which are encoded.
        found["text_encoder"] = text_footprint(config.text_encoder, CAPTION_BATCH)
    if config.image_encoder is not None:
        found["image_encoder"] = image_footprint(
            config.image_encoder, batch(FEATURE_PIXELS), height, width, grid
        )
    return found


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
