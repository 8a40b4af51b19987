"""Pictures to features, one a token: what feature alignment (REPA) aligns with."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from data_pipeline.config import ImageEncoderConfig
from data_pipeline.encoders.identity import LOADING_ERRORS
from data_pipeline.errors import DataError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

DINO = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Model types that kind `dino` takes: patch features are the last tokens, behind class and registers."""

# Pixels of [0, 1] are normalised by these; RADIO's model does it itself.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ImageEncoder(Protocol):
    """A feature extractor: any object with these two members can be aligned with."""

    @property
    def width(self) -> int:
        """Width of a feature."""
        ...

    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """One feature for each token of `grid`, row-major.

        Shapes:
            pixels: [B, 1 or 3, H, W] in [-1, 1]. Returns float32 [B, h * w, width], on the pixels' device.
        """
        ...


class PatchFeatures:
    """Fixed random projections of the pixels of a token and its eight neighbours. Nothing is learnt.

    The picture is reduced to 4 x 4 pixels a token; a feature is a tanh of a projection of 12 x 12 of them.
    The projection is the same on every machine. Meant for small data and for tests of everything around it.
    """

    SIDE = 4

    def __init__(self, width: int = 64) -> None:
        self._width = width
        rng = np.random.Generator(
            np.random.Philox(key=int.from_bytes(blake2b(b"patches").digest()[:8], "little"))
        )
        inputs = (3 * self.SIDE) ** 2
        matrix = rng.standard_normal((width, inputs), dtype=np.float32) * np.float32(2.0 / inputs**0.5)
        self._weight = torch.from_numpy(matrix).view(width, 1, 3 * self.SIDE, 3 * self.SIDE)

    @property
    def width(self) -> int:
        return self._width

    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        s = self.SIDE
        grey = pixels.to(torch.float32).mean(1, keepdim=True)
        grey = nnf.interpolate(grey, (s * grid[0], s * grid[1]), mode="area")
        around = nnf.pad(grey, (s, s, s, s), value=-1.0)
        return nnf.conv2d(around, self._weight.to(grey.device), stride=s).tanh().flatten(2).transpose(1, 2)


class PretrainedFeatures:
    """Patch features of a vision transformer of transformers, frozen.

    A picture is resized to one patch a token (bicubic, without antialiasing, as the authors do it), so that
    no feature has to be interpolated. Features are the last layer's patch tokens; class and register tokens
    are left out.
    """

    def __init__(self, model: Any, *, normalise: bool) -> None:
        self.model = model.eval().requires_grad_(False)
        self._patch = int(model.config.patch_size)
        self._width = int(model.config.hidden_size)
        self._normalise = normalise

    @property
    def width(self) -> int:
        return self._width

    def to(self, device: torch.device | str) -> PretrainedFeatures:
        """Move the weights to `device`; returns self."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        h, w = grid
        size = (h * self._patch, w * self._patch)
        x = pixels.to(torch.float32).expand(-1, 3, -1, -1).add(1).div(2)
        if tuple(x.shape[2:]) != size:
            x = nnf.interpolate(x, size, mode="bicubic", align_corners=False)
        if self._normalise:
            mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in _IMAGENET)
            x = (x - mean) / std
        dtype = next(self.model.parameters()).dtype
        hidden = self.model(pixel_values=x.to(dtype)).last_hidden_state
        return hidden[:, -h * w :].float()


def build_image_encoder(config: ImageEncoderConfig, *, weights: bool = True) -> ImageEncoder:
    """The encoder that `config` names; weights are on the CPU, or without values on the meta device.

    Raises:
        DataError: if weights cannot be loaded, or are of a model that is not supported.
    """
    if config.kind == "patches":
        return PatchFeatures(config.width)
    from transformers import AutoModel

    kind = model_type(config)
    model: Any
    try:
        if weights:
            model = AutoModel.from_pretrained(config.path or "", dtype=DTYPES[config.dtype])
        else:
            with torch.device("meta"):
                model = AutoModel.from_config(_config(config), dtype=DTYPES[config.dtype])
    except LOADING_ERRORS as error:
        raise DataError(f"data.image_encoder.path: cannot load {config.path!r} ({error})") from error
    return PretrainedFeatures(model, normalise=kind != "radio")


def model_type(config: ImageEncoderConfig) -> str:
    """transformers' name of the model at the path.

    Raises:
        DataError: if there is none, or not of the kind that the config says.
    """
    found = _config(config)
    expected = ("radio",) if config.kind == "radio" else DINO
    if found.model_type not in expected:
        raise DataError(
            f"data.image_encoder.path: expected a model of type {' or '.join(expected)} at {config.path!r}, "
            f"received {found.model_type!r}. Code of a checkpoint's own is never run"
        )
    return found.model_type


def feature_width(config: ImageEncoderConfig) -> int:
    """Width of a feature, from the config alone.

    Raises:
        DataError: as `model_type`.
    """
    if config.kind == "patches":
        return config.width
    model_type(config)
    return int(_config(config).hidden_size)


def _config(config: ImageEncoderConfig) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(config.path or "")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"data.image_encoder.path: no config of transformers at {config.path!r} ({error})"
        ) from error
