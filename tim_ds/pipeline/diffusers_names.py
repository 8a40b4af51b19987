"""The names that users of diffusers know: what they mean here, and where to look for the others."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from tim_ds.errors import RequestError
from tim_ds.pipeline.request import PromptLike, Size, is_one_size, listed

_OFFLOAD = "the network stays whole on its device; enable_model_cpu_offload keeps the encoders off it"
_ATTENTION = "attention never holds the whole matrix"
_ADAPTERS = "adapters are merged when a run ends: load its export"
ELSEWHERE = {
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
"""What `TiMPipeline` has not, and where it is."""


def only_one(alias: str, name: str, first: Any, second: Any) -> Any:
    """The one of two names that was given."""
    if first is not None and second is not None:
        raise RequestError(f"{alias}: the same as {name}, which is given too; expected one of them")
    return second if first is None else first


def size_of(
    sizes: str | Size | Sequence[str | Size] | None, height: int | None, width: int | None
) -> str | Size | Sequence[str | Size]:
    """Either the sizes, or the one that both sides make."""
    if sizes is None and height is not None and width is not None:
        return height, width
    if sizes is None or height is not None or width is not None:
        raise RequestError("sizes: expected either sizes, or both height and width")
    return sizes


def seeds_of(generator: torch.Generator | Sequence[torch.Generator]) -> int | list[int]:
    """The seeds that generators were given, whatever they have drawn since."""
    # `Generator.seed()` draws 64 bits; ours have 63.
    found = listed("generator", generator, torch.Generator)
    if strange := [one for one in found if not isinstance(one, torch.Generator)]:
        raise RequestError(f"generator: expected torch.Generator, received {strange[0]!r}")
    seeds = [one.initial_seed() % 2**63 for one in found]
    return seeds[0] if isinstance(generator, torch.Generator) else seeds


def repeated(
    times: int, prompts: Any, sizes: Any, negatives: str | Sequence[str] | None
) -> tuple[list[PromptLike], Any, Any]:
    """What is given one a prompt, so many times each (`num_images_per_prompt`)."""
    if not isinstance(times, Integral) or times < 1:
        raise RequestError(f"num_images_per_prompt: expected at least 1, received {times!r}")
    found = listed("prompts", prompts, str | int)

    def each(parts: Any) -> Any:
        """A list with one entry a prompt; what holds for all stays."""
        return [part for part in parts for _ in range(times)]

    is_one_negative = negatives is None or isinstance(negatives, str)
    return (
        each(found),
        sizes if is_one_size(sizes) else each(listed("sizes", sizes, str)),
        negatives if is_one_negative else each(listed("negative_prompt", negatives, str)),
    )
