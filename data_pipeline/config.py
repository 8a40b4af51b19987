"""Which shards a run reads and how they are packed. Standard library only; imports nothing of tim_ds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoencoderConfig:
    """Pictures to latents and back."""

    kind: Literal["pixels", "dc_ae", "sd_vae"]
    path: str | None = None
    """Folder or hub name of the weights (dc_ae, sd_vae)."""
    factor: int = 2
    """pixels only: a factor x factor block of pixels becomes channels."""
    channels: int = 3
    """pixels only: channels of the picture (1: grey)."""

    def __post_init__(self) -> None:
        if self.kind != "pixels" and not self.path:
            raise ValueError(f"data.autoencoder.path: required for kind {self.kind}")
        if self.factor < 1 or self.channels not in (1, 3):
            raise ValueError("data.autoencoder: factor must be at least 1 and channels 1 or 3")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """Captions to text states."""

    kind: Literal["words", "gemma", "t5"]
    path: str | None = None
    """Folder or hub name of the weights (gemma, t5)."""
    width: int = 64
    """words only: width of a state."""
    max_tokens: int = 256
    padding: Literal["none", "constant"] = "none"
    """`constant` fills the captions of a batch up to the longest, the empty ones too, with the authors'
    padding state, for their weights."""

    def __post_init__(self) -> None:
        if self.kind != "words" and not self.path:
            raise ValueError(f"data.text_encoder.path: required for kind {self.kind}")
        for name in ("width", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"data.text_encoder.{name}: expected at least 1, received {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageEncoderConfig:
    """Pictures to one feature a token: the target of feature alignment (REPA)."""

    kind: Literal["patches", "dino", "radio"]
    """`dino`: DINOv2 (with or without registers) or DINOv3; `radio`: RADIO in transformers' own class;
    `patches`: fixed random projections of the pixels around a token, without weights."""
    path: str | None = None
    """Folder or hub name of the weights (dino, radio)."""
    width: int = 64
    """patches only: width of a feature."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights (dino, radio)."""

    def __post_init__(self) -> None:
        if self.kind != "patches" and not self.path:
            raise ValueError(f"data.image_encoder.path: required for kind {self.kind}")
        if self.kind == "patches" and self.path:
            raise ValueError("data.image_encoder.path: kind 'patches' has no weights; remove it")
        if self.width < 1:
            raise ValueError(f"data.image_encoder.width: expected at least 1, received {self.width}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    shards: str
    """Folder, or URL that fsspec reads, of the tar shards and their index."""
    index: str | None = None
    """Folder or URL of the index, where it is not beside the shards. What else belongs to them
    (null.safetensors, manifest.json) is looked for there first."""
    tokens_per_pack: int
    """Token budget of one pack (one micro-batch of one rank); at least the largest image."""
    packs_per_step: int
    """Packs of one optimiser step over all ranks and accumulation, the global batch."""
    autoencoder: AutoencoderConfig
    text_encoder: TextEncoderConfig | None = None
    """Null for class-conditional data."""
    image_encoder: ImageEncoderConfig | None = None
    """Runs while training, on the pictures; `objective.repa_weight` reads its features."""
    encode_online: bool = False
    """Whether autoencoder or text encoder run while training: true for shards that hold pictures, token ids
    or captions, false for shards that hold latents and states."""
    flip_online: bool = False
    """Whether pictures that are encoded while training are mirrored first, half of the time. Stored mirror
    images (`prepare --flip`) are used whatever this says."""
    caption_dropout: float = 0.1
    """Share of images whose caption (or label) is replaced by the null one, for guidance."""
    workers: int = 0
    """Loader processes a rank; 0 reads in the training process."""

    def __post_init__(self) -> None:
        for name in ("shards", "index"):
            if getattr(self, name) == "":
                raise ValueError(f"data.{name}: expected a folder or a URL, received an empty word")
        if self.flip_online and not self.encode_online:
            raise ValueError(
                "data.flip_online: mirrors pictures that are encoded while training, but data.encode_online "
                "is false; for stored latents prepare the shards with --flip"
            )
        for name, least in (("tokens_per_pack", 1), ("packs_per_step", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}: expected at least {least}, received {getattr(self, name)}")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ValueError(f"data.caption_dropout: expected 0 to 1, received {self.caption_dropout}")

    @property
    def places(self) -> tuple[str, ...]:
        """Where what lies beside the shards is looked for, in this order."""
        return (self.shards,) if self.index is None else (self.index, self.shards)
