from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.model.networks import class_config, text_config
from tim_ds.config.parameters import count_parameters
from tim_ds.model.config import ModelConfig
from tim_ds.model.tim import TiM

XL = ModelConfig(
    condition="text",
    in_channels=32,
    hidden_size=1152,
    depth=28,
    num_heads=16,
    adaln_hidden=384,
    text_dim=1152,
    z_dim=768,
)


@pytest.mark.parametrize(
    ("config", "total"),
    [
        (XL, 873_109_408),
        (replace(XL, z_dim=None), 864_978_080),
        (
            replace(XL, condition="class", text_dim=None, num_classes=1000, in_channels=4, patch_size=2),
            672_259_344,
        ),
        (replace(XL, condition="class", text_dim=None, num_classes=1000), 672_296_224),
    ],
    ids=["t2i_xl", "t2i_xl without projector", "c2i_xl_p2_256", "c2i_xl_p1_512"],
)
def test_count_equals_that_of_the_published_networks(config: ModelConfig, total: int):
    assert sum(count_parameters(config).values()) == total


@pytest.mark.parametrize(
    "config",
    [
        text_config(),
        text_config(z_dim=None, qk_norm=False, distance_aware=False),
        text_config(separate_interval_embedder=False, adaln_hidden=8, mlp_ratio=2.5),
        class_config(),
        class_config(class_dropout=False, patch_size=1),
    ],
)
def test_count_of_each_part_equals_that_of_the_network(config: ModelConfig):
    with torch.device("meta"):
        network = TiM(config)
    counted = {
        name: sum(parameter.numel() for parameter in child.parameters())
        for name, child in network.named_children()
    }
    assert count_parameters(config) == {name: count for name, count in counted.items() if count}
