"""What a call gives back: the pictures, in the type asked for, with all that decided them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tim_ds.errors import RequestError
from tim_ds.pipeline.files import as_pil, file_stem, refuse_existing, write_png
from tim_ds.pipeline.request import PromptLike, Size, own_settings

OutputType = Literal["pil", "np", "pt", "latent"]
"""What `PipelineOutput.images` are, as diffusers calls it."""
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


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
            return [as_pil(pixels) for pixels in self.pixels]
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
        own = own_settings(self.prompts[i], self.sizes[i], self.seeds[i], self.negative_prompts[i])
        return own | self.settings

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


def check_output_type(given: str) -> None:
    """Raises RequestError unless `given` is an `OutputType`."""
    if given not in _OUTPUT_TYPES:
        raise RequestError(f"output_type: expected one of {', '.join(_OUTPUT_TYPES)}, received {given!r}")


def _stacked(parts: list[Any], stack: Callable[[list[Any]], Any]) -> Any:
    """One array of all, or the list where their sizes differ."""
    return stack(parts) if len({tuple(part.shape) for part in parts}) == 1 else parts
