"""A golden case as it lies on the disk, and the passage from its padded layout to packed tokens.

The format is described in tests/golden/README.md. Letters in shapes: B images, C latent channels, H and W
latent sides, M text tokens, N tokens of one image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tim_ds.compat.authors import config_from_authors
from tim_ds.errors import CheckpointError
from tim_ds.model.config import ModelConfig
from tim_ds.model.tim import TiM
from tim_ds.model.weights import load_weights_into, read_weights
from tim_ds.objective.config import TransportConfig
from tim_ds.packed import ClassCondition, Condition, Segments, TextCondition, patchify, unpatchify

KINDS = {
    "OT_FM": "ot_fm",
    "TrigFlow": "trigflow",
    "EDM": "edm",
    "VP_SDE": "vp",
    "VE_SDE": "ve",
    "OPT_1": "tim",
}
"""Transport kind by the authors' class name."""

_ARGUMENTS = {
    "sigma_d": "sigma_data",
    "P_mean": "p_mean",
    "P_std": "p_std",
    "beta_min": "beta_min",
    "beta_d": "beta_d",
    "sigma_min": "sigma_min",
    "sigma_max": "sigma_max",
}


@dataclass(frozen=True, eq=False)
class GoldenFile:
    """One `golden_<case>`: its description, its values and, for a network, its parameters."""

    path: Path
    """Of the JSON file."""
    description: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> GoldenFile:
        """Raises CheckpointError if a part of the case is missing or damaged."""
        stem = path.with_suffix("")
        weights_path = stem.with_name(stem.name + "_weights.safetensors")
        try:
            description = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        tensors = read_weights(stem.with_suffix(".safetensors"))
        weights = read_weights(weights_path) if "network" in description else {}
        return cls(path, description, tensors, weights)


def transport_config(entry: dict[str, Any]) -> TransportConfig:
    """Of one entry of a description's `transports`; arguments about guided targets are left out."""
    arguments = {_ARGUMENTS[name]: value for name, value in entry["ctor"].items() if name in _ARGUMENTS}
    return TransportConfig(kind=KINDS[entry["cls"]], **arguments)  # type: ignore[arg-type]  # KINDS holds kinds


class Layout:
    """Between the goldens' (B, C, H, W) and packed tokens."""

    def __init__(self, model: ModelConfig, height: int, width: int) -> None:
        self.model = model
        self.grid = (height // model.patch_size, width // model.patch_size)

    def segments(self, images: int) -> Segments:
        return Segments.from_grids([self.grid] * images)

    def pack(self, x_BCHW: Tensor) -> Tensor:
        return torch.cat([patchify(x, self.model.patch_size) for x in x_BCHW])

    def unpack(self, x_TC: Tensor) -> Tensor:
        parts = x_TC.split(self.grid[0] * self.grid[1])
        return torch.stack([unpatchify(part, self.grid, self.model.patch_size) for part in parts])

    def condition(self, y: Tensor) -> Condition:
        """(B, M, width) text states, all M of every image, or (B,) labels."""
        if self.model.condition == "class":
            return ClassCondition(y)
        return TextCondition(y.flatten(0, 1), Segments.from_lengths([y.shape[1]] * y.shape[0]))


def build_network(golden: GoldenFile) -> TiM:
    """The network of a case with its parameters, in float32."""
    model = config_from_authors(golden.description["kind"], golden.description["network"])
    network = TiM(model)
    load_weights_into(network, golden.weights, source=f"weights of {golden.path.name}")
    return network
