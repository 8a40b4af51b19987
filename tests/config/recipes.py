"""A complete small recipe, and a way to change it, for tests of the configuration."""

from __future__ import annotations

from tim_ds.config.load import parse_recipe
from tim_ds.config.recipe import Recipe

TEXT = """\
name: small
model:
  condition: text
  in_channels: 4
  hidden_size: 32
  depth: 2
  num_heads: 2
  text_dim: 16
  z_dim: null
data:
  shards: shards
  tokens_per_pack: 64
  packs_per_step: 2
  autoencoder: {kind: pixels, factor: 2, channels: 1}
  text_encoder: {kind: words, width: 16}
train:
  steps: 10
"""

CLASSES = ("model.condition=class", "model.text_dim=null", "model.num_classes=10", "data.text_encoder=null")
"""Overrides that make the recipe class-conditional."""


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, overrides, source="small.yaml")


def class_recipe(*overrides: str) -> Recipe:
    return recipe(*CLASSES, *overrides)
