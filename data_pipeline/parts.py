"""One part of a preparation: a fixed range of source items becomes one shard, whoever does it and whenever.

What a part holds depends on the settings and the source alone. Batches are formed within a part, in source
order, so the same part gives the same bytes in any process.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from data_pipeline.encoders.autoencoder import Autoencoder, build_autoencoder
from data_pipeline.encoders.identity import latent_shape, load_tokenizer, text_width
from data_pipeline.encoders.text import TextEncoder, build_text_encoder, split_words
from data_pipeline.errors import DataError
from data_pipeline.pictures import (
    MAX_PIXELS,
    Picture,
    Refused,
    apply_fit,
    normalise,
    open_picture,
    to_pixels,
    to_png,
)
from data_pipeline.resolution import Fit, SizeRules, Unfit, describe_fit, fit, fit_given
from data_pipeline.schema import Sample
from data_pipeline.shards import write_shard
from data_pipeline.sources import BAD_CAPTION, BAD_LABEL, Item, Source, hash_file

logger = logging.getLogger(__name__)

NOT_FINITE = "NaN or infinity in the latent"
NOT_FINITE_TEXT = "NaN or infinity in the text states"
NO_CAPTION = "no caption"
EMPTY_CAPTION = "empty caption"

CUT_CAPTION = "caption cut"
"""Note of captions above the limit of characters."""

EXAMPLES = 5
"""Items that are named for each reason of a drop, in each part and in the manifest."""

WINDOW_PIXELS = 1 << 25
"""Pixels held decoded before they are encoded: 100 MB. Pictures of one size in it share batches."""

CAPTION_BATCH = 32

STORED_FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
"""Pillow's format to the member that keeps such a file as it is."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

PictureForm = Literal["latent", "png", "original"]
TextForm = Literal["states", "ids", "caption"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All but the source that determines the shards; recorded, and compared before a run goes on."""

    condition: Literal["caption", "class"]
    autoencoder: AutoencoderConfig
    sizes: SizeRules
    text_encoder: TextEncoderConfig | None = None
    pictures: PictureForm = "latent"
    """What is stored of a picture: its latent, the prepared pixels, or the file as it was found."""
    text: TextForm = "states"
    """What is stored of a caption: states, token ids, or the caption itself."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    flip: bool = False
    """Whether the latent of the mirror image is stored too."""
    captions: Literal["first", "all"] = "all"
    max_caption_characters: int = 10_000
    """Characters beyond it are cut, counted and warned of."""
    empty_captions: Literal["drop", "keep"] = "drop"
    frames: Literal["first", "refuse"] = "first"
    max_pixels: int = MAX_PIXELS
    per_shard: int = 1000
    """Source items of one shard, dropped ones included."""
    limit: int | None = None
    """Only this many items, from the first."""
    batch_pixels: int = 1 << 22
    """Pixels of one batch of the autoencoder; a picture above it is a batch of its own."""
    classes: tuple[str, ...] = ()
    num_classes: int | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.condition == "caption") == (self.text_encoder is None):
            raise DataError(
                "--text-encoder: captions need one, class labels need none; "
                f"received {self.text_encoder} with --condition {self.condition}"
            )
        if self.text_encoder is not None and self.text_encoder.padding != "none":
            raise DataError(
                "text encoder: padding is added when captions meet in a batch; states are stored without it"
            )
        if self.text == "ids" and self.text_encoder is not None and self.text_encoder.kind == "words":
            raise DataError("--text ids: the words encoder has no token ids; use states, or caption")
        if self.flip and self.pictures != "latent":
            raise DataError(
                "--flip stores a second latent; stored pictures are mirrored when they are encoded: "
                "data.flip_online"
            )
        for name in ("per_shard", "max_caption_characters", "batch_pixels", "max_pixels"):
            if getattr(self, name) < 1:
                raise DataError(
                    f"--{name.replace('_', '-')}: expected at least 1, received {getattr(self, name)}"
                )
        if self.max_pixels > MAX_PIXELS:
            raise DataError(f"--max-pixels: at most {MAX_PIXELS}, received {self.max_pixels}")
        if self.limit is not None and self.limit < 1:
            raise DataError(f"--limit: expected at least 1, received {self.limit}")


def part_ranges(items: int, per_shard: int) -> list[range]:
    """The source items of each part."""
    return [range(start, min(items, start + per_shard)) for start in range(0, items, per_shard)]


def shard_name(part: int) -> str:
    return f"part-{part:06d}.tar"


@dataclass
class PartReport:
    """What became of the items of one part, or of several added together."""

    items: int = 0
    samples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    """What was handled, by name: turned by EXIF, caption cut, ..."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Stored sizes in pixels, HEIGHTxWIDTH."""
    bytes: Counter[str] = field(default_factory=Counter)
    """Bytes of the members by their extension, and of the whole shards as `shards`."""
    text_tokens: int = 0
    text_width: int = 0
    max_stretch: float = 0.0
    max_crop: float = 0.0
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Shard name to samples, bytes and hash."""

    def drop(self, refused: Refused) -> None:
        self.dropped[refused.reason] += 1
        named = self.examples.setdefault(refused.reason, [])
        if len(named) < EXAMPLES:
            named.append(refused.detail[:300])

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())

    def add(self, other: PartReport) -> None:
        """Add the figures of another part; examples stay those of the first parts added."""
        self.items += other.items
        self.samples += other.samples
        self.text_tokens += other.text_tokens
        self.text_width = max(self.text_width, other.text_width)
        self.max_stretch = max(self.max_stretch, other.max_stretch)
        self.max_crop = max(self.max_crop, other.max_crop)
        for name in ("dropped", "notes", "sizes", "bytes"):
            getattr(self, name).update(getattr(other, name))
        for reason, named in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine.extend(named[: EXAMPLES - len(mine)])
        self.shards.update(other.shards)

    def to_json(self) -> dict[str, Any]:
        return {
            **{
                name: getattr(self, name)
                for name in (
                    "items",
                    "samples",
                    "text_tokens",
                    "text_width",
                    "max_stretch",
                    "max_crop",
                    "examples",
                )
            },
            **{
                name: dict(sorted(getattr(self, name).items()))
                for name in ("dropped", "notes", "sizes", "bytes")
            },
            "shards": self.shards,
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> PartReport:
        """The report of `to_json`.

        Raises:
            KeyError, TypeError: if it is not one.
        """
        report = cls(**stored)
        for name in ("dropped", "notes", "sizes", "bytes"):
            setattr(report, name, Counter(getattr(report, name)))
        return report


class _OutlineAutoencoder:
    """Zeros in the shape of latents: what a dry run stores, to weigh it."""

    def __init__(self, config: AutoencoderConfig) -> None:
        self._shape = latent_shape(config)

    @property
    def stride(self) -> int:
        return self._shape.stride

    @property
    def channels(self) -> int:
        return self._shape.channels

    @property
    def pixel_channels(self) -> int:
        return self._shape.pixel_channels

    def encode(self, pixels: Tensor) -> Tensor:
        count, _, height, width = pixels.shape
        return torch.zeros(count, self.channels, height // self.stride, width // self.stride)

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError("an outline holds no pictures")


class Encoders:
    """The encoders of one process. Weights are loaded only for what is stored encoded."""

    def __init__(self, settings: Settings, *, device: str, outline: bool) -> None:
        config = settings.text_encoder
        self.device = device
        self.pretrained_text = config is not None and config.kind != "words"
        self.shape = latent_shape(settings.autoencoder)
        self.autoencoder: Autoencoder
        if outline or settings.pictures != "latent":
            self.autoencoder = _OutlineAutoencoder(settings.autoencoder)
        else:
            self.autoencoder = _on(build_autoencoder(settings.autoencoder), device)
        self.text: TextEncoder | None = None
        self._tokenizer: Any = None
        self.text_width = 0
        self._max_tokens = 0
        if config is None:
            return
        self.text_width = text_width(config)
        self._max_tokens = config.max_tokens
        if self.pretrained_text and (outline or settings.text == "ids"):
            from data_pipeline.encoders.language_model import CaptionTokenizer

            self._tokenizer = CaptionTokenizer(load_tokenizer(config), max_tokens=config.max_tokens)
        if settings.text == "states" and not outline:
            self.text = _on(build_text_encoder(config), device)

    def latents(self, pixels: Tensor) -> Tensor:
        """float32 [B, C, h, w] on the CPU of uint8 pixels [B, channels, H, W].

        Raises:
            DataError: if the device has too little memory.
        """
        try:
            return self.autoencoder.encode(normalise(pixels.to(self.device))).float().cpu()
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"{self.device}: no memory for a batch of {list(pixels.shape)} pixels; lower --batch-pixels, "
                f"--max-area or --workers"
            ) from error

    def states(self, captions: Sequence[str]) -> list[Tensor]:
        """float32 [n, E] of each caption. Captions of like length share a batch."""
        if self.text is None:
            return [torch.zeros(length, self.text_width) for length in self.lengths(captions)]
        order = sorted(range(len(captions)), key=lambda n: (len(captions[n]), n))
        found: list[Tensor | None] = [None] * len(captions)
        for start in range(0, len(order), CAPTION_BATCH):
            batch = order[start : start + CAPTION_BATCH]
            for n, states in zip(batch, self.text.encode([captions[n] for n in batch]), strict=True):
                found[n] = states
        return cast("list[Tensor]", found)

    def ids(self, captions: Sequence[str]) -> list[Tensor]:
        """int32 [n] of each caption."""
        return self._tokenizer.tokenize(captions)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, without running the text encoder."""
        if self._tokenizer is not None:
            return [len(row) for row in self._tokenizer.tokenize(captions)]
        return [min(self._max_tokens, 1 + len(split_words(caption))) for caption in captions]


def _on(encoder: Any, device: str) -> Any:
    # Only pretrained encoders hold weights to move.
    return encoder.to(device) if hasattr(encoder, "to") else encoder


@dataclass(eq=False)
class _Prepared:
    """An item that has passed every rule, waiting for its window to be encoded."""

    key: str
    source: str
    captions: tuple[str, ...]
    label: int | None
    meta: dict[str, Any]
    size: tuple[int, int]
    pixels: Tensor | None = None
    picture: tuple[str, bytes] | None = None
    latent: Tensor | None = None
    flipped: Tensor | None = None


class PartEncoder:
    """Turns parts of a source into shards, or weighs them in a dry run."""

    def __init__(
        self, source: Source, settings: Settings, *, device: str = "cpu", outline: bool = False
    ) -> None:
        self._source = source
        self._settings = settings
        self._encoders = Encoders(settings, device=device, outline=outline)
        self._labels = {name: n for n, name in enumerate(settings.classes or source.classes)}
        self._dtype = DTYPES[settings.dtype]
        self._report = PartReport()

    @property
    def encoders(self) -> Encoders:
        return self._encoders

    def write(self, numbers: range, path: Path, *, on_item: Callable[[], object] | None = None) -> PartReport:
        """Write the shard of the items `numbers` to `path`; no shard if none of them can be used."""
        samples = self._samples(numbers, on_item)
        first = next(samples, None)
        if first is not None:
            count = write_shard(path, _chain(first, samples))
            size = path.stat().st_size
            self._report.shards[path.name] = {"samples": count, "bytes": size, "blake2b": hash_file(path)}
            self._report.bytes["shards"] = size
        return self._report

    def weigh(self, numbers: range, name: str, *, on_item: Callable[[], object] | None = None) -> PartReport:
        """What `write` would report, without writing; hashes are left out."""
        size = count = 0
        for sample in self._samples(numbers, on_item):
            count += 1
            size += sum(512 + _blocks(len(data)) for data in sample.to_members().values())
        if count:
            # Two closing blocks, then up to a whole record of twenty.
            size = -(-(size + 1024) // 10240) * 10240
            self._report.shards[name] = {"samples": count, "bytes": size}
            self._report.bytes["shards"] = size
        return self._report

    def _samples(self, numbers: range, on_item: Callable[[], object] | None) -> Iterator[Sample]:
        self._report = PartReport(items=len(numbers))
        window: list[_Prepared] = []
        pixels = 0
        for number in numbers:
            try:
                prepared = self._prepare(number)
            except Refused as refused:
                self._report.drop(refused)
            else:
                window.append(prepared)
                pixels += prepared.size[0] * prepared.size[1]
            if pixels >= WINDOW_PIXELS:
                yield from self._encode(window)
                window, pixels = [], 0
            if on_item is not None:
                on_item()
        yield from self._encode(window)

    def _prepare(self, number: int) -> _Prepared:
        settings = self._settings
        item = self._source.read(number)
        meta: dict[str, Any] = {"source": item.source, **({"extra": item.extra} if item.extra else {})}
        captions: tuple[str, ...] = ()
        label: int | None = None
        if settings.condition == "class":
            label = self._label(item)
        else:
            captions = self._captions(item)
            meta["caption"] = captions[0]
            if len(captions) > 1:
                meta["captions"] = list(captions)
        key = f"{number:09d}"
        if item.latent is not None:
            return self._prepare_latent(key, item, captions, label, meta)
        if item.picture is None:
            raise Refused("no picture", item.source)
        try:
            picture = open_picture(item.picture, frames=settings.frames, max_pixels=settings.max_pixels)
            fitted = self._fit(picture, item)
        except Refused as refused:
            raise Refused(refused.reason, f"{item.source}: {refused.detail}") from refused
        self._report.notes.update(picture.notes)
        self._report.max_stretch = max(
            self._report.max_stretch, round(fitted.stretch(picture.height, picture.width), 6)
        )
        self._report.max_crop = max(self._report.max_crop, round(fitted.crop_share, 6))
        meta.update(describe_fit(picture.height, picture.width, fitted, picture.rotated))
        meta["blake2b"] = blake2b(item.picture, digest_size=16).hexdigest()
        if picture.notes:
            meta["notes"] = list(picture.notes)
        prepared = _Prepared(key, item.source, captions, label, meta, (fitted.height, fitted.width))
        if settings.pictures == "latent":
            prepared.pixels = to_pixels(apply_fit(picture.image, fitted), self._encoders.shape.pixel_channels)
        else:
            prepared.picture = self._stored_picture(item.picture, picture, fitted)
            meta["latent"] = {
                "channels": self._encoders.shape.channels,
                "stride": self._encoders.shape.stride,
            }
        return prepared

    def _fit(self, picture: Picture, item: Item) -> Fit:
        rules = self._settings.sizes
        if rules.mode == "buckets" and item.bucket is not None:
            return fit_given(item.bucket, rules.multiple)
        fitted = fit(picture.height, picture.width, rules)
        if isinstance(fitted, Unfit):
            raise Refused(fitted.reason, fitted.detail)
        return fitted

    def _stored_picture(self, data: bytes, picture: Picture, fitted: Fit) -> tuple[str, bytes]:
        if self._settings.pictures == "original" and picture.format in STORED_FORMATS:
            return STORED_FORMATS[picture.format], data
        if self._settings.pictures == "original":
            # Kept as large as it was, like the others; only the container changes.
            self._report.notes["original stored as png"] += 1
            return "png", to_png(picture.image)
        return "png", to_png(apply_fit(picture.image, fitted))

    def _prepare_latent(
        self, key: str, item: Item, captions: tuple[str, ...], label: int | None, meta: dict[str, Any]
    ) -> _Prepared:
        assert item.latent is not None
        shape = self._encoders.shape
        channels, height, width = item.latent.shape
        if channels != shape.channels:
            raise DataError(
                f"{item.source}: latent of {channels} channels, but the autoencoder that is said to have "
                f"made it has {shape.channels}; name the right one with --autoencoder and --autoencoder-path"
            )
        size = (height * shape.stride, width * shape.stride)
        meta.update(height_px=size[0], width_px=size[1])
        return _Prepared(
            key, item.source, captions, label, meta, size, latent=item.latent, flipped=item.flipped
        )

    def _label(self, item: Item) -> int:
        label = item.label
        if label is None and item.class_name is not None:
            label = self._labels.get(item.class_name)
            if label is None:
                raise Refused(BAD_LABEL, f"{item.source}: class {item.class_name[:80]!r} is not in the list")
        if label is None:
            raise Refused(BAD_LABEL, item.source)
        limit = self._settings.num_classes or len(self._labels)
        if limit and label >= limit:
            raise Refused(BAD_LABEL, f"{item.source}: label {label}, classes 0 to {limit - 1}")
        return label

    def _captions(self, item: Item) -> tuple[str, ...]:
        settings = self._settings
        if not item.captions and settings.empty_captions == "drop":
            raise Refused(NO_CAPTION, item.source)
        cleaned: list[str] = []
        for caption in item.captions or ("",):
            try:
                caption.encode()
            except UnicodeEncodeError as error:
                raise Refused(BAD_CAPTION, f"{item.source}: {error}") from error
            # One line, single spaces: what tokenizers see does not depend on how a file was wrapped.
            caption = " ".join(caption.replace("\x00", " ").split())
            if len(caption) > settings.max_caption_characters:
                self._report.notes[CUT_CAPTION] += 1
                logger.warning(
                    "%s: caption of %d characters cut to %d",
                    item.source,
                    len(caption),
                    settings.max_caption_characters,
                )
                caption = caption[: settings.max_caption_characters].rstrip()
            cleaned.append(caption)
        kept = [caption for caption in cleaned if caption]
        if not kept and settings.empty_captions == "drop":
            raise Refused(EMPTY_CAPTION, item.source)
        kept = kept or [""]
        return tuple(kept if settings.captions == "all" else kept[:1])

    def _encode(self, window: list[_Prepared]) -> Iterator[Sample]:
        self._encode_pictures(window)
        states, ids = self._encode_captions(window)
        for place, item in enumerate(window):
            if item.latent is None and item.picture is None:
                continue
            try:
                sample = self._sample(item, states[place], ids[place])
            except Refused as refused:
                self._report.drop(refused)
                continue
            self._count(sample, item)
            yield sample

    def _encode_pictures(self, window: list[_Prepared]) -> None:
        by_size: dict[tuple[int, int], list[_Prepared]] = {}
        for item in window:
            if item.pixels is not None:
                by_size.setdefault(item.size, []).append(item)
        for (height, width), items in by_size.items():
            per_batch = max(1, self._settings.batch_pixels // (height * width))
            for start in range(0, len(items), per_batch):
                batch = items[start : start + per_batch]
                pixels = torch.stack([cast(Tensor, item.pixels) for item in batch])
                for item, latent in zip(batch, self._encoders.latents(pixels), strict=True):
                    item.latent = latent
                if self._settings.flip:
                    mirrored = self._encoders.latents(pixels.flip(-1))
                    for item, latent in zip(batch, mirrored, strict=True):
                        item.flipped = latent
                for item in batch:
                    item.pixels = None

    def _encode_captions(
        self, window: list[_Prepared]
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        nothing: list[tuple[Tensor, ...]] = [()] * len(window)
        if self._settings.condition == "class" or self._settings.text == "caption":
            return nothing, nothing
        flat = [caption for item in window for caption in item.captions]
        as_states = self._settings.text == "states"
        encoded = iter(self._encoders.states(flat) if as_states else self._encoders.ids(flat))
        each = [tuple(next(encoded) for _ in item.captions) for item in window]
        return (each, nothing) if as_states else (nothing, each)

    def _sample(self, item: _Prepared, states: tuple[Tensor, ...], ids: tuple[Tensor, ...]) -> Sample:
        latent = None if item.latent is None else item.latent.to(self._dtype)
        flipped = None if item.flipped is None else item.flipped.to(self._dtype)
        for tensor in (latent, flipped):
            # After the conversion: what overflows 16 bits is infinite there alone.
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise Refused(NOT_FINITE, f"{item.source} in {self._settings.dtype}")
        stored = tuple(s.to(self._dtype) for s in states)
        if not all(bool(torch.isfinite(s).all()) for s in stored):
            raise Refused(NOT_FINITE_TEXT, f"{item.source} in {self._settings.dtype}")
        online = self._settings.condition == "caption" and self._settings.text != "states"
        return Sample(
            item.key,
            latent,
            states=stored[0] if stored else None,
            label=item.label,
            meta={**item.meta, **({"text_width": self._encoders.text_width} if online else {})},
            flipped=flipped,
            more_states=stored[1:],
            ids=ids,
            caption=item.captions[0] if online and not ids else None,
            picture=item.picture,
        )

    def _count(self, sample: Sample, item: _Prepared) -> None:
        report = self._report
        report.samples += 1
        report.sizes[f"{item.size[0]}x{item.size[1]}"] += 1
        for ending, data in sample.to_members().items():
            report.bytes[ending] += len(data)
        states = () if sample.states is None else (sample.states, *sample.more_states)
        report.text_tokens += sum(len(tokens) for tokens in (*states, *sample.ids))
        report.text_width = self._encoders.text_width


def _chain(first: Sample, rest: Iterable[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest


def _blocks(size: int) -> int:
    return -(-size // 512) * 512


def null_states(settings: Settings, device: str) -> dict[str, Tensor]:
    """Tensor `states` of the empty caption in 16 bits; nothing for class data. Loads the text encoder.

    For gemma also `padding` [1, E], with which a recipe may fill captions up.
    """
    config = settings.text_encoder
    if config is None:
        return {}
    config = replace(config, padding="constant") if config.kind == "gemma" else config
    encoder = _on(build_text_encoder(config), device)
    found = {"states": encoder.encode([""])[0]}
    if encoder.padding_state is not None:
        found["padding"] = encoder.padding_state
    return {name: states.to(DTYPES[settings.dtype]) for name, states in found.items()}


def read_part(path: Path) -> PartReport | None:
    """The report of a finished part; None if it is absent or not one."""
    try:
        return PartReport.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
