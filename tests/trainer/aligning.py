"""Runs with feature alignment, whose frozen extractor is watched."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.encoders.image import PretrainedFeatures

TRAIN = Path(__file__).parents[2] / "launch" / "train.py"


def train_watched(*arguments: str) -> dict[str, Any]:
    """launch/train.py, and what became of the extractor that it built."""
    made: list[PretrainedFeatures] = []
    tokens, with_gradient = [], []
    plain_init, plain_features = PretrainedFeatures.__init__, PretrainedFeatures.features

    def init(self: PretrainedFeatures, model: Any, *, normalise: bool) -> None:
        plain_init(self, model, normalise=normalise)
        made.append(self)

    def features(self: PretrainedFeatures, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        found = plain_features(self, pixels, grid)
        tokens.append(found.shape[0] * found.shape[1])
        with_gradient.append(found.requires_grad)
        return found

    PretrainedFeatures.__init__, PretrainedFeatures.features = init, features
    sys.argv = [str(TRAIN), *arguments]
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
        code = None
    except SystemExit as ended:
        code = ended.code
    (encoder,) = made
    parameters = dict(encoder.model.named_parameters())
    return {
        "code": code,
        "tokens": sum(tokens),
        "with_gradient": any(with_gradient) or any(p.requires_grad for p in parameters.values()),
        "gradients": [name for name, p in parameters.items() if p.grad is not None],
        "state": {name: p.detach().clone() for name, p in parameters.items()},
        "dtype": {p.dtype for p in parameters.values()} == {torch.float32},
    }
