"""Small recipes of both kinds, and work for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tim_ds.config.load import load_recipe
from tim_ds.config.recipe import Recipe
from tim_ds.trainer.bench.work import Sides, Work, draw_work

RECIPES = Path(__file__).parents[3] / "launch" / "recipes"
SMALL = (
    "model.hidden_size=32",
    "model.depth=3",
    "model.num_heads=2",
    "model.adaln_hidden=12",
    "model.encoder_depth=2",
    "data.tokens_per_pack=64",
    "train.precision=fp32",
    "train.activation_checkpointing=false",
)
TEXT = (RECIPES / "t2i_xl.yaml", ("model.text_dim=12",))
CLASSES = (RECIPES / "c2i_xl_256.yaml", ("model.z_dim=6", "model.projector_dim=10"))


def recipe(kind: tuple[Path, tuple[str, ...]] = TEXT, *overrides: str) -> Recipe:
    path, own = kind
    given = {word.partition("=")[0] for word in overrides}
    kept = [word for word in (*SMALL, *own) if word.partition("=")[0] not in given]
    return load_recipe(path, [*kept, *overrides])


def work(
    settings: Recipe, images: Sequence[tuple[Sides, int]] = (((64, 96), 4), ((64, 64), 4)), seed: int = 0
) -> Work:
    """Of sizes in pixels, which are whole tokens of both recipes."""
    return draw_work(settings, images, text_tokens=5, device=torch.device("cpu"), seed=seed)
