"""Weight initialisation, in one place (as the authors' code has it).

The first value of a parameter is a function of the run's seed and of the parameter's name alone. It does not
depend on what was made before it, so any process can make any parameter, one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tim_ds.model.blocks import FinalLayer, TransitionBlock
from tim_ds.model.embed import CaptionEmbedder, LabelEmbedder, PatchProjection

SMALL_STD = 0.02

Rule = Callable[[Tensor, torch.Generator], object]
"""Fills a tensor."""


@torch.no_grad()
def initialise(network: nn.Module, seed: int) -> None:
    """Xavier everywhere, small normal for time and condition embedders, zero for identity blocks.

    At the first step F = 0 and every block is the identity. An interval embedder of its own
    stays Xavier, as the authors have it.
    """
    make = initial_values(network, seed)
    for name, parameter in network.named_parameters():
        parameter.copy_(make(name, parameter))


def initial_values(network: nn.Module, seed: int) -> Callable[[str, Tensor], Tensor]:
    """What makes the first value of a parameter of `network`, from its name and shape, on the CPU.

    The network may be on the meta device. A parameter that has no rule here (of another class of modules)
    has no value.
    """
    rules = _rules(network)

    def make(name: str, like: Tensor) -> Tensor:
        value = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        with torch.no_grad():
            rules[name](value, _generator(seed, name))
        return value

    return make


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _rules(network: nn.Module) -> dict[str, Rule]:
    rules: dict[str, Rule] = {}

    def set_layer(prefix: str, weight: Rule) -> None:
        rules[f"{prefix}weight"], rules[f"{prefix}bias"] = weight, _zeros

    def set_small(name: str, module: nn.Module) -> None:
        for inner, layer in module.named_modules(prefix=name):
            if isinstance(layer, nn.Linear):
                rules[f"{inner}.weight"] = _small

    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Linear):
            set_layer(prefix, _xavier)
        elif isinstance(module, nn.LayerNorm):
            set_layer(prefix, _ones)
        elif isinstance(module, PatchProjection):
            set_layer(prefix, _xavier_of_rows)
    for name, module in network.named_modules():
        if name == "t_embedder":
            set_small(name, module)
        elif isinstance(module, CaptionEmbedder):
            set_small(f"{name}.mlp", module.mlp)
        elif isinstance(module, LabelEmbedder):
            rules[f"{name}.embedding_table.weight"] = _small
        elif isinstance(module, TransitionBlock):
            set_layer(f"{name}.adaLN_modulation.fc2.", _zeros)
        elif isinstance(module, FinalLayer):
            set_layer(f"{name}.adaLN_modulation.fc2.", _zeros)
            set_layer(f"{name}.linear.", _zeros)
    return rules


def _xavier(value: Tensor, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(value, generator=generator)


def _xavier_of_rows(value: Tensor, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(value.view(value.shape[0], -1), generator=generator)


def _small(value: Tensor, generator: torch.Generator) -> None:
    nn.init.normal_(value, std=SMALL_STD, generator=generator)


def _zeros(value: Tensor, generator: torch.Generator) -> None:
    nn.init.zeros_(value)


def _ones(value: Tensor, generator: torch.Generator) -> None:
    nn.init.ones_(value)
