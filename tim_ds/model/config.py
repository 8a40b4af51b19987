"""What a TiM network is. Standard library only, so that checking a recipe needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tim_ds.errors import ConfigError

TimeCondition = Literal["t-r", "r", "t,r", "t,t-r", "r,t-r", "t,r,t-r"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture of the network. Defaults are those of the authors' XL models where they agree."""

    condition: Literal["text", "class"]
    """What the picture is made from: packed caption states (cross-attention) or a class label."""
    in_channels: int
    """Channels of the autoencoder's latent (DC-AE f32c32: 32, SD-VAE: 4)."""
    patch_size: int = 1
    """Latent cells per token and side."""
    hidden_size: int
    depth: int
    """Number of blocks."""
    num_heads: int
    """hidden_size / num_heads must be divisible by 4 (two rotary axes of pairs)."""
    encoder_depth: int = 8
    """Block (1-based) after which the REPA projector reads; ignored without a projector."""
    mlp_ratio: float = 4.0
    """SwiGLU hidden width is int(hidden_size * mlp_ratio) * 2 // 3."""
    text_dim: int | None = None
    """Width of a text state; required for condition: text (Gemma-3-1B: 1152)."""
    num_classes: int | None = None
    """Number of classes; required for condition: class. The null label is num_classes."""
    class_dropout: bool = True
    """Whether the label table has the extra null row that guidance needs."""
    z_dim: int | None = None
    """Width of the REPA target (RADIO v2.5-B: 768); null for a network without a projector."""
    projector_dim: int = 2048
    time_condition: TimeCondition = "t-r"
    """Which times feed the interval embedding, in the authors' notation."""
    separate_interval_embedder: bool = True
    """Whether the interval has an embedder of its own (`delta_embedder`) or shares the time embedder."""
    qk_norm: bool = True
    distance_aware: bool = True
    """Adds W_d . delta to q, k and v of every self-attention."""
    adaln_hidden: int | None = None
    """Hidden width of the blocks' AdaLN generators; null: (hidden_size // 4) * 3."""
    rope_layout: Literal["row_major", "reference"] = "row_major"
    """`reference` repeats the authors' positions, for their weights: transposed or scrambled."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "patch_size", "hidden_size", "depth", "num_heads", "projector_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: expected at least 1, received {getattr(self, name)}")
        for name in ("text_dim", "num_classes", "z_dim", "adaln_hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.{name}: expected null or at least 1, received {value}")
        if self.mlp_hidden < 1:
            raise ConfigError(
                f"model.mlp_ratio: expected a hidden width int(hidden_size * mlp_ratio) * 2 // 3 of at least "
                f"1, received {self.mlp_ratio}"
            )
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ConfigError(
                f"model.num_heads: hidden_size / num_heads must be a whole number divisible by 4, "
                f"received {self.hidden_size} / {self.num_heads}"
            )
        if self.condition == "text" and not self.text_dim:
            raise ConfigError(
                "model.text_dim: required when model.condition is 'text' (width of one text state)"
            )
        if self.condition == "class" and not self.num_classes:
            raise ConfigError("model.num_classes: required when model.condition is 'class'")
        if self.z_dim is not None and not 1 <= self.encoder_depth <= self.depth:
            raise ConfigError(
                f"model.encoder_depth: expected 1 to depth={self.depth}, received {self.encoder_depth}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def token_channels(self) -> int:
        """Channels of a packed token: patch_size^2 * in_channels."""
        return self.patch_size**2 * self.in_channels

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio) * 2 // 3

    @property
    def adaln_width(self) -> int:
        return self.adaln_hidden if self.adaln_hidden is not None else (self.hidden_size // 4) * 3
