"""Prompts to pictures: `TiMPipeline.from_pretrained(folder)(prompts, sizes)`, as diffusers users know it.

pipe = TiMPipeline.from_pretrained("runs/handwriting_tim").to("cpu")
output = pipe("a three above a seven", height=16, width=8, num_inference_steps=4, seeds=7)
output.images[0].save("three_above_seven.png")
output.save("pictures")
"""

from __future__ import annotations

import hashlib
import io
import json
import operator
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

from data_pipeline.encoders.autoencoder import Autoencoder, build_autoencoder, decode_bytes
from data_pipeline.encoders.text import TextEncoder, build_text_encoder, fill_up
from tim_ds import __version__
from tim_ds.config.recipe import parse_size
from tim_ds.errors import RequestError
from tim_ds.model.export_folder import Export, meta_network
from tim_ds.model.memory import available_bytes, gib, sampling_bytes
from tim_ds.model.ops import prove_attention
from tim_ds.model.weights import load_weights_into, write_aside
from tim_ds.objective.transport import build_transport
from tim_ds.packed import ClassCondition, Condition, Segments, TextCondition, unpatchify
from tim_ds.sampler.config import SamplerConfig
from tim_ds.sampler.rng import initial_noise
from tim_ds.sampler.transition import sample
from tim_ds.sources import read_source

Size = tuple[int, int]
"""(height, width) in pixels."""
PromptLike = str | int
"""A caption, or a class label."""

PNG_KEY = "tim_ds"
"""Keyword of the PNG text chunk that holds a picture's settings as JSON."""

_MODES = ("transition", "diffusion")

OutputType = Literal["pil", "np", "pt", "latent"]
"""What `PipelineOutput.images` are, as diffusers calls it."""
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")

OnStepEnd = Callable[["TiMPipeline", int, float, dict[str, Any]], dict[str, Any] | None]
"""(pipeline, number of the step from 0, time it reached, {"latents": ...})."""

_OFFLOAD = "the network stays whole on its device; enable_model_cpu_offload keeps the encoders off it"
_ATTENTION = "attention never holds the whole matrix"
_ADAPTERS = "adapters are merged when a run ends: load its export"
_ELSEWHERE = {
    "enable_sequential_cpu_offload": _OFFLOAD,
    "enable_group_offload": _OFFLOAD,
    "disable_vae_slicing": "pictures are decoded one at a time in any case",
    "disable_vae_tiling": "enable_vae_tiling(side) with a side that no picture reaches does it",
    "enable_attention_slicing": _ATTENTION,
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "load_lora_weights": _ADAPTERS,
    "load_textual_inversion": _ADAPTERS,
    "scheduler": "a transition model has none; a call takes num_steps, mode, stochasticity and cfg_interval",
    "unet": "it is .network",
    "transformer": "it is .network",
    "vae": "it is .autoencoder",
    "tokenizer": "it is part of .text_encoder",
    "save_pretrained": "what it was loaded from can be copied; released weights: python -m tim_ds.compat",
    "set_progress_bar_config": "there is no bar unless a call says progress=True",
}
"""What users of diffusers look for, and where it is."""


@dataclass(frozen=True, eq=False)
class PipelineOutput:
    """Sampled pictures, in the order of the prompts.

    Shapes:
        pixels: uint8 [H, W, C] each, C = 1 (grey) or 3; none of output type `latent`.
        latents: float32 [C, h, w] each, before they are decoded.
    """

    pixels: list[NDArray[np.uint8]]
    latents: list[Tensor]
    prompts: tuple[PromptLike, ...]
    sizes: tuple[Size, ...]
    seeds: tuple[int, ...]
    negative_prompts: tuple[str | None, ...]
    nfe: int
    """Network evaluations a picture; a guided step counts 2."""
    seconds: float
    """Wall time of the whole call."""
    settings: dict[str, Any]
    """Everything else that decided the pictures: weights, recipe, steps, mode, guidance."""
    output_type: OutputType = "pil"

    @property
    def images(self) -> Any:
        """The pictures in the type asked for, as diffusers has it.

        `pil`: a list of `PIL.Image.Image`. `np`: float32 [N, H, W, C] of 0 to 1; `pt`: the same as
        [N, C, H, W]; `latent`: [N, C, h, w]; each a list where sizes differ.
        """
        if self.output_type == "pil":
            return [_picture(pixels) for pixels in self.pixels]
        if self.output_type == "latent":
            return _stacked(self.latents, torch.stack)
        values = [pixels.astype(np.float32) / 255 for pixels in self.pixels]
        if self.output_type == "np":
            return _stacked(values, np.stack)
        return _stacked([torch.from_numpy(v).permute(2, 0, 1) for v in values], torch.stack)

    def __getitem__(self, i: int) -> Any:
        """`output[0]` is `output.images`, as of an output of diffusers."""
        return (self.images,)[i]

    def picture_settings(self, i: int) -> dict[str, Any]:
        """The settings of picture `i` with its prompt, size and seed: what its PNG carries."""
        return own_settings(self.prompts[i], self.sizes[i], self.seeds[i], self.negative_prompts[i]) | (
            self.settings
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write one PNG a picture, with its settings as metadata (`read_settings`). Nothing is overwritten.

        Returns:
            The paths: number, prompt and seed make the name.
        Raises:
            RequestError: if one of the files exists, or there are latents alone; then none is written.
            CheckpointError: if the disk refuses.
        """
        if self.output_type == "latent":
            raise RequestError('save: output_type "latent" leaves no pictures; take another')
        folder = Path(folder)
        paths = [
            folder / f"{file_stem(i, prompt, seed)}.png"
            for i, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True))
        ]
        refuse_existing(paths)
        for i, path in enumerate(paths):
            write_png(path, self.pixels[i], self.picture_settings(i))
        return paths


@dataclass(frozen=True)
class Request:
    """A call whose every part was checked: `TiMPipeline.request` makes one, `TiMPipeline.run` draws it."""

    prompts: tuple[PromptLike, ...]
    sizes: tuple[Size, ...]
    seeds: tuple[int, ...]
    config: SamplerConfig
    negative_prompts: tuple[str | None, ...]
    """What guidance leads away from; None: the empty caption, or the null label."""

    def part(self, numbers: Sequence[int]) -> Request:
        """The pictures of these numbers alone."""
        return Request(
            tuple(self.prompts[i] for i in numbers),
            tuple(self.sizes[i] for i in numbers),
            tuple(self.seeds[i] for i in numbers),
            self.config,
            tuple(self.negative_prompts[i] for i in numbers),
        )

    def own_settings(self, i: int) -> dict[str, Any]:
        """What picture `i` alone is asked for."""
        return own_settings(self.prompts[i], self.sizes[i], self.seeds[i], self.negative_prompts[i])


class TiMPipeline:
    """A trained network with its autoencoder and text encoder.

    Args:
        network: TiM network of `export.model`.
        export: what the network is; `export.sampler` holds the defaults of a call.
        autoencoder, text_encoder: None builds those that `export` names.
        weights_sha256: of the weight file, for metadata.
    Raises:
        RequestError: if an autoencoder or text encoder is neither given nor named by `export` (imported
            weights may name none), or does not fit the network, or cannot be loaded.
    """

    def __init__(
        self,
        network: nn.Module,
        export: Export,
        *,
        autoencoder: Autoencoder | None = None,
        text_encoder: TextEncoder | None = None,
        weights_sha256: str = "",
    ) -> None:
        self.network = network
        self.export = export
        self.weights_sha256 = weights_sha256
        self.transport = build_transport(export.transport)
        self.autoencoder = _autoencoder(export) if autoencoder is None else autoencoder
        self.text_encoder: TextEncoder | None = None
        if export.model.condition == "text":
            self.text_encoder = _text_encoder(export) if text_encoder is None else text_encoder
        self._check_parts()
        self.tokens_per_batch = 4096
        """Image tokens of one network call, both halves of guidance counted; a larger picture goes alone."""
        self.checks_memory = True
        """Whether a request is refused when the estimate is beyond what the device has left."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> TiMPipeline:
        """The pipeline of trained weights, in evaluation mode.

        Args:
            source: an export folder, the folder of a run (its export, or while it trains its newest
                checkpoint), a checkpoint folder (its averaged weights), or a weight file that the authors
                released. See `tim_ds.sources`.
            dtype: of the network; float32 by default. Also called torch_dtype.
        Raises:
            CheckpointError: if the source is incomplete or holds weights of another network.
            RequestError: for a device that is not there, and as `TiMPipeline`.
        """
        check_device(device)
        chosen = _only_one("torch_dtype", "dtype", torch_dtype, dtype)
        found = read_source(source)
        network = meta_network(found.export.model)
        network = network.to(torch.float32 if chosen is None else chosen).to_empty(device=device)
        load_weights_into(network, found.state, source=str(source))
        return cls(network.eval(), found.export, weights_sha256=found.sha256).to(device)

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> TiMPipeline:
        """Move the network (and encoders with weights, which keep their precision); returns self.

        Args:
            device: where to; a dtype may stand in its place.
            dtype: of the network's parameters.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, _only_one("to", "dtype", device, dtype)
        if device is not None:
            check_device(device)
        self.network.to(device=device, dtype=dtype)
        for part in (self.autoencoder, self.text_encoder):
            if device is not None and hasattr(part, "to"):
                part.to(device)  # type: ignore[union-attr]  # only encoders with weights have it
        prove_attention(self.device, self.dtype, self.export.model.head_dim)
        return self

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device = "cuda"
    ) -> None:
        """Put the network on a device and keep the encoders on the host, from where each comes to work.

        For a device that does not hold them all: while it samples, it holds the network alone. `to` ends it.

        Args:
            gpu_id: number of a GPU, instead of `device`.
        Raises:
            RequestError: for a device that is not there.
        """
        chosen = device if gpu_id is None else f"cuda:{gpu_id}"
        check_device(chosen)
        for part in self._encoders():
            part.to("cpu")
        self.network.to(chosen)
        prove_attention(self.device, self.dtype, self.export.model.head_dim)

    def enable_vae_slicing(self) -> None:
        """Does nothing: pictures are decoded one at a time."""

    def enable_vae_tiling(self, tile_px: int | None = None) -> None:
        """Decode pictures beyond `tile_px` in tiles, as is done beyond the encoder's own side without this.

        Raises:
            RequestError: if the autoencoder has no weights, or a tile is smaller than its stride.
        """
        if tile_px is None:
            return
        if not hasattr(self.autoencoder, "tile_px"):
            raise RequestError("this network's autoencoder has no weights and is not decoded in tiles")
        if tile_px < self.autoencoder.stride:
            raise RequestError(f"tile: expected at least {self.autoencoder.stride}, received {tile_px}")
        self.autoencoder.tile_px = tile_px  # type: ignore[attr-defined]  # only those with weights have it

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            hint = f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else ""
            raise AttributeError(f"TiMPipeline has no {name}{hint}", name=name, obj=self)

    @contextmanager
    def encoders_beside_network(self) -> Iterator[None]:
        """Within, encoders with weights are on the device of the network; afterwards where they were. For a
        run, whose step needs the memory of the device."""
        with ExitStack() as stack:
            for part in self._encoders():
                stack.enter_context(self._beside_network(part))
            yield

    def _encoders(self) -> list[Any]:
        """Those with weights."""
        return [part for part in (self.autoencoder, self.text_encoder) if hasattr(part, "device")]

    @contextmanager
    def _beside_network(self, part: Any) -> Iterator[None]:
        """Within, an encoder with weights is on the device of the network; afterwards where it was."""
        place = getattr(part, "device", self.device)
        try:
            if place != self.device:
                part.to(self.device)
            yield
        finally:
            if place != self.device:
                part.to(place)

    def __repr__(self) -> str:
        export, dtype = self.export, str(self.dtype).removeprefix("torch.")
        parameters = sum(p.numel() for p in self.network.parameters())
        encoder = "none" if export.autoencoder is None else export.autoencoder.kind
        return (
            f"TiMPipeline({export.source.name}, step {export.step}, {parameters:,} parameters on "
            f"{self.device} in {dtype}, {export.transport.kind}; condition {export.model.condition}, "
            f"autoencoder {encoder})"
        )

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def size_multiple(self) -> int:
        """Pixels that both sides of a picture are multiples of: autoencoder stride times patch size."""
        return self.autoencoder.stride * self.export.model.patch_size

    def __call__(
        self,
        prompts: PromptLike | Sequence[PromptLike] | None = None,
        sizes: str | Size | Sequence[str | Size] | None = None,
        *,
        prompt: PromptLike | Sequence[PromptLike] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_steps: int | None = None,
        cfg_scale: float | None = None,
        cfg_interval: tuple[float, float] | None = None,
        stochasticity: float | None = None,
        mode: Literal["transition", "diffusion"] | None = None,
        seeds: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        progress: bool | tqdm = False,
    ) -> PipelineOutput:
        """Sample one picture a prompt, or several. Everything is checked before any work is done.

        A picture depends on its prompt, size, seed and the settings, not on what is sampled beside it.

        Args:
            prompts: captions, or class labels for a class-conditional network. Also called prompt.
            negative_prompt: what guidance leads away from, instead of the empty caption; one for all, or one
                each.
            num_images_per_prompt: pictures of each prompt, one after the other, with seeds of their own.
            sizes: (height, width) or "HEIGHTxWIDTH" in pixels; one for all prompts, or one each.
            height, width: one size for all prompts, instead of `sizes`.
            num_steps, cfg_scale, cfg_interval, stochasticity, mode: None takes that of `export.sampler`.
            seeds: one each, or the first of consecutive ones; 0 by default.
            num_inference_steps, guidance_scale: other names of `num_steps` and `cfg_scale`.
            generator: instead of `seeds`; of each, the seed that it was given is used, not its state.
            output_type: what `images` of the output are (`PipelineOutput.images`).
            return_dict: False gives (images,) alone.
            callback_on_step_end: called after every step of every batch of pictures, with the latents
                [C, h, w] that the step reached. It may look and may raise, which ends the call; what it
                returns must be None or what it was given.
            progress: show a bar, one tick a picture and step; or a bar that is counted up.
        Returns:
            The output; for return_dict=False a tuple of its images.
        Raises:
            RequestError: no prompts, a size that does not fit or is too large for the device, counts that
                differ, a label out of range, the same thing given under two names, a negative prompt without
                guidance.
            ConfigError: a sampler setting out of its range.
            NonFiniteError: if a picture stops being finite on the way.
        """
        if output_type not in _OUTPUT_TYPES:
            raise RequestError(
                f"output_type: expected one of {', '.join(_OUTPUT_TYPES)}, received {output_type!r}"
            )
        if sizes is None and height is not None and width is not None:
            sizes = (height, width)
        elif sizes is None or height is not None or width is not None:
            raise RequestError("sizes: expected either sizes, or both height and width")
        if generator is not None:
            seeds = _only_one("generator", "seeds", _seeds_of(generator), seeds)
        asked = _only_one("prompt", "prompts", prompt, prompts)
        if asked is None:
            raise RequestError("prompts: expected at least one, received none")
        asked, all_sizes, negatives = _repeated(num_images_per_prompt, asked, sizes, negative_prompt)
        output = self.run(
            self.request(
                asked,
                all_sizes,
                negative_prompts=negatives,
                num_steps=_only_one("num_inference_steps", "num_steps", num_inference_steps, num_steps),
                cfg_scale=_only_one("guidance_scale", "cfg_scale", guidance_scale, cfg_scale),
                cfg_interval=cfg_interval,
                stochasticity=stochasticity,
                mode=mode,
                seeds=0 if seeds is None else seeds,
            ),
            progress,
            output_type=output_type,
            on_step_end=callback_on_step_end,
        )
        # Typed as what nearly all callers get.
        return output if return_dict else (output.images,)  # type: ignore[return-value]

    def request(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sizes: str | Size | Sequence[str | Size],
        *,
        seeds: int | Sequence[int] = 0,
        negative_prompts: str | Sequence[str | None] | None = None,
        **sampler: Any,
    ) -> Request:
        """Check a call, memory included, without doing any of its work.

        Args:
            negative_prompts: one for all, or one each; None: the empty caption, or the null label.
            sampler: fields of `SamplerConfig`; None and what is left out take those of `export.sampler`.
        Raises:
            RequestError, ConfigError: as `__call__`.
        """
        prompt_list = self._check_prompts(prompts)
        size_list = self._check_sizes(sizes, len(prompt_list))
        seed_list = _check_seeds(seeds, len(prompt_list))
        config = self._check_sampler({name: value for name, value in sampler.items() if value is not None})
        negatives = self._check_negative(negative_prompts, len(prompt_list), config)
        if self.checks_memory:
            self._check_memory(size_list, config)
        return Request(tuple(prompt_list), tuple(size_list), tuple(seed_list), config, negatives)

    def run(
        self,
        request: Request,
        progress: bool | tqdm = False,
        *,
        output_type: OutputType = "pil",
        on_step_end: OnStepEnd | None = None,
    ) -> PipelineOutput:
        """Draw the pictures of a request.

        Raises:
            NonFiniteError: if a picture stops being finite on the way.
            RequestError: if `on_step_end` returns other latents.
        """
        start = time.perf_counter()
        grids = self._grids(request.sizes)
        pixels: list[NDArray[np.uint8]] = []
        kept: list[Tensor] = []
        nfe = 0
        total = len(request.prompts) * request.config.num_steps
        own_bar = tqdm(total=total, unit="step", desc="sample", leave=False, disable=progress is not True)
        bar = progress if isinstance(progress, tqdm) else own_bar
        with own_bar:
            for numbers in self.batches(request):
                part = request.part(numbers)
                latents, nfe = self._sample(part, [grids[i] for i in numbers], bar, on_step_end)
                if output_type == "latent":
                    kept.extend(latents)
                    continue
                with self._beside_network(self.autoencoder):
                    pixels.extend(self._decode(latent) for latent in latents)
        return PipelineOutput(
            pixels=pixels,
            latents=kept,
            prompts=request.prompts,
            sizes=request.sizes,
            seeds=request.seeds,
            negative_prompts=request.negative_prompts,
            nfe=nfe,
            seconds=time.perf_counter() - start,
            settings={**self.settings(request.config), "nfe": nfe, "version": __version__},
            output_type=output_type,
        )

    def settings(self, config: SamplerConfig) -> dict[str, Any]:
        """What decides a picture besides its prompt, size and seed."""
        autoencoder, text_encoder = self.export.autoencoder, self.export.text_encoder
        return {
            "model": self.export.source.name,
            "step": self.export.step,
            "recipe_sha256": self.export.source.recipe_sha256,
            "weights_sha256": self.weights_sha256,
            "dtype": str(self.dtype).removeprefix("torch."),
            "autoencoder": None if autoencoder is None else autoencoder.path or autoencoder.kind,
            "text_encoder": None if text_encoder is None else text_encoder.path or text_encoder.kind,
            "transport": self.transport.name,
            "num_steps": config.num_steps,
            "mode": config.mode,
            "cfg_scale": config.cfg_scale,
            "cfg_interval": list(config.cfg_interval),
            "cfg_upper": config.cfg_upper,
            "stochasticity": config.stochasticity,
            "schedule_dtype": config.schedule_dtype,
        }

    def batches(self, request: Request) -> Iterator[range]:
        """Consecutive pictures whose tokens fit `tokens_per_batch`."""
        factor = 2 if request.config.cfg_scale != 1.0 else 1
        start, tokens = 0, 0
        for i, (h, w) in enumerate(self._grids(request.sizes)):
            cost = h * w * factor
            if i > start and tokens + cost > self.tokens_per_batch:
                yield range(start, i)
                start, tokens = i, 0
            tokens += cost
        yield range(start, len(request.sizes))

    def fitting_tokens(self) -> int:
        """The largest power of two that `tokens_per_batch` can be by the memory estimate; at least 4096."""
        available = available_bytes(self.device)
        tokens = 4096
        while available is not None and tokens < 2**20:
            if sampling_bytes(self.export.model, 2 * tokens) > 0.8 * available:
                break
            tokens *= 2
        return tokens

    def needed_bytes(self, size: Size, config: SamplerConfig) -> int:
        """Estimate of the peak for one picture, beyond what is on the device: sampling it, decoding it, or an
        encoder that comes for its captions, whichever takes more."""
        [(h, w)] = self._grids([size])
        tokens = h * w * (2 if config.cfg_scale != 1.0 else 1)
        return max(
            sampling_bytes(self.export.model, tokens),
            decode_bytes(self.autoencoder, *size) + self._coming_bytes(self.autoencoder),
            self._coming_bytes(self.text_encoder),
        )

    def _coming_bytes(self, part: Any) -> int:
        """Weights that an encoder brings to the device when it works."""
        if getattr(part, "device", self.device) == self.device:
            return 0
        return sum(tensor.nbytes for tensor in (*part.model.parameters(), *part.model.buffers()))

    def _check_parts(self) -> None:
        model = self.export.model
        if self.autoencoder.channels != model.in_channels:
            raise RequestError(
                f"autoencoder: makes latents of {self.autoencoder.channels} channels, the network expects "
                f"{model.in_channels} (model.in_channels)"
            )
        if self.text_encoder is not None and self.text_encoder.width != model.text_dim:
            raise RequestError(
                f"text encoder: makes states of width {self.text_encoder.width}, the network expects "
                f"{model.text_dim} (model.text_dim)"
            )

    def _check_prompts(self, prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
        found = _listed("prompts", prompts, str | int)
        if not found:
            raise RequestError("prompts: expected at least one, received an empty list")
        if self.export.model.condition == "text":
            for i, prompt in enumerate(found):
                if not isinstance(prompt, str):
                    raise RequestError(f"prompts[{i}]: expected a caption, received {prompt!r}")
                try:
                    prompt.encode()
                except UnicodeEncodeError as error:
                    raise RequestError(f"prompts[{i}]: not text that can be written: {error}") from error
            return found
        return [self._check_label(i, label) for i, label in enumerate(found)]

    def _check_label(self, i: int, label: PromptLike) -> int:
        count = self.export.model.num_classes or 0
        number = int(label) if isinstance(label, str) and label.isascii() and label.isdigit() else label
        if isinstance(number, str | bool) or not isinstance(number, Integral) or not 0 <= number < count:
            raise RequestError(f"prompts[{i}]: expected a class label, 0 to {count - 1}, received {label!r}")
        return int(number)

    def _check_sizes(self, sizes: str | Size | Sequence[str | Size], count: int) -> list[Size]:
        found: list[Any] = [sizes] * count if _is_one_size(sizes) else _listed("sizes", sizes, str)
        if len(found) != count:
            raise RequestError(f"sizes: expected {_one_or(count)}, one a prompt, received {len(found)}")
        return [self._check_size(i, size) for i, size in enumerate(found)]

    def _check_size(self, i: int, size: Any) -> Size:
        if isinstance(size, str):
            try:
                height, width = parse_size(size)
            except ValueError as error:
                raise RequestError(f"sizes[{i}]: {error}") from error
        else:
            try:
                height, width = (operator.index(side) for side in size)
            except (TypeError, ValueError) as error:
                raise RequestError(f"sizes[{i}]: expected (height, width), received {size!r}") from error
        unit, stride, patch = self.size_multiple, self.autoencoder.stride, self.export.model.patch_size
        if height < 1 or width < 1 or height % unit or width % unit:
            raise RequestError(
                f"sizes[{i}]: {height}x{width}: both sides must be multiples of {unit} pixels "
                f"(autoencoder stride {stride} x patch size {patch}); "
                f"nearest that fit: {_nearest(height, width, unit)}"
            )
        return height, width

    def _check_sampler(self, given: dict[str, Any]) -> SamplerConfig:
        given = {name: _plain(name, value) for name, value in given.items()}
        mode = given.get("mode", self.export.sampler.mode)
        if mode not in _MODES:
            raise RequestError(f"mode: expected one of {', '.join(_MODES)}, received {mode!r}")
        num_steps = given.get("num_steps", self.export.sampler.num_steps)
        if num_steps < 1:
            raise RequestError(f"num_steps: expected at least 1, received {num_steps}")
        config = replace(self.export.sampler, **given)
        if (
            config.cfg_scale != 1.0
            and self.export.model.condition == "class"
            and not self.export.model.class_dropout
        ):
            raise RequestError(
                f"cfg_scale: {config.cfg_scale:g} needs a null label, which this network was built without "
                f"(model.class_dropout: false); set it to 1"
            )
        return config

    def _check_negative(
        self, given: str | Sequence[str | None] | None, count: int, config: SamplerConfig
    ) -> tuple[str | None, ...]:
        found: list[str | None]
        if given is None or isinstance(given, str):
            found = [given] * count
        else:
            found = _listed("negative_prompt", given, str)
        if len(found) != count:
            raise RequestError(
                f"negative_prompt: expected {_one_or(count)}, one a prompt, received {len(found)}"
            )
        for one in found:
            if one is None:
                continue
            if self.export.model.condition != "text":
                raise RequestError("negative_prompt: this network draws from class labels; leave it away")
            if not isinstance(one, str):
                raise RequestError(f"negative_prompt: expected a caption, received {one!r}")
            if config.cfg_scale == 1.0:
                raise RequestError(
                    "negative_prompt: has no effect without guidance; set cfg_scale (guidance_scale) beyond 1"
                )
        return tuple(found)

    def _check_memory(self, sizes: Sequence[Size], config: SamplerConfig) -> None:
        """Raises RequestError if the estimate for the largest picture is beyond what the device has left."""
        i, largest = max(enumerate(sizes), key=lambda entry: entry[1][0] * entry[1][1])
        needed, available = self.needed_bytes(largest, config), available_bytes(self.device)
        if available is None or needed <= available:
            return
        height, width = largest
        raise RequestError(
            f"sizes[{i}]: {height}x{width}: sampling and decoding it takes about {gib(needed)} at its peak, "
            f"{gib(available)} are left on {self.device}; {self._what_fits(available, config)}"
        )

    def _what_fits(self, available: int, config: SamplerConfig) -> str:
        unit = self.size_multiple
        fits, beyond = 0, 1
        while self.needed_bytes((beyond * unit, beyond * unit), config) <= available:
            fits, beyond = beyond, 2 * beyond
        while beyond - fits > 1:
            middle = (fits + beyond) // 2
            if self.needed_bytes((middle * unit, middle * unit), config) <= available:
                fits = middle
            else:
                beyond = middle
        if not fits:
            return "no size fits; free memory, or choose another device"
        return f"squares fit up to {fits * unit}x{fits * unit}, other shapes up to as many pixels"

    def _grids(self, sizes: Sequence[Size]) -> list[tuple[int, int]]:
        """(height, width) in tokens."""
        return [(h // self.size_multiple, w // self.size_multiple) for h, w in sizes]

    def _sample(
        self,
        part: Request,
        grids: Sequence[tuple[int, int]],
        bar: tqdm,
        on_step_end: OnStepEnd | None,
    ) -> tuple[list[Tensor], int]:
        """Latents [C, h, w] of one batch, and the evaluations a picture."""
        config, seeds, patch = part.config, part.seeds, self.export.model.patch_size
        z_TC = initial_noise(grids, self.export.model.token_channels, seeds).to(self.device, self.dtype)
        segments = Segments.from_grids(grids).to(self.device)
        condition, null = self._conditions(part.prompts, part.negative_prompts)

        def latents_of(x_TC: Tensor) -> list[Tensor]:
            return [unpatchify(x, grid, patch) for x, grid in zip(segments.split(x_TC), grids, strict=True)]

        def after(step: int, time: float, x_TC: Tensor) -> None:
            bar.update(len(grids))
            if on_step_end is None:
                return
            latents = latents_of(x_TC.float())
            answer = on_step_end(self, step - 1, time, {"latents": latents})
            if answer and answer.get("latents", latents) is not latents:
                raise RequestError(
                    "callback_on_step_end: returned other latents; a callback may look and stop, not change"
                )

        result = sample(
            self.network,
            self.transport,
            z_TC,
            segments,
            condition,
            config,
            null_condition=null if config.cfg_scale != 1.0 else None,
            seeds=seeds,
            on_step=after,
        )
        return latents_of(result.x_TC), result.nfe

    def _conditions(
        self, prompts: Sequence[PromptLike], negatives: Sequence[str | None]
    ) -> tuple[Condition, Condition]:
        """What the pictures of a batch show, and what guidance leads each away from."""
        count = len(prompts)
        if self.text_encoder is None:
            null = torch.full((count,), self.export.model.num_classes or 0)
            labels = torch.tensor(prompts, dtype=torch.int64)
            return ClassCondition(labels).to(self.device), ClassCondition(null).to(self.device)
        encoder = self.text_encoder
        others = [one or "" for one in negatives]
        with self._beside_network(encoder):
            # The empty caption once, however many pictures: it is what nearly all of them have.
            away = encoder.encode(others) if any(others) else encoder.encode([""]) * count
            states = encoder.encode([str(prompt) for prompt in prompts]) + away
        states = fill_up(states, encoder.padding_state)
        return self._captions(states[:count]), self._captions(states[count:])

    def _captions(self, states: Sequence[Tensor]) -> Condition:
        packed = torch.cat([state.to(self.dtype) for state in states])
        return TextCondition(packed, Segments.from_lengths([len(s) for s in states])).to(self.device)

    def _decode(self, latent: Tensor) -> NDArray[np.uint8]:
        """A latent [C, h, w] to a picture [H, W, C], rounded to the nearest of 256 levels."""
        pixels = self.autoencoder.decode(latent[None])[0].float()
        levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return levels.permute(1, 2, 0).cpu().numpy()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def write_png(path: Path, image: NDArray[np.uint8], settings: dict[str, Any]) -> None:
    """Write a picture [H, W, 1 or 3] with `settings` as metadata: aside, then renamed to `path`.

    Raises:
        CheckpointError: if the disk refuses; nothing half-written is left.
    """
    info = PngImagePlugin.PngInfo()
    info.add_text("Software", f"tim_ds {__version__}")
    if "prompt" in settings:
        info.add_itxt("Description", str(settings["prompt"]))
    info.add_itxt(PNG_KEY, json.dumps(settings, ensure_ascii=False))
    content = io.BytesIO()
    _picture(image).save(content, format="PNG", pnginfo=info)
    data = content.getvalue()

    def write(aside: Path) -> None:
        aside.write_bytes(data)

    write_aside(path, len(data), write)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `write_png` stored.

    Raises:
        RequestError: if the file is no PNG of this package.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(PNG_KEY)
    except (OSError, SyntaxError) as error:
        raise RequestError(f"{path}: not a picture that can be read ({error})") from error
    if text is None:
        raise RequestError(f"{path}: carries no settings of tim_ds")
    return json.loads(str(text))


def own_settings(
    prompt: PromptLike, size: Size, seed: int, negative_prompt: str | None = None
) -> dict[str, Any]:
    """What a picture says of itself alone; a negative prompt only where it has one."""
    found = {"prompt": prompt, "size": f"{size[0]}x{size[1]}", "seed": seed}
    return found if negative_prompt is None else found | {"negative_prompt": negative_prompt}


def _picture(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _stacked(parts: list[Any], stack: Callable[[list[Any]], Any]) -> Any:
    """One array of all, or the list where their sizes differ."""
    return stack(parts) if len({tuple(part.shape) for part in parts}) == 1 else parts


def refuse_existing(paths: Sequence[Path]) -> None:
    """Raises RequestError if one of the files exists."""
    existing = [path for path in paths if path.exists()]
    if existing:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise RequestError(f"{existing[0]}{more}: exists and is not overwritten; choose another folder")


def refuse_unwritable(folder: Path) -> None:
    """Raises RequestError if `folder` could not be made or written to: before work whose results go there."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RequestError(f"{folder}: {there} is not a folder; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(f"{folder}: {there} cannot be written to; choose another folder")


def check_device(device: str | torch.device, option: str = "device:") -> None:
    """Look whether a device is there.

    Args:
        option: how the message calls what named it.
    Raises:
        RequestError: if it is not.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # AssertionError is how a torch without CUDA refuses it.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RequestError(f"{option} {device}: not usable here: {reason}") from error


def _autoencoder(export: Export) -> Autoencoder:
    if export.autoencoder is None:
        raise RequestError(
            "export: names no autoencoder; pass one to TiMPipeline, or set `autoencoder` in export.json"
        )
    try:
        return build_autoencoder(export.autoencoder)
    except ValueError as error:
        raise RequestError(f"export: {error}") from error


def _text_encoder(export: Export) -> TextEncoder:
    if export.text_encoder is None:
        raise RequestError(
            "export: names no text encoder; pass one to TiMPipeline, or set `text_encoder` in export.json"
        )
    try:
        return build_text_encoder(export.text_encoder)
    except ValueError as error:
        raise RequestError(f"export: {error}") from error


def _only_one(alias: str, name: str, first: Any, second: Any) -> Any:
    """The one of two names that was given."""
    if first is not None and second is not None:
        raise RequestError(f"{alias}: the same as {name}, which is given too; expected one of them")
    return second if first is None else first


def _seeds_of(generator: torch.Generator | Sequence[torch.Generator]) -> int | list[int]:
    # `Generator.seed()` draws 64 bits; ours have 63.
    found = _listed("generator", generator, torch.Generator)
    if strange := [one for one in found if not isinstance(one, torch.Generator)]:
        raise RequestError(f"generator: expected torch.Generator, received {strange[0]!r}")
    seeds = [one.initial_seed() % 2**63 for one in found]
    return seeds[0] if isinstance(generator, torch.Generator) else seeds


def _repeated(
    times: int, prompts: Any, sizes: Any, negatives: str | Sequence[str] | None
) -> tuple[list[PromptLike], Any, Any]:
    """What is given one a prompt, so many times each."""
    if not isinstance(times, Integral) or times < 1:
        raise RequestError(f"num_images_per_prompt: expected at least 1, received {times!r}")
    found = _listed("prompts", prompts, str | int)

    def each(parts: Any) -> Any:
        """A list with one entry a prompt; what holds for all stays."""
        return [part for part in parts for _ in range(times)]

    is_one_negative = negatives is None or isinstance(negatives, str)
    return (
        each(found),
        sizes if _is_one_size(sizes) else each(_listed("sizes", sizes, str)),
        negatives if is_one_negative else each(_listed("negative_prompt", negatives, str)),
    )


def _is_one_size(sizes: Any) -> bool:
    """Whether one size for all was given, and not a list of one each."""
    if isinstance(sizes, str):
        return True
    try:
        return len(sizes) == 2 and all(isinstance(side, Integral) for side in sizes)
    except TypeError:
        return False


def _listed(name: str, given: Any, single: Any) -> list[Any]:
    """A list of what was given alone, or one each.

    Raises:
        RequestError: if it is neither.
    """
    if isinstance(given, single):
        return [given]
    try:
        return list(given)
    except TypeError as error:
        raise RequestError(f"{name}: expected one, or a list of one each, received {given!r}") from error


def _plain(name: str, value: Any) -> Any:
    """A setting of the sampler in the type that its field and a picture's metadata have.

    Raises:
        RequestError: if it is of another kind.
    """
    try:
        if name == "num_steps":
            return operator.index(value)
        if name in ("cfg_scale", "stochasticity"):
            return _number(value)
        if name == "cfg_interval":
            low, high = value
            return _number(low), _number(high)
    except (TypeError, ValueError) as error:
        kinds = {"num_steps": "a whole number", "cfg_interval": "two numbers, (low, high)"}
        raise RequestError(f"{name}: expected {kinds.get(name, 'a number')}, received {value!r}") from error
    return value


def _number(value: Any) -> float:
    if isinstance(value, str | bool) or value is None:
        raise TypeError("not a number")
    return float(value)


def _check_seeds(seeds: int | Sequence[int], count: int) -> list[int]:
    try:
        if isinstance(seeds, int | np.integer):
            found = [int(seeds) + i for i in range(count)]
        else:
            found = [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise RequestError(f"seeds: expected whole numbers, received {seeds!r}") from error
    if len(found) != count:
        raise RequestError(f"seeds: expected {_one_or(count)}, one a prompt, received {len(found)}")
    for i, seed in enumerate(found):
        if not 0 <= seed < 2**63:
            raise RequestError(f"seeds[{i}]: expected 0 to 2^63 - 1, received {seed}")
    return found


def _one_or(count: int) -> str:
    return "1" if count == 1 else f"1 or {count}"


def _nearest(height: int, width: int, unit: int) -> str:
    """Up to two sizes that fit, the nearest first."""

    def around(side: int) -> set[int]:
        below = side // unit * unit
        return {max(unit, below), max(unit, below + (unit if side % unit else 0))}

    fitting = [(h, w) for h in around(height) for w in around(width)]
    fitting.sort(key=lambda size: (abs(size[0] - height) + abs(size[1] - width), size))
    return " or ".join(f"{h}x{w}" for h, w in fitting[:2])


def file_stem(number: int, prompt: PromptLike, seed: int) -> str:
    """What a picture's file is called, without its ending: number, prompt and seed."""
    return f"{number:04d}_{_slug(prompt)}_seed{seed}"


def _slug(prompt: PromptLike) -> str:
    """A short file name part of a prompt: letters and digits of any script, dashes between."""
    text = f"class-{prompt}" if isinstance(prompt, int) else prompt
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:40].strip("-") or "no-prompt"
