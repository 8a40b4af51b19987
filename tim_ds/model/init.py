"""Weight initialisation, in one place (as the authors' code has it)."""

from __future__ import annotations

import torch
from torch import nn

from tim_ds.model.blocks import FinalLayer, TransitionBlock
from tim_ds.model.embed import CaptionEmbedder, LabelEmbedder, PatchProjection

SMALL_STD = 0.02


@torch.no_grad()
def initialise(network: nn.Module) -> None:
    """Xavier everywhere, small normal for time and condition embedders, zero for identity blocks.

    At the first step F = 0 and every block is the identity. An interval embedder of its own
    stays Xavier, as the authors have it.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, PatchProjection):
            nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            nn.init.zeros_(module.bias)
    for name, module in network.named_modules():
        if name == "t_embedder":
            _small(module)
        elif isinstance(module, CaptionEmbedder):
            _small(module.mlp)
        elif isinstance(module, LabelEmbedder):
            nn.init.normal_(module.embedding_table.weight, std=SMALL_STD)
        elif isinstance(module, TransitionBlock):
            _zero(module.adaLN_modulation.fc2)
        elif isinstance(module, FinalLayer):
            _zero(module.adaLN_modulation.fc2)
            _zero(module.linear)


def _small(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=SMALL_STD)


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
