"""Recipe: everything that decides a run, in one frozen dataclass, and the rules across its sections.

Rules within a section belong to the section's own `config.py`. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from data_pipeline.config import AutoencoderConfig, DataConfig, ImageEncoderConfig, TextEncoderConfig
from tim_ds.config.decode import decode
from tim_ds.config.node import from_python
from tim_ds.errors import ConfigError
from tim_ds.model.config import ModelConfig
from tim_ds.objective.config import ObjectiveConfig, TransportConfig
from tim_ds.sampler.config import SamplerConfig
from tim_ds.trainer.config import TrainConfig

# (channels of the latent, pixels a cell and side) of the autoencoders whose weights fix them.
_LATENT = {"dc_ae": (32, 32), "sd_vae": (4, 8)}

# What the sections hold when a key is left out, to tell a key that the chosen kind would ignore.
_PIXELS = AutoencoderConfig(kind="pixels")
_WORDS = TextEncoderConfig(kind="words")
_PATCHES = ImageEncoderConfig(kind="patches")
_OBJECTIVE = ObjectiveConfig()


def latent_channels(autoencoder: AutoencoderConfig) -> int:
    """Channels of the latent that an autoencoder makes."""
    if autoencoder.kind == "pixels":
        return autoencoder.channels * autoencoder.factor**2
    return _LATENT[autoencoder.kind][0]


def latent_stride(autoencoder: AutoencoderConfig) -> int:
    """Pixels a latent cell and side."""
    return autoencoder.factor if autoencoder.kind == "pixels" else _LATENT[autoencoder.kind][1]


def last_time(transport: TransportConfig) -> float:
    """T_max, the time of pure noise, of a transport."""
    return {"trigflow": 1.57, "edm": 80.0, "ve": transport.sigma_max}.get(transport.kind, 1.0)


def parse_size(size: str) -> tuple[int, int]:
    """`HEIGHTxWIDTH` in pixels to (height, width).

    Raises:
        ValueError: not two positive whole numbers with an x between them.
    """
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", size)
    if match is None:
        raise ValueError(f"expected HEIGHTxWIDTH in pixels such as 1024x768, received {size!r}")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run: what is trained, on what, how long, and how it is sampled."""

    name: str
    """Letters, digits, dots, dashes and underscores: it names folders."""
    model: ModelConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig
    train: TrainConfig
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the trained network is sampled unless a request says otherwise."""

    def __post_init__(self) -> None:
        problems = [
            *_name_problems(self),
            *_conditioning_problems(self),
            *_autoencoder_problems(self),
            *_objective_problems(self),
            *_image_encoder_problems(self),
            *_sampling_problems(self),
            *_preview_problems(self),
            *_schedule_problems(self),
        ]
        if problems:
            raise ConfigError("\n".join(problems))


def _name_problems(recipe: Recipe) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", recipe.name, re.ASCII):
        yield f"name: expected letters, digits, dots, dashes and underscores, received {recipe.name!r}"


def _conditioning_problems(recipe: Recipe) -> Iterator[str]:
    model, data, encoder = recipe.model, recipe.data, recipe.data.text_encoder
    if model.condition == "text":
        if encoder is None:
            yield "data.text_encoder: required when model.condition is 'text'"
        elif encoder.kind == "words" and encoder.width != model.text_dim:
            yield (
                f"model.text_dim: expected {encoder.width}, the width of data.text_encoder, "
                f"received {model.text_dim}"
            )
        if model.num_classes is not None:
            yield "model.num_classes: belongs to condition 'class'; remove it"
    else:
        if encoder is not None:
            yield "data.text_encoder: model.condition 'class' reads labels; remove it, or condition on text"
        if model.text_dim is not None:
            yield "model.text_dim: belongs to condition 'text'; remove it"
        if data.caption_dropout > 0 and not model.class_dropout:
            yield (
                f"model.class_dropout: expected true, because data.caption_dropout {data.caption_dropout} "
                "replaces labels by the null label"
            )
    if encoder is not None and encoder.kind == "words" and encoder.path is not None:
        yield "data.text_encoder.path: kind 'words' has no weights; remove it"
    if encoder is not None and encoder.kind != "words" and encoder.width != _WORDS.width:
        yield f"data.text_encoder.width: belongs to kind 'words', not to {encoder.kind}; remove it"
    if encoder is not None and encoder.kind != "gemma" and encoder.padding == "constant":
        yield f"data.text_encoder.padding: only gemma has the authors' padding state, not {encoder.kind}"


def _autoencoder_problems(recipe: Recipe) -> Iterator[str]:
    autoencoder = recipe.data.autoencoder
    channels = latent_channels(autoencoder)
    if recipe.model.in_channels != channels:
        yield (
            f"model.in_channels: expected {channels}, the channels of data.autoencoder ({autoencoder.kind}), "
            f"received {recipe.model.in_channels}"
        )
    if autoencoder.kind == "pixels" and autoencoder.path is not None:
        yield "data.autoencoder.path: kind 'pixels' has no weights; remove it"
    for key in ("factor", "channels"):
        if autoencoder.kind != "pixels" and getattr(autoencoder, key) != getattr(_PIXELS, key):
            yield f"data.autoencoder.{key}: belongs to kind 'pixels', not to {autoencoder.kind}; remove it"


def _objective_problems(recipe: Recipe) -> Iterator[str]:
    objective, transport = recipe.objective, recipe.objective.transport
    end = last_time(transport)
    if objective.derivative != "dde" and objective.derivative_step is not None:
        yield (
            f"objective.derivative_step: belongs to derivative 'dde'; '{objective.derivative}' has no step; "
            "remove it"
        )
    if objective.repa_weight > 0:
        if recipe.model.z_dim is None:
            yield "model.z_dim: required when objective.repa_weight is above 0 (width of the features)"
        if recipe.data.image_encoder is None:
            yield (
                "data.image_encoder: required when objective.repa_weight is above 0: it makes the features "
                "that the network's are aligned with"
            )
    # The default is what a recipe that leaves the key out has.
    if objective.diffusion_share == 1.0 and objective.consistency_share not in (
        0.0,
        _OBJECTIVE.consistency_share,
    ):
        yield (
            "objective.consistency_share: diffusion_share 1 leaves no image for it; set it to 0, "
            f"received {objective.consistency_share:g}"
        )
    weight = objective.weight
    if weight.time_type == "constant" and (weight.warp == "odds" or not weight.of_interval):
        yield (
            "objective.weight.time_type: 'constant' reads neither warp nor of_interval; remove them, or "
            "choose a weight of the times"
        )
    step = objective.derivative_step
    if step is not None and step > end / 10:
        yield (
            f"objective.derivative_step: expected at most {end / 10:g}, a tenth of the times of "
            f"{transport.kind}: a difference that wide is no derivative; received {step:g}"
        )
    guided = objective.guided_target
    if guided is not None:
        if not 0.0 <= guided.start <= end:
            yield (
                f"objective.guided_target.start: expected a time of {transport.kind}, 0 to {end:g}, "
                f"received {guided.start:g}"
            )
        if guided.end > end:
            yield (
                f"objective.guided_target.end: expected a time of {transport.kind}, at most {end:g}, "
                f"received {guided.end:g}"
            )
        if recipe.data.caption_dropout == 0 and not math.isclose(guided.w_gt + guided.w_cond, 1.0):
            yield (
                "data.caption_dropout: expected above 0, because objective.guided_target reads the network "
                "without its condition, which nothing else trains"
            )


def _image_encoder_problems(recipe: Recipe) -> Iterator[str]:
    encoder, z_dim = recipe.data.image_encoder, recipe.model.z_dim
    if encoder is None:
        return
    if recipe.objective.repa_weight == 0:
        yield "data.image_encoder: objective.repa_weight is 0, so nothing reads its features; remove it"
    if encoder.kind == "patches" and z_dim is not None and z_dim != encoder.width:
        yield f"model.z_dim: expected {encoder.width}, the width of data.image_encoder, received {z_dim}"
    if encoder.kind != "patches" and encoder.width != _PATCHES.width:
        yield f"data.image_encoder.width: belongs to kind 'patches', not to {encoder.kind}; remove it"
    if encoder.kind == "patches" and encoder.dtype != _PATCHES.dtype:
        yield "data.image_encoder.dtype: kind 'patches' has no weights; remove it"


def _sampling_problems(recipe: Recipe) -> Iterator[str]:
    kind, sampler = recipe.objective.transport.kind, recipe.sampler
    if sampler.cfg_scale != 1.0 and recipe.data.caption_dropout == 0:
        yield (
            "sampler.cfg_scale: guidance needs the network without its condition, which "
            f"data.caption_dropout 0 never trains; set it to 1, received {sampler.cfg_scale:g}"
        )
    if sampler.stochasticity > 0 and kind not in ("ot_fm", "tim"):
        yield f"sampler.stochasticity: defined for ot_fm and tim, not for {kind}; set it to 0"
    if sampler.mode == "transition" and recipe.objective.diffusion_share == 1.0:
        yield (
            "sampler.mode: objective.diffusion_share 1 never shows the network a step from t to r < t; "
            "use 'diffusion'"
        )


def _preview_problems(recipe: Recipe) -> Iterator[str]:
    preview, model = recipe.train.preview, recipe.model
    unit = latent_stride(recipe.data.autoencoder) * model.patch_size
    for i, size in enumerate(preview.sizes):
        try:
            height, width = parse_size(size)
        except ValueError as error:
            yield f"train.preview.sizes[{i}]: {error}"
            continue
        if height % unit or width % unit:
            yield (
                f"train.preview.sizes[{i}]: expected multiples of {unit} pixels "
                f"(autoencoder {unit // model.patch_size} x patch {model.patch_size}), received {size}"
            )
    if model.condition == "class" and model.num_classes is not None:
        for i, prompt in enumerate(preview.prompts):
            if not (prompt.isascii() and prompt.isdigit() and int(prompt) < model.num_classes):
                yield (
                    f"train.preview.prompts[{i}]: expected a class label, 0 to {model.num_classes - 1}, "
                    f"received {prompt!r}"
                )
    if preview.every_steps > 0 and not preview.prompts:
        yield "train.preview.prompts: required when train.preview.every_steps is above 0"
    for i, num_steps in enumerate(preview.num_steps):
        if num_steps < 1:
            yield f"train.preview.num_steps[{i}]: expected at least 1, received {num_steps}"


def _schedule_problems(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    if train.adapter is not None:
        if recipe.objective.repa_weight > 0:
            yield (
                "objective.repa_weight: aligns the network through its projector, which train.adapter "
                f"freezes; set it to 0, received {recipe.objective.repa_weight:g}"
            )
        if recipe.model.z_dim is not None:
            yield "model.z_dim: nothing trains the projector with train.adapter; set it to null"
        if recipe.model.condition == "class":
            for target in train.adapter.targets:
                if target.startswith("cross_attn"):
                    yield f"train.adapter.targets: a network of condition 'class' has no {target}; remove it"
    if train.optimizer.warmup_steps > train.steps:
        yield (
            f"train.optimizer.warmup_steps: expected at most train.steps {train.steps}, "
            f"received {train.optimizer.warmup_steps}"
        )
    for i, step in enumerate(train.checkpoint.milestones):
        if not 1 <= step <= train.steps:
            yield (
                f"train.checkpoint.milestones[{i}]: expected 1 to train.steps {train.steps}, received {step}"
            )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe, defaults included, as plain values that JSON can hold."""
    return _plain(recipe)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]  # pyright: ignore[reportUnknownVariableType]  # entries of any type
    return value


def from_dict(values: dict[str, Any], *, source: str = "") -> Recipe:
    """The recipe that `to_dict` wrote, with every check repeated.

    Raises:
        ConfigError: as for a file; `source` (such as a checkpoint's path) is named in the messages.
    """
    return decode(Recipe, from_python(values, source), name=source or "recipe")


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe in hexadecimal; spelling, order and comments do not enter it."""
    # Once through the decoder, so that a 1 written in Python for a float hashes like the 1.0 of a file.
    values = to_dict(from_dict(to_dict(recipe)))
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
