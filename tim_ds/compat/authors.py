"""The authors' released models: what they are, and how to tell which one a file holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from tim_ds.errors import CheckpointError, ConfigError
from tim_ds.model.config import ModelConfig
from tim_ds.objective.config import TransportConfig
from tim_ds.sampler.config import SamplerConfig

AUTHORS_SWITCHES: Mapping[str, str] = MappingProxyType(
    {
        "model.rope_layout": "reference",
        "sampler.cfg_upper": "exclusive",
        "sampler.schedule_dtype": "bfloat16",
        "text_encoder.padding": "constant",
    }
)
"""Every setting that repeats a habit of the authors' code on which weights or published numbers depend.

By dotted key of `export.json`. Importing released weights sets all of them; new trainings keep the defaults.
"""


def _switches(section: str) -> dict[str, Any]:
    prefix = f"{section}."
    return {k.removeprefix(prefix): v for k, v in AUTHORS_SWITCHES.items() if k.startswith(prefix)}


_SAMPLER = SamplerConfig(**_switches("sampler"))
_OT_FM = TransportConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleasedModel:
    """A model of the paper with everything that sampling it takes."""

    model: ModelConfig
    autoencoder: AutoencoderConfig
    text_encoder: TextEncoderConfig | None = None
    transport: TransportConfig = _OT_FM
    sampler: SamplerConfig = _SAMPLER


_DC_AE = AutoencoderConfig(kind="dc_ae", path="mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers")
_SD_VAE = AutoencoderConfig(kind="sd_vae", path="stabilityai/sd-vae-ft-ema")
_GEMMA = TextEncoderConfig(
    kind="gemma", path="google/gemma-3-1b-it", max_tokens=256, **_switches("text_encoder")
)


def _model(condition: Literal["text", "class"], **values: Any) -> ModelConfig:
    if condition == "class":
        values = {"num_classes": 1000, **values}
    return ModelConfig(condition=condition, z_dim=768, **values, **_switches("model"))


_XL: dict[str, Any] = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "adaln_hidden": 384}

RELEASED: Mapping[str, ReleasedModel] = MappingProxyType(
    {
        "t2i_xl": ReleasedModel(
            model=_model("text", in_channels=32, text_dim=1152, **_XL),
            autoencoder=_DC_AE,
            text_encoder=_GEMMA,
        ),
        "c2i_xl_256": ReleasedModel(
            model=_model("class", in_channels=4, patch_size=2, **_XL), autoencoder=_SD_VAE
        ),
        "c2i_xl_512": ReleasedModel(model=_model("class", in_channels=32, **_XL), autoencoder=_DC_AE),
        "c2i_b_p4": ReleasedModel(
            model=_model(
                "class",
                in_channels=4,
                patch_size=4,
                hidden_size=768,
                depth=12,
                num_heads=12,
                encoder_depth=4,
                adaln_hidden=256,
            ),
            autoencoder=_SD_VAE,
        ),
    }
)
"""By name. All were trained on the OT-FM path. Source: the authors' configuration files and model cards."""


_IGNORED = frozenset({"input_size", "use_checkpoint"})
"""Constructor arguments of the authors without numerical effect."""

_RENAMED = {
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "hidden_size": "hidden_size",
    "encoder_depth": "encoder_depth",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "z_dim": "z_dim",
    "projector_dim": "projector_dim",
    "new_condition": "time_condition",
    "use_new_embed": "separate_interval_embedder",
    "qk_norm": "qk_norm",
    "distance_aware": "distance_aware",
    "lora_hidden_size": "adaln_hidden",
}
_DEFAULTS: dict[str, Any] = {"use_new_embed": False, "distance_aware": False, "z_dim": 768}
"""Where the authors' default differs from that of ModelConfig."""


def config_from_authors(kind: Literal["t2i", "c2i"], arguments: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of the arguments that the authors' constructors take, with their rotary positions.

    Raises:
        ConfigError: for an argument that the authors' `kind` model does not have.
    """
    values = {**_DEFAULTS, **arguments}
    condition: dict[str, Any]
    if kind == "t2i":
        condition = {"condition": "text", "text_dim": values.pop("cap_feat_dim", 2048)}
    else:
        condition = {
            "condition": "class",
            "num_classes": values.pop("num_classes", 1000),
            "class_dropout": values.pop("class_dropout_prob", 0.1) > 0,
        }
    unknown = sorted(values.keys() - _RENAMED.keys() - _IGNORED)
    if unknown:
        raise ConfigError(f"the authors' {kind} model has no argument {', '.join(unknown)}")
    renamed = {_RENAMED[name]: value for name, value in values.items() if name in _RENAMED}
    return ModelConfig(**condition, **renamed, **_switches("model"))


def detect_model(state: Mapping[str, Tensor]) -> str:
    """Name of the released model whose shapes `state` has; it may lack the projector.

    Only what tells the models apart is looked at: a file that fits a name may still fail the strict check of
    all its keys, which says precisely what is wrong.

    Raises:
        CheckpointError: if none fits.
    """
    found = _fingerprint(state)
    for name, released in RELEASED.items():
        if _expected_fingerprint(released.model) == found:
            return name
    raise CheckpointError(
        f"none of the released models ({', '.join(RELEASED)}) has these weights: patch convolution "
        f"{found[0]}, {found[1]} blocks, condition table {found[2]}; "
        "name one with --model to see every difference"
    )


def released_config(name: str, state: Mapping[str, Tensor]) -> ModelConfig:
    """ModelConfig of the released model `name`, without a projector where `state` has none.

    Raises:
        CheckpointError: for another name.
    """
    if name not in RELEASED:
        raise CheckpointError(f"no released model {name!r}; known: {', '.join(RELEASED)}")
    model = RELEASED[name].model
    has_projector = any(key.startswith("projector.") for key in state)
    return model if has_projector else dataclasses.replace(model, z_dim=None)


_Fingerprint = tuple[list[int], int, list[int]]


def _fingerprint(state: Mapping[str, Tensor]) -> _Fingerprint:
    def shape(*names: str) -> list[int]:
        return next((list(state[name].shape) for name in names if name in state), [])

    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    table = shape("y_embedder.embedding_table.weight", "y_embedder.norm.weight")
    return shape("x_embedder.proj.weight"), len(blocks), table


def _expected_fingerprint(model: ModelConfig) -> _Fingerprint:
    p = model.patch_size
    if model.condition == "text":
        table = [model.text_dim or 0]
    else:
        table = [(model.num_classes or 0) + int(model.class_dropout), model.hidden_size]
    return [model.hidden_size, model.in_channels, p, p], model.depth, table
