"""Released models are told apart by their shapes, and the authors' constructor arguments are understood."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest

from tests.model.networks import text_config
from tim_ds.compat.authors import (
    AUTHORS_SWITCHES,
    RELEASED,
    config_from_authors,
    detect_model,
    released_config,
)
from tim_ds.errors import CheckpointError, ConfigError
from tim_ds.model.config import ModelConfig
from tim_ds.model.export_folder import meta_network
from tim_ds.sampler.config import SamplerConfig


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("with_projector", [True, False])
def test_released_model_is_told_from_its_shapes_with_or_without_projector(
    name: str, with_projector: bool
) -> None:
    state = meta_network(RELEASED[name].model).state_dict()
    if not with_projector:
        state = {k: v for k, v in state.items() if not k.startswith("projector.")}
    assert detect_model(state) == name
    config = released_config(name, state)
    assert set(meta_network(config).state_dict()) == set(state)
    assert config == dataclasses.replace(RELEASED[name].model, z_dim=768 if with_projector else None)


def test_other_weights_are_not_taken_for_a_released_model() -> None:
    with pytest.raises(CheckpointError, match=r"none of the released models .* 3 blocks"):
        detect_model(meta_network(text_config()).state_dict())


def test_unknown_released_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match="t2i_xl, c2i_xl_256, c2i_xl_512, c2i_b_p4"):
        released_config("t2i", {})


def test_every_switch_is_set_in_every_released_model_and_off_by_default() -> None:
    defaults = {"model": text_config(), "sampler": SamplerConfig()}
    for dotted, value in AUTHORS_SWITCHES.items():
        section, key = dotted.split(".")
        for released in RELEASED.values():
            part = getattr(released, section)
            assert part is None or getattr(part, key) == value
        if section in defaults:
            assert getattr(defaults[section], key) != value
    text_encoder = RELEASED["t2i_xl"].text_encoder
    assert text_encoder is not None and text_encoder.padding == "constant"


_COMMON: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 48,
    "encoder_depth": 1,
    "depth": 2,
    "num_heads": 4,
    "qk_norm": False,
}


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        (
            "c2i",
            {"input_size": 8, "class_dropout_prob": 0.0, "num_classes": 10, "use_checkpoint": True},
            {"condition": "class", "num_classes": 10, "class_dropout": False},
        ),
        ("c2i", {}, {"condition": "class", "num_classes": 1000, "class_dropout": True}),
        ("t2i", {}, {"condition": "text", "text_dim": 2048}),
        (
            "t2i",
            {
                "cap_feat_dim": 7,
                "new_condition": "r",
                "use_new_embed": True,
                "lora_hidden_size": 24,
                "z_dim": 5,
                "distance_aware": True,
            },
            {
                "condition": "text",
                "text_dim": 7,
                "time_condition": "r",
                "separate_interval_embedder": True,
                "adaln_hidden": 24,
                "z_dim": 5,
                "distance_aware": True,
            },
        ),
    ],
    ids=["class-without-null", "class-defaults", "text-defaults", "text-renamed"],
)
def test_authors_constructor_arguments_give_the_network_they_mean(
    kind: Literal["t2i", "c2i"], arguments: dict[str, Any], expected: dict[str, Any]
) -> None:
    common = {
        **_COMMON,
        "separate_interval_embedder": False,
        "distance_aware": False,
        "z_dim": 768,
        "rope_layout": "reference",
    }
    assert config_from_authors(kind, {**_COMMON, **arguments}) == ModelConfig(**{**common, **expected})


def test_an_argument_of_the_other_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="c2i model has no argument cap_feat_dim"):
        config_from_authors("c2i", {**_COMMON, "cap_feat_dim": 9})
