"""`TiMPipeline`: a trained network with its encoders, and the call that draws pictures with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from data_pipeline.encoders.autoencoder import Autoencoder
from data_pipeline.encoders.text import TextEncoder, fill_up
from tim_ds import __version__
from tim_ds.errors import RequestError
from tim_ds.model.export_folder import Export, meta_network
from tim_ds.model.ops import prove_attention
from tim_ds.model.weights import load_weights_into
from tim_ds.objective.transport import build_transport
from tim_ds.packed import ClassCondition, Condition, Segments, TextCondition, unpatchify
from tim_ds.pipeline.diffusers_names import ELSEWHERE, only_one, repeated, seeds_of, size_of
from tim_ds.pipeline.encoders import autoencoder_of, brought_to, check_device, check_fit, text_encoder_of
from tim_ds.pipeline.memory import LEAST_TOKENS, MemoryEstimate
from tim_ds.pipeline.output import OutputType, PipelineOutput, check_output_type
from tim_ds.pipeline.request import PromptLike, Request, RequestRules, Size
from tim_ds.sampler.config import SamplerConfig
from tim_ds.sampler.rng import initial_noise
from tim_ds.sampler.transition import sample
from tim_ds.sources import read_source

OnStepEnd = Callable[["TiMPipeline", int, float, dict[str, Any]], dict[str, Any] | None]
"""(pipeline, number of the step from 0, time it reached, {"latents": ...})."""


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
        self.autoencoder = autoencoder_of(export) if autoencoder is None else autoencoder
        self.text_encoder: TextEncoder | None = None
        if export.model.condition == "text":
            self.text_encoder = text_encoder_of(export) if text_encoder is None else text_encoder
        check_fit(export.model, self.autoencoder, self.text_encoder)
        self.tokens_per_batch = LEAST_TOKENS
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
        chosen = only_one("torch_dtype", "dtype", torch_dtype, dtype)
        found = read_source(source)
        network = meta_network(found.export.model)
        network = network.to(torch.float32 if chosen is None else chosen).to_empty(device=device)
        load_weights_into(network, found.state, source=str(source))
        return cls(network.eval(), found.export, weights_sha256=found.sha256).to(device)

    def __repr__(self) -> str:
        export, dtype = self.export, str(self.dtype).removeprefix("torch.")
        parameters = sum(p.numel() for p in self.network.parameters())
        encoder = "none" if export.autoencoder is None else export.autoencoder.kind
        return (
            f"TiMPipeline({export.source.name}, step {export.step}, {parameters:,} parameters on "
            f"{self.device} in {dtype}, {export.transport.kind}; condition {export.model.condition}, "
            f"autoencoder {encoder})"
        )

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
        check_output_type(output_type)
        sizes = size_of(sizes, height, width)
        if generator is not None:
            seeds = only_one("generator", "seeds", seeds_of(generator), seeds)
        asked = only_one("prompt", "prompts", prompt, prompts)
        if asked is None:
            raise RequestError("prompts: expected at least one, received none")
        asked, all_sizes, negatives = repeated(num_images_per_prompt, asked, sizes, negative_prompt)
        request = self.request(
            asked,
            all_sizes,
            negative_prompts=negatives,
            num_steps=only_one("num_inference_steps", "num_steps", num_inference_steps, num_steps),
            cfg_scale=only_one("guidance_scale", "cfg_scale", guidance_scale, cfg_scale),
            cfg_interval=cfg_interval,
            stochasticity=stochasticity,
            mode=mode,
            seeds=0 if seeds is None else seeds,
        )
        output = self.run(request, progress, output_type=output_type, on_step_end=callback_on_step_end)
        # Typed as what nearly all callers get.
        return output if return_dict else (output.images,)  # type: ignore[return-value]  # as diffusers

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
        rules = RequestRules(self.export.model, self.export.sampler, self.autoencoder.stride)
        found = rules.request(prompts, sizes, seeds, negative_prompts, sampler)
        if self.checks_memory:
            self._memory.refuse_too_large(found.sizes, found.config)
        return found

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

    def fitting_tokens(self) -> int:
        """The largest power of two that `tokens_per_batch` can be by the memory estimate; at least 4096."""
        return self._memory.fitting_tokens()

    def needed_bytes(self, size: Size, config: SamplerConfig) -> int:
        """Estimate of the peak for one picture, beyond what is on the device."""
        return self._memory.needed_bytes(size, config)

    @property
    def _memory(self) -> MemoryEstimate:
        return MemoryEstimate(self.export.model, self.autoencoder, self.text_encoder, self.device)

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

    def _grids(self, sizes: Sequence[Size]) -> list[tuple[int, int]]:
        """(height, width) in tokens."""
        return [(h // self.size_multiple, w // self.size_multiple) for h, w in sizes]

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> TiMPipeline:
        """Move the network (and encoders with weights, which keep their precision); returns self.

        Args:
            device: where to; a dtype may stand in its place.
            dtype: of the network's parameters.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, only_one("to", "dtype", device, dtype)
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
            hint = f": {ELSEWHERE[name]}" if name in ELSEWHERE else ""
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

    def _beside_network(self, encoder: Any) -> AbstractContextManager[None]:
        return brought_to(self.device, encoder)
