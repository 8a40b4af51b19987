"""Low-rank adapters (LoRA) on the blocks' matrices, through peft: what trains, and how it is handed on.

peft is imported here alone, when a recipe has `train.adapter`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tim_ds.errors import ConfigError
from tim_ds.model.config import ModelConfig
from tim_ds.model.embed import Linear
from tim_ds.model.export_folder import meta_network
from tim_ds.model.weights import write_aside, write_weights
from tim_ds.trainer.config import AdapterConfig
from tim_ds.trainer.materialise import Values

ADAPTER = "default"
"""peft's name of the one adapter."""

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# peft writes the names of the model that it wraps, which calls the network base_model.model.
_PREFIX = "base_model.model."


def _peft() -> Any:
    try:
        import peft
        import peft.tuners.lora
    except ImportError as error:
        raise ConfigError(
            "train.adapter: needs the package peft; install it with `pip install tim-ds[lora]`"
        ) from error
    return peft


@cache
def _carrying_layer() -> type[nn.Module]:
    """peft's layer around our `Linear`, which hands the tangent of `derivative: paired` through as well."""
    base: Any = _peft().tuners.lora.Linear

    class CarryingLoraLinear(base):
        def forward(self, x: Tensor, side: Any = None, again: Any = None) -> Tensor:
            # `again` would save keeping x, which the adapter's own product keeps.
            tangent = None if side is None else side.value
            result = self.base_layer(x, side)
            inward, outward = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
            scaling = self.scaling[ADAPTER]
            if side is not None and tangent is not None:
                with torch.no_grad():
                    added = outward(inward(tangent.to(inward.weight.dtype))) * scaling
                    side.value = side.value + added.to(side.value.dtype)
            return result + (outward(inward(x.to(inward.weight.dtype))) * scaling).to(result.dtype)

    return CarryingLoraLinear


def adapter_config(config: AdapterConfig) -> Any:
    """peft's own description of the adapters: matrices of the blocks, not those of the embedders."""
    names = "|".join(name.replace(".", r"\.") for name in config.targets)
    return _peft().LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=rf"(?:.*\.)?blocks\.\d+\.(?:{names})",
        lora_dropout=0.0,
        bias="none",
    )


def add_adapters(network: nn.Module, config: AdapterConfig) -> None:
    """Put an adapter on every target and freeze everything else. The network computes what it did before.

    Raises:
        ConfigError: if peft is missing, or a target is not in this network.
    """
    description = adapter_config(config)
    description._register_custom_module({Linear: _carrying_layer()})
    modules = dict(network.named_modules())
    for target in config.targets:
        if f"blocks.0.{target}" not in modules:
            raise ConfigError(
                f"train.adapter.targets: {target!r} is not in the blocks of this network; remove it (a "
                "class-conditional network has no cross-attention)"
            )
    _peft().inject_adapter_in_model(description, network, adapter_name=ADAPTER)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    # Under ZeRO-3 a block is gathered as one piece, whose gradients are collected when the gradient of its
    # input is known: with frozen embedders the first block's input would have none.
    network.get_submodule("x_embedder").register_forward_hook(_with_gradient)


def adapter_values(values: Values, seed: int) -> Values:
    """First values of a network with adapters: uniform inwards, zero outwards, the rest from `values`.

    Args:
        values: by the names of the network without adapters.
    """

    def value(name: str, like: Tensor) -> Tensor:
        if ".lora_B." in name:
            return torch.zeros(like.shape, dtype=like.dtype)
        if ".lora_A." in name:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            bound = like.shape[1] ** -0.5
            return torch.empty(like.shape, dtype=like.dtype).uniform_(-bound, bound, generator=generator)
        return values(name.replace(".base_layer.", "."), like)

    return value


def _with_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def meta_adapter(model: ModelConfig, config: AdapterConfig) -> dict[str, Tensor]:
    """What is trained, without storage, by the names in the network with adapters."""
    network = meta_network(model)
    with torch.device("meta"):
        add_adapters(network, config)
    return {name: value for name, value in network.named_parameters() if ".lora_" in name}


def merged(base: Values, adapter: Mapping[str, Tensor], config: AdapterConfig) -> Values:
    """Weights of the plain network that computes what base and adapter compute together, one at a time.

    Args:
        base: by the names of the plain network.
        adapter: trained tensors, by their names in the network with adapters.
    """

    def value(name: str, like: Tensor) -> Tensor:
        weight = base(name, like)
        module, _, kind = name.rpartition(".")
        A = adapter.get(f"{module}.lora_A.{ADAPTER}.weight") if kind == "weight" else None
        if A is None:
            return weight
        B = adapter[f"{module}.lora_B.{ADAPTER}.weight"]
        weight = weight.float()
        return weight + (B.double() @ A.double()).to(weight.dtype) * (config.alpha / config.rank)

    return value


def write_adapter(folder: Path, adapter: Mapping[str, Tensor], config: AdapterConfig, base: str) -> None:
    """Write the adapter in peft's format: `PeftModel.from_pretrained(network, folder)` loads it.

    Raises:
        CheckpointError: if it cannot be written.
    """
    tensors = {_PREFIX + name.replace(f".{ADAPTER}.", "."): value for name, value in adapter.items()}
    write_weights(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    description = adapter_config(config)
    description.base_model_name_or_path = base
    description.inference_mode = True
    values = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in description.to_dict().items()
    }
    text = json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"
    write_aside(folder / CONFIG_FILE, len(text), lambda aside: aside.write_text(text))
