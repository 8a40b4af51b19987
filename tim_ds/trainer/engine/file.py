"""The rules of an engine file: what it may set, and what DeepSpeed is given of it and of the recipe."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from tim_ds.errors import ConfigError
from tim_ds.trainer.config import TrainConfig

# Top-level keys that an engine file may set. DeepSpeed ignores keys that it does not know, so the list is
# kept here; tests/trainer/test_engine_file.py compares it with the installed DeepSpeed.
ENGINE_KEYS = (
    "zero_optimization",
    "zero_force_ds_cpu_optimizer",
    "prescale_gradients",
    "gradient_predivide_factor",
    "disable_allgather",
    "disable_python_gc",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "timers",
    "log_level",
    "aio",
    "compile",
)

# What DeepSpeed reads within those that hold an object: as a model that checks itself, or as defaults beside
# which it ignores other keys.
_MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
    "timers.throughput": DeepSpeedThroughputTimerConfig,
}
_DEFAULTS: dict[str, Mapping[str, Any]] = {
    "flops_profiler": vars(DeepSpeedFlopsProfilerConfig({})),
    "aio": AIO_DEFAULT_DICT,
    "timers": {"throughput": {}},
}
# Keys that hold a number; the rest are switches or words.
_NUMBERS = ("steps_per_print", "gradient_predivide_factor")

# Keys that follow from the recipe, with the recipe's key.
RECIPE_KEYS = {
    "train_batch_size": "data.packs_per_step",
    "train_micro_batch_size_per_gpu": "data.tokens_per_pack",
    "gradient_accumulation_steps": "data.packs_per_step",
    "managed_gradient_accumulation": "data.packs_per_step",
    "gradient_clipping": "train.optimizer.grad_clip",
    "optimizer": "train.optimizer",
    "scheduler": "train.optimizer.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "zero_allow_untested_optimizer": "train.optimizer",
    "tensorboard": "train.log_every",
    "csv_monitor": "train.log_every",
    "wandb": "train.log_every",
    "checkpoint": "train.checkpoint",
    "activation_checkpointing": "train.activation_checkpointing",
}


def read_engine_file(path: str | Path) -> dict[str, Any]:
    """An engine configuration from JSON.

    Raises:
        ConfigError: if the file cannot be read, is not a JSON object, or gives a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError(f"{path}: {key}: given twice")
            seen[key] = value
        return seen

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise ConfigError(f"{path}: the engine file cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, received {type(content).__name__}")
    check_engine_config(content, str(path))
    return content


def check_engine_config(config: Mapping[str, Any], source: str) -> None:
    """Refuse keys that the recipe decides, that DeepSpeed would ignore, and values that ZeRO does not take.

    Raises:
        ConfigError: one line a problem.
    """
    problems = []
    for key in config:
        if key in RECIPE_KEYS:
            problems.append(f"{source}: {key}: follows from {RECIPE_KEYS[key]} in the recipe; remove it here")
        elif key not in ENGINE_KEYS:
            problems.append(f"{source}: {key}: unknown key{_nearest(key, (*ENGINE_KEYS, *RECIPE_KEYS))}")
    problems += [f"{source}: {problem}" for problem in _object_problems(config)]
    for key in _NUMBERS:
        value = config.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and value > 0):
            problems.append(f"{source}: {key}: expected a number above 0, received {value!r}")
    zero = config.get("zero_optimization", {})
    if isinstance(zero, dict):
        if zero.get("compute_grad_norm") is False:
            problems.append(
                f"{source}: zero_optimization.compute_grad_norm: expected true, because the guard against "
                "non-finite gradients reads the norm"
            )
        problems += [f"{source}: zero_optimization.{problem}" for problem in _partition_problems(zero)]
        if config.get("zero_force_ds_cpu_optimizer") and not offloads(config, "offload_optimizer"):
            problems.append(
                f"{source}: zero_force_ds_cpu_optimizer: chooses the optimiser of an offloaded step; set "
                "zero_optimization.offload_optimizer, or remove it"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _object_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong within the keys that hold an object: also what DeepSpeed would ignore."""
    for path in sorted({*_MODELS, *_DEFAULTS}):
        content: Any = config
        for part in path.split("."):
            content = content.get(part, {}) if isinstance(content, dict) else {}
        if not isinstance(content, dict):
            yield f"{path}: expected an object, received {content!r}"
        elif path in _MODELS:
            yield from _model_problems(path, _MODELS[path], content)
        else:
            yield from _default_problems(path, _DEFAULTS[path], content)


def _model_problems(path: str, model: type[BaseModel], content: dict[str, Any]) -> Iterator[str]:
    for key, value in content.items():
        if value == "auto":
            # DeepSpeed leaves such keys to the program that calls it.
            yield f"{path}.{key}: expected a value, received 'auto'; give one"
    try:
        model(**content)
    except ValidationError as error:
        known = [field.alias or name for name, field in model.model_fields.items()]
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            if detail["type"] == "extra_forbidden":
                yield f"{path}.{key}: unknown key{_nearest(key, known)}"
            else:
                yield f"{path}.{key}: {detail['msg']}, received {detail['input']!r}"


def _default_problems(path: str, defaults: Mapping[str, Any], content: dict[str, Any]) -> Iterator[str]:
    for key, value in content.items():
        if key not in defaults:
            yield f"{path}.{key}: unknown key{_nearest(key, list(defaults))}"
        elif not _is_like(value, defaults[key]):
            yield f"{path}.{key}: expected a value like the default {defaults[key]!r}, received {value!r}"


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a default. An object is looked at by itself."""
    if isinstance(default, dict):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, int | float):
        return isinstance(value, int if isinstance(default, int) else int | float)
    # None: the name of a file, which may be left out.
    return value is None or isinstance(value, str)


def _partition_problems(zero: Mapping[str, Any]) -> Iterator[str]:
    """What ZeRO would take and ignore, what changes the result, and what the trainer cannot follow."""
    stage = zero.get("stage", 0)
    for part, least in (("offload_optimizer", 1), ("offload_param", 3)):
        settings = zero.get(part)
        if not isinstance(settings, dict) or settings.get("device", "none") == "none":
            continue
        if settings["device"] == "nvme":
            yield (
                f"{part}.device: expected cpu or none, because the average of the weights reads the masters "
                "every step; received nvme"
            )
        if stage in range(least):
            yield f"{part}: expected stage {least} or more, because stage {stage} ignores it"
        if settings.get("ratio", 1.0) != 1.0:
            yield f"{part}.ratio: expected 1.0, because the optimiser states stand in one place"
        if settings.get("super_offload"):
            yield f"{part}.super_offload: expected false, because its optimiser keeps states of its own"
    size = zero.get("zero_hpz_partition_size", 1)
    if isinstance(size, int) and size > 1 and stage in range(3):
        yield f"zero_hpz_partition_size: expected stage 3, because stage {stage} ignores it"
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key):
            yield f"{key}: expected false, because rounding on the wire would change the result of the recipe"
    if zero.get("zenflow") is not None:
        yield "zenflow: expected none, because it applies parts of a gradient in later steps"


def offloads(config: Mapping[str, Any], part: str) -> bool:
    """Whether an engine configuration keeps `part` (offload_optimizer, offload_param) in host memory."""
    settings = config.get("zero_optimization", {})
    settings = settings.get(part) if isinstance(settings, Mapping) else None
    return isinstance(settings, Mapping) and settings.get("device", "none") != "none"


def _nearest(key: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def merge_config(
    engine: Mapping[str, Any], train: TrainConfig, *, packs_per_step: int, world_size: int
) -> dict[str, Any]:
    """The configuration that DeepSpeed is given: the engine file, and what the recipe decides.

    Raises:
        ConfigError: if the engine file is wrong, or recipe, ranks and ZeRO stage do not go together.
    """
    check_engine_config(engine, "engine file")
    stage = zero_stage(engine)
    if packs_per_step % world_size:
        raise ConfigError(
            f"data.packs_per_step: expected a multiple of the number of ranks {world_size}, "
            f"received {packs_per_step}"
        )
    if train.precision == "bf16" and stage == 0:
        raise ConfigError(
            "train.precision: 'bf16' keeps float32 masters, which ZeRO stage 0 does not; "
            "use stage 1 to 3, or 'bf16_autocast'"
        )
    nodes_of = int(engine.get("zero_optimization", {}).get("zero_hpz_partition_size", 1))
    if nodes_of > 1 and world_size % nodes_of:
        raise ConfigError(
            "zero_optimization.zero_hpz_partition_size: expected a divisor of the number of ranks "
            f"{world_size} (the GPUs of one node), received {nodes_of}"
        )
    config = {
        **engine,
        # One pack is one sample to DeepSpeed: it counts packs, the loss counts images.
        "train_batch_size": packs_per_step,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": packs_per_step // world_size,
        # At stage 0 `Engine.apply` needs the norm before DeepSpeed's step, and clips by it.
        "gradient_clipping": train.optimizer.grad_clip if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": engine.get("zero_force_ds_cpu_optimizer", False),
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    config.setdefault("steps_per_print", None)
    # DeepSpeed's own timer waits for the device twice a step.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    if train.precision == "bf16":
        config["bf16"] = {"enabled": True}
    elif train.precision == "bf16_autocast":
        # The empty list keeps parameters and gradients float32 on the wire as well.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def zero_stage(engine: Mapping[str, Any]) -> int:
    return int(engine.get("zero_optimization", {}).get("stage", 0))


def zero_settings(engine: Mapping[str, Any]) -> DeepSpeedZeroConfig:
    """ZeRO settings of an engine file, with DeepSpeed's defaults."""
    return DeepSpeedZeroConfig(**engine.get("zero_optimization", {}))
