"""What recipe, engine file, shards and checkpoint must agree on, and what a continued run may change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.encoders.image import feature_width
from data_pipeline.index import Index
from tim_ds.config.recipe import Recipe, to_dict
from tim_ds.errors import CheckpointError, ConfigError
from tim_ds.trainer.checkpoint import Checkpoint
from tim_ds.trainer.engine import zero_stage

# Settings that a resumed run may change: they alter neither what is computed nor its order. (data.shards and
# data.index are places; the data themselves are compared by the hash of the index.)
MAY_CHANGE = (
    "name",
    "data.shards",
    "data.index",
    "data.workers",
    "data.autoencoder.path",
    "data.text_encoder.path",
    "data.image_encoder.path",
    "sampler",
    "train.init_from",
    "train.steps",
    "train.log_every",
    "train.peak_tflops",
    "train.max_skipped_steps",
    "train.activation_checkpointing",
    "train.checkpoint",
    "train.preview",
    "train.evaluation",
    "train.ema.snapshots",
)


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What a run needs to know of its shards besides their content."""

    folder: Path | str
    hash: str
    samples: int
    channels: int
    text_width: int
    """0 for class data."""
    num_classes: int
    """0 for text data."""

    @classmethod
    def of(cls, index: Index) -> DataFacts:
        return cls(index.folder, index.hash, len(index), index.channels, index.text_width, index.num_classes)

    @property
    def has_text(self) -> bool:
        return self.text_width > 0


def check_parts(recipe: Recipe, engine_config: Mapping[str, Any], data: DataFacts) -> None:
    """What recipe, engine file and shards must agree on before anything is built.

    Raises:
        ConfigError: one line a problem.
    """
    model = recipe.model
    problems = []
    if data.has_text != (model.condition == "text"):
        holds = "captions" if data.has_text else "class labels"
        problems.append(f"model.condition: {model.condition!r}, but the shards in {data.folder} hold {holds}")
    elif data.has_text and model.text_dim != data.text_width:
        problems.append(
            f"model.text_dim: {model.text_dim}, but the text states in {data.folder} have width "
            f"{data.text_width}"
        )
    elif not data.has_text and model.num_classes != data.num_classes:
        problems.append(
            f"model.num_classes: {model.num_classes}, but the shards in {data.folder} hold {data.num_classes}"
        )
    if model.in_channels != data.channels:
        problems.append(
            f"model.in_channels: {model.in_channels}, but the latents in {data.folder} have {data.channels}"
        )
    image_encoder = recipe.data.image_encoder
    if image_encoder is not None and (width := feature_width(image_encoder)) != model.z_dim:
        problems.append(
            f"model.z_dim: {model.z_dim}, but the features of data.image_encoder have width {width}"
        )
    if recipe.objective.derivative == "jvp" and zero_stage(engine_config) == 3:
        problems.append(
            "objective.derivative: 'jvp' cannot pass the hooks of ZeRO stage 3; use 'dde' or 'paired', "
            "or stage 0 to 2"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def check_same_run(checkpoint: Checkpoint, recipe: Recipe, data: DataFacts) -> None:
    """Refuse to continue a checkpoint of another model, objective, data or optimisation.

    Raises:
        CheckpointError: listing every setting that differs.
    """
    there, here = _flat(checkpoint.manifest["recipe"]), _flat(to_dict(recipe))
    if "train.ema_decay" in there:
        raise CheckpointError(
            f"{checkpoint.path}: written when a run kept one average (train.ema_decay); this version, with "
            "train.ema, does not continue it. Its exported weights load as ever; to train on, use the "
            f"version that wrote it (tim_ds {checkpoint.manifest['versions']['tim_ds']}), or another folder"
        )
    free = [*MAY_CHANGE]
    if recipe.train.optimizer.schedule != "constant":
        # The length of the run shapes the rate of every step.
        free.remove("train.steps")
    lines = [
        f"  {key}: {json.dumps(there.get(key))} in the checkpoint, {json.dumps(here.get(key))} now"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in free)
    ]
    stored_hash = checkpoint.manifest["data"]["index_hash"]
    if stored_hash != data.hash:
        lines.append(f"  data: index {stored_hash} in the checkpoint, {data.hash} now ({data.folder})")
    if lines:
        raise CheckpointError(
            f"{checkpoint.path}: not a checkpoint of this run. Another run may begin with its weights "
            f"(--run, train.init_from={checkpoint.path.parents[1]}); to continue this one, give back\n"
            + "\n".join(lines)
        )


def check_same_encoders(
    recorded: Mapping[str, Mapping[str, Any]], running: Mapping[str, Mapping[str, Any]], source: str
) -> None:
    """Refuse to continue with other weights in an encoder that runs while training.

    Raises:
        CheckpointError: listing the encoders whose revisions differ; one that is not known is not compared.
    """
    lines = [
        f"  data.{name}: {there} in the checkpoint, {here} now ({running[name].get('path')})"
        for name in sorted({*recorded} & {*running})
        if (there := recorded[name].get("revision")) != (here := running[name].get("revision"))
        and there is not None
        and here is not None
    ]
    if lines:
        raise CheckpointError(f"{source}: trained with other encoders\n" + "\n".join(lines))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
