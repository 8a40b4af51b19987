"""What a frozen encoder takes of a device's memory, from its config alone: weights, and the peak of a batch.

The model is built on torch's meta device, by the class that the config names, and run there on a batch that
has sizes and no values. What it allocates on the way is counted tensor by tensor; the workspaces of libraries
are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.config import AutoencoderConfig, ImageEncoderConfig, TextEncoderConfig
from data_pipeline.encoders.autoencoder import build_autoencoder
from data_pipeline.encoders.identity import check_here, text_width
from data_pipeline.encoders.image import build_image_encoder
from data_pipeline.pictures import normalise

META = torch.device("meta")


class Footprint(NamedTuple):
    """Bytes on the device."""

    weights: int
    peak: int
    """Of one batch, its input included, beside the weights."""


def autoencoder_footprint(config: AutoencoderConfig, pictures: int, height: int, width: int) -> Footprint:
    """Of encoding so many pictures of one size in pixels at once.

    Raises:
        DataError: if there is no config at the path.
    """
    check_here(config.path, "data.autoencoder.path")
    encoder = build_autoencoder(config, weights=False)
    return _footprint(
        encoder, lambda: encoder.encode(_pixels(pictures, encoder.pixel_channels, height, width))
    )


def image_footprint(
    config: ImageEncoderConfig, pictures: int, height: int, width: int, grid: tuple[int, int]
) -> Footprint:
    """Of the features of so many pictures of one size in pixels, one for each token of `grid`.

    Raises:
        DataError: if there is no config at the path.
    """
    check_here(config.path, "data.image_encoder.path")
    encoder = build_image_encoder(config, weights=False)
    return _footprint(encoder, lambda: encoder.features(_pixels(pictures, 3, height, width), grid))


def text_footprint(config: TextEncoderConfig, captions: int) -> Footprint:
    """Of encoding so many captions of the greatest length at once.

    Raises:
        DataError: if there is no config at the path.
    """
    if config.kind == "words":
        # Made on the host.
        return Footprint(0, 0)
    check_here(config.path, "data.text_encoder.path")
    from data_pipeline.encoders.language_model import LanguageModelEncoder, empty_model

    model = empty_model(config)
    encoder = LanguageModelEncoder(model, None, width=text_width(config), max_tokens=config.max_tokens)

    def run() -> Tensor:
        ids = torch.zeros(captions, config.max_tokens, dtype=torch.int64, device=META)
        return encoder.hidden(ids, torch.ones_like(ids))

    return _footprint(encoder, run)


def _pixels(pictures: int, channels: int, height: int, width: int) -> Tensor:
    levels = torch.zeros(pictures, channels, height, width, dtype=torch.uint8, device=META)
    return normalise(levels)


def _footprint(encoder: Any, run: Callable[[], object]) -> Footprint:
    model = getattr(encoder, "model", None)
    weights = [] if model is None else [*model.parameters(), *model.buffers()]
    with torch.no_grad(), _LiveBytes(weights) as live, _FusedAttention():
        run()
    return Footprint(sum(tensor.nbytes for tensor in weights), live.peak)


class _LiveBytes(TorchDispatchMode):
    """Bytes of the meta tensors that were made within it and are alive, at the most."""

    def __init__(self, apart_from: list[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, object] = {x.untyped_storage()._cdata: x for x in apart_from}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # A question to the values, such as whether a mask is all ones: the answer that costs more.
            return False
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self._now)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: object) -> None:
            del self._alive[key]
            self._now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self._now += size


class _FusedAttention(TorchFunctionMode):
    """Attention as the kernels of a device take memory: for its result. The meta device would make logits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nnf.scaled_dot_product_attention:
            query, _, value = args[:3]
            batch, heads, length, _ = query.shape
            return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        return func(*args, **(kwargs or {}))
