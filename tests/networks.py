"""Small networks with random weights, and export folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from tim_ds.model.config import ModelConfig
from tim_ds.model.export_folder import Export, SourceConfig, write_export
from tim_ds.model.tim import TiM
from tim_ds.objective.config import TransportConfig
from tim_ds.sampler.config import SamplerConfig

TEXT_WIDTH = 16


def export_of(
    *,
    name: str = "tiny",
    condition: Literal["text", "class"] = "text",
    patch_size: int = 1,
    factor: int = 4,
    channels: int = 1,
    class_dropout: bool = True,
    mode: Literal["transition", "diffusion"] = "transition",
    num_steps: int = 2,
) -> Export:
    """A grey (or colour) network of a few thousand parameters on `pixels` latents."""
    is_text = condition == "text"
    return Export(
        model=ModelConfig(
            condition=condition,
            in_channels=channels * factor**2,
            patch_size=patch_size,
            hidden_size=16,
            depth=2,
            num_heads=2,
            text_dim=TEXT_WIDTH if is_text else None,
            num_classes=None if is_text else 5,
            class_dropout=class_dropout,
            z_dim=None,
        ),
        transport=TransportConfig(kind="ot_fm"),
        sampler=SamplerConfig(num_steps=num_steps, mode=mode),
        autoencoder=AutoencoderConfig(kind="pixels", factor=factor, channels=channels),
        text_encoder=TextEncoderConfig(kind="words", width=TEXT_WIDTH) if is_text else None,
        step=7,
        source=SourceConfig(kind="run", name=name, recipe_sha256="f" * 64),
    )


def network_of(export: Export, *, seed: int = 0) -> TiM:
    """Random weights of which none is zero, so that prompt, size and time all matter."""
    torch.manual_seed(seed)
    network = TiM(export.model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return network.eval()


def write_tiny_export(folder: Path, export: Export | None = None, *, seed: int = 0) -> Path:
    export = export or export_of()
    write_export(folder, export, network_of(export, seed=seed).state_dict())
    return folder
