"""Pictures to latents and back: one interface for exact pixels, DC-AE and SD-VAE."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from data_pipeline.config import AutoencoderConfig
from data_pipeline.encoders import tiling
from data_pipeline.encoders.identity import LOADING_ERRORS
from data_pipeline.errors import DataError

DEFAULT_TILE_PX = 1024
"""Side of the tiles in which larger pictures are decoded."""


class Autoencoder(Protocol):
    """Pixels in [-1, 1] to normalised latents and back.

    Shapes:
        pixels: [B, pixel_channels, H, W], sides multiples of `stride`.
        latents: [B, channels, H / stride, W / stride].
    """

    @property
    def stride(self) -> int:
        """Pixels a side of one latent cell."""
        ...

    @property
    def channels(self) -> int:
        """Channels of a latent cell."""
        ...

    @property
    def pixel_channels(self) -> int:
        """Channels of a picture: 1 (grey) or 3."""
        ...

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class PixelAutoencoder:
    """A factor x factor block of pixels becomes the channels of one cell. Exactly invertible.

    A cell's channels run (pixel channel, row in block, column in block); values stay in [-1, 1].
    """

    def __init__(self, factor: int = 2, channels: int = 3) -> None:
        if factor < 1 or channels not in (1, 3):
            raise DataError(
                f"pixels: expected factor >= 1 and 1 or 3 channels, received {factor} and {channels}"
            )
        self._factor = factor
        self._pixel_channels = channels

    @property
    def stride(self) -> int:
        return self._factor

    @property
    def channels(self) -> int:
        return self._pixel_channels * self._factor**2

    @property
    def pixel_channels(self) -> int:
        return self._pixel_channels

    def encode(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels, self)
        # Views and one copy. torch's pixel_unshuffle wakes its threads at any size: 3 ms for an 8x8 picture
        # on a busy two-core machine (measured), a thousand times its work.
        f = self._factor
        blocks = pixels.unflatten(3, (-1, f)).unflatten(2, (-1, f))
        return blocks.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)

    def decode(self, latents: Tensor) -> Tensor:
        check_latents(latents, self)
        f = self._factor
        blocks = latents.unflatten(1, (-1, f, f))
        return blocks.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


class PretrainedAutoencoder:
    """A diffusers autoencoder in float32, frozen.

    Latents are (z - shift) * scale with the constants of the model's own config, so that they have about unit
    variance; `decode` undoes it. An encoder that predicts a distribution gives its mean, so the latent of a
    picture is a function of the picture.

    Pictures of more pixels than `tile_px` squared are decoded in tiles (`data_pipeline.encoders.tiling`): a
    DC-AE exactly, up to the order of float sums; an SD-VAE approximately.
    """

    def __init__(self, model: Any, *, stride: int, channels: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tile_px = DEFAULT_TILE_PX
        self.tiles_exactly = tiling.reaches_known(model.decoder)
        self._stride = stride
        self._channels = channels
        self.scale = float(model.config.scaling_factor)
        self.shift = float(getattr(model.config, "shift_factor", None) or 0.0)

    @property
    def stride(self) -> int:
        return self._stride

    @property
    def channels(self) -> int:
        return self._channels

    @property
    def pixel_channels(self) -> int:
        return 3

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> PretrainedAutoencoder:
        """Move the weights to `device`; returns self."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        check_pixels(pixels, self)
        encoded = self.model.encode(pixels.to(torch.float32))
        z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        check_latents(latents, self)
        z = latents.to(torch.float32) / self.scale + self.shift
        height, width = (side * self._stride for side in latents.shape[2:])
        if height * width <= self.tile_px**2:
            return self.model.decode(z).sample
        if self.tiles_exactly:
            return tiling.decode_exactly(self.model.decoder, z, self.tile_px, self._stride)
        return tiling.decode_blended(
            lambda part: self.model.decode(part).sample, z, self.tile_px, self._stride
        )


def check_pixels(pixels: Tensor, autoencoder: Autoencoder) -> None:
    """Raises DataError unless `pixels` is [B, C, H, W] with sides that the stride divides."""
    if pixels.ndim != 4 or pixels.shape[1] != autoencoder.pixel_channels:
        raise DataError(
            f"pixels: expected [B, {autoencoder.pixel_channels}, H, W], received {list(pixels.shape)}"
        )
    height, width = pixels.shape[2:]
    s = autoencoder.stride
    if height < s or width < s or height % s or width % s:
        raise DataError(
            f"picture of {height}x{width} pixels: both sides must be multiples of {s}, the stride of the "
            f"autoencoder; nearest: {max(s, round(height / s) * s)}x{max(s, round(width / s) * s)}"
        )


def check_latents(latents: Tensor, autoencoder: Autoencoder) -> None:
    """Raises DataError unless `latents` is [B, channels, h, w]."""
    if latents.ndim != 4 or latents.shape[1] != autoencoder.channels or 0 in latents.shape[2:]:
        raise DataError(
            f"latents: expected [B, {autoencoder.channels}, h, w], received {list(latents.shape)}"
        )


def decode_bytes(autoencoder: Autoencoder, height: int, width: int) -> int:
    """Estimate of what decoding one picture of that many pixels takes at its peak, weights not counted.

    Beyond one tile it grows with the picture and its coarse features alone. The estimate lies above what was
    measured (`tests/data_pipeline/encoders/test_tiling.py`), by up to a factor of 2.
    """
    # The latent, the picture, and the picture while it is turned into levels.
    picture = 4 * 4 * autoencoder.pixel_channels * height * width
    if not isinstance(autoencoder, PretrainedAutoencoder):
        return picture
    area = min(height * width, autoencoder.tile_px**2)
    if autoencoder.tiles_exactly:
        decoder = autoencoder.model.decoder
        return picture + tiling.exact_bytes(decoder, height, width, area, autoencoder.stride)
    # The second finest block of a KL decoder works at full resolution too, with its own channels.
    channels = max(autoencoder.model.config.block_out_channels[:2])
    return picture + tiling.TENSORS_ALIVE * 4 * channels * area + tiling.SLACK_BYTES


def load_dc_ae(path: str, *, weights: bool = True) -> PretrainedAutoencoder:
    """A DC-AE (diffusers' AutoencoderDC) from a folder or hub name."""
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    model = _from_pretrained(AutoencoderDC, path, weights)
    return PretrainedAutoencoder(
        model, stride=model.spatial_compression_ratio, channels=model.config.latent_channels
    )


def load_sd_vae(path: str, *, weights: bool = True) -> PretrainedAutoencoder:
    """A Stable Diffusion VAE (diffusers' AutoencoderKL) from a folder or hub name."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    model = _from_pretrained(AutoencoderKL, path, weights)
    stride = 2 ** (len(model.config.block_out_channels) - 1)
    return PretrainedAutoencoder(model, stride=stride, channels=model.config.latent_channels)


def _from_pretrained(kind: Any, path: str, weights: bool) -> Any:
    try:
        if not weights:
            with torch.device("meta"):
                return kind.from_config(kind.load_config(path))
        return kind.from_pretrained(path, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    except LOADING_ERRORS as error:
        raise DataError(
            f"data.autoencoder.path: cannot load {kind.__name__} from {path!r} ({error}); "
            f"expected a folder with config.json and safetensors weights, or a hub name"
        ) from error


def build_autoencoder(config: AutoencoderConfig, *, weights: bool = True) -> Autoencoder:
    """The autoencoder that `config` names; weights are on the CPU, in float32, or without values on the meta
    device."""
    if config.kind == "pixels":
        return PixelAutoencoder(config.factor, config.channels)
    path = config.path or ""
    load = load_dc_ae if config.kind == "dc_ae" else load_sd_vae
    return load(path, weights=weights)
