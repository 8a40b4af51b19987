"""DeepSpeed, behind one seam: the only file that imports it.

What the rest of the trainer sees: start and stop of the process group, the merged engine configuration, and
an `Engine` that runs micro-steps, applies optimiser steps under a guard against non-finite gradients, and
shows the float32 state as `Shard`s, the same at every ZeRO stage.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    # Read when deepspeed is imported; without it a search for devices is made and its failure reported.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.comm.comm
import deepspeed.ops
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import groups
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from pydantic import BaseModel, ValidationError

from tim_ds.errors import ConfigError
from tim_ds.trainer.config import OptimizerConfig, TrainConfig
from tim_ds.trainer.meeting import START_WITHIN_S, connect, meet
from tim_ds.trainer.watch import HUNG_AFTER_S, Watch
from tim_ds.trainer.world import World

TIMEOUT_MARGIN_S = 120.0
"""By which the collectives wait longer than the watch, so that who is missing is named before one fails."""
TIMEOUT_S = HUNG_AFTER_S + TIMEOUT_MARGIN_S
"""How long a collective waits for the other ranks, where nothing else is said."""

STATE_KEYS = ("exp_avg", "exp_avg_sq")
"""Tensors that AdamW keeps for every parameter."""

GATHER_ELEMENTS = 1 << 25
"""The most that are gathered at a time when full tensors are put together from shards (128 MiB), unless one
parameter has more; less where the largest unit of the network has less."""

# Top-level keys that an engine file may set. DeepSpeed ignores keys that it does not know, so the list is
# kept here; tests/trainer/test_engine_config.py compares it with the installed DeepSpeed.
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


_COUNTS_OF_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""How srun and the kinds of mpirun tell a process how many were started with it; none of them sets RANK."""


class StepResult(NamedTuple):
    applied: bool
    """Whether the optimiser moved the weights; the same on every rank."""
    grad_norm: float | Tensor
    """Global norm before clipping; infinite or NaN where the step was refused."""


@dataclass(frozen=True, eq=False)
class Shard:
    """The piece of one trained parameter whose float32 master this rank updates: n elements from `start` on.

    At stage 0 every rank holds every parameter whole; from stage 1 on the pieces of all ranks cover a
    parameter once. `master` is a flat view of what the optimiser writes: it is up to date after every step.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    master: Tensor
    owner: Tensor
    """The (flat) tensor that the optimiser knows."""
    owner_start: int
    """Where the piece begins in the owner."""

    @property
    def numel(self) -> int:
        return self.master.numel()


def start_world(
    timeout_s: float = TIMEOUT_S, start_within_s: float = START_WITHIN_S, watch: Watch | None = None
) -> World:
    """Join the process group of the launcher, or be a group of one without a launcher.

    Args:
        timeout_s: how long a collective waits for the other ranks before it fails.
        start_within_s: how long the first rank waits for the last one.
        watch: begun as soon as this rank can be heard by the others.
    Raises:
        ConfigError: processes were started together, but nothing says which rank each is.
        RankAbsentError: if a rank did not start.
    """
    if "RANK" not in os.environ:
        _refuse_tasks()
        # No launcher. DeepSpeed would look for MPI. Port 0: whichever is free when the one rank listens.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed_logger.addFilter(_is_news)
    # Older names of collectives, which DeepSpeed calls: a line a call.
    deprecated = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    _leave_out_shm_op()
    accelerator: Any = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    connection = connect(start_within_s)
    if connection is not None:
        if watch is not None:
            watch.start(connection)
        meet(connection, start_within_s)
    if watch is not None:
        watch.enter("process group")
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name(),
        timeout=timedelta(seconds=timeout_s),
        verbose=False,
    )
    del connection
    device = torch.device(accelerator.current_device_name())
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Every rank would take all cores, and they would wait for each other.
        on_host = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_host))
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
    if watch is not None:
        watch.world = world
    return world


def _refuse_tasks() -> None:
    for name in _COUNTS_OF_TASKS:
        count = os.environ.get(name, "1")
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{name} says that {count} processes were started together, but RANK is not set, so that "
                "each would be a run of its own. Start them in a way of launch/README.md (under Slurm: "
                "launch/slurm/train.sbatch), or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
                "MASTER_PORT for each"
            )


def stop_world(world: World, *, failed: bool = False) -> None:
    """Leave the process group. Ranks that end well wait for each other: a group torn down while a peer
    still uses it can abort that peer."""
    if not torch.distributed.is_initialized():
        return
    if not failed or world.shared_error is not None:
        world.barrier()
    torch.distributed.destroy_process_group()


@contextmanager
def collectives_through(wrap: Callable[[Any], Any]) -> Iterator[None]:
    """What DeepSpeed sends goes through `wrap(backend)` meanwhile, an object with the backend's methods."""
    home: Any = deepspeed.comm.comm
    backend = home.cdb
    home.cdb = wrap(backend)
    try:
        yield
    finally:
        home.cdb = backend


def _leave_out_shm_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective for CPUs when the process group starts.

    It would need ninja, a C++ compiler and a minute, and is used for inference only. The table is otherwise
    filled on first use by trying to compile every operation that DeepSpeed has; nothing else reads it.
    """
    operations: Any = deepspeed.ops
    operations.__compatible_ops__ = {"deepspeed_shm_comm": False}


def _is_news(record: logging.LogRecord) -> bool:
    """Drops two warnings. One, about the hooks of ZeRO-3, does not apply: blocks take and give plain tensors
    besides their context, and tests compare the stages. One, about skipped steps, the loop says better."""
    message = record.getMessage()
    return "unknown inputs or outputs type" not in message and "OVERFLOW! Skipping step" not in message


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


class Splitter:
    """Splits parameters among the ranks as ZeRO-3 does, before there is an `Engine`.

    Args:
        config: of `merge_config`, at stage 3.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self._first: Any = None

    def __call__(self, parameter: nn.Parameter) -> None:
        if self._first is not None:
            self._first.convert_to_zero_parameters(param_list=[parameter])
            return
        holder = nn.Module()
        holder.parameter = parameter
        by_node = zero_settings(self._config).zero_hpz_partition_size > 1
        # Given a module that exists, this is no context: it splits the parameters of the module. The group of
        # the ranks of a node can be made once in a process.
        deepspeed.zero.Init(
            module=holder,
            config_dict_or_path=self._config,
            dtype=parameter.dtype,
            zero_param_parallel_group=groups._get_zero_param_intra_parallel_group() if by_node else None,
        )
        self._first = parameter


class Engine:
    """A root module under DeepSpeed.

    Args:
        module: the root module; its parameters that require a gradient are trained.
        engine: content of an engine file.
        train: decides precision, clipping and optimiser.
        packs_per_step: micro-steps of an optimiser step over all ranks.
        world: from `start_world`.
        units: module classes that ZeRO-3 gathers and releases as one piece.
    """

    def __init__(
        self,
        module: nn.Module,
        engine: Mapping[str, Any],
        train: TrainConfig,
        *,
        packs_per_step: int,
        world: World,
        units: Sequence[type[nn.Module]] = (),
    ) -> None:
        self.config = merge_config(engine, train, packs_per_step=packs_per_step, world_size=world.size)
        self.world = world
        self.zero_stage = zero_stage(engine)
        self._grad_clip = train.optimizer.grad_clip
        if self.zero_stage == 3 and units:
            present = [unit for unit in units if any(isinstance(m, unit) for m in module.modules())]
            deepspeed.utils.set_z3_leaf_modules(module, present)
        optimizer = _adamw(module, train.optimizer, by_deepspeed=self.config["zero_force_ds_cpu_optimizer"])
        # DeepSpeed builds what it returns at run time: its types say little.
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.config
        )
        # The optimiser that the caller built, beneath the one that ZeRO puts around it.
        self._inner: torch.optim.Optimizer = getattr(self._optimizer, "optimizer", self._optimizer)
        self._trainable = {
            name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
        }
        self.shards = tuple(self._make_shards())
        self._gathered_at_once = max(
            min(GATHER_ELEMENTS, _largest_unit(module, units)), *map(_numel, self._trainable.values())
        )

    @property
    def module(self) -> nn.Module:
        """The root module."""
        return self._engine.module

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shape of every trained parameter, by name."""
        return {name: _full_shape(parameter) for name, parameter in self._trainable.items()}

    def forward(self, inputs: Any) -> Any:
        return self._engine(inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of one micro-step; `last` reduces it over the ranks.

        Gradients are averaged over ranks and summed over micro-steps: the loss carries the scale of its step.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        # Multiplying by one makes a tensor of its own: at stage 0 DeepSpeed divides the gradient of a
        # forward's own output by the number of micro-steps (measured with 0.19.8), whatever scale_wrt_gas
        # says.
        self._engine.backward(loss * 1.0, scale_wrt_gas=False)

    def apply(self, lr: float) -> StepResult:
        """Clip and take the optimiser step, or refuse it on every rank if the gradient is not finite."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        if self.zero_stage == 0:
            return self._apply_unsharded()
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        assert norm is not None  # check_engine_config keeps the norm switched on
        return StepResult(self._engine.was_step_applied(), norm)

    def _apply_unsharded(self) -> StepResult:
        """Stage 0, where DeepSpeed clips and steps without looking at the norm."""
        gradients = [p.grad for p in self._trainable.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(norm.isfinite()):
            self._engine.zero_grad()
            return StepResult(False, norm)
        if self._grad_clip > 0:
            # ZeRO's formula, so that every stage takes the same step.
            scale = 1.0 / ((norm + 1e-6) / self._grad_clip).clamp(min=1.0)
            for gradient in gradients:
                gradient.mul_(scale)
        self._engine.step()
        return StepResult(True, norm)

    def optimizer_state(self, shard: Shard) -> dict[str, Tensor]:
        """The optimiser's tensors of a shard, as flat views; created (zero) if no step was taken yet."""
        state = self._owner_state(shard.owner)
        return {key: state[key].view(-1).narrow(0, shard.owner_start, shard.numel) for key in STATE_KEYS}

    @property
    def optimizer_steps(self) -> int:
        """Steps behind AdamW's bias correction."""
        return int(self._owner_state(self.shards[0].owner)["step"]) if self.shards else 0

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for shard in self.shards:
            state = self._owner_state(shard.owner)
            # DeepSpeed's AdamW counts in a plain number.
            state["step"] = steps if isinstance(state["step"], int) else state["step"].fill_(steps)

    def _owner_state(self, owner: Tensor) -> dict[str, Any]:
        state = self._inner.state[owner]
        if not state:
            of_torch = isinstance(self._inner, torch.optim.AdamW)
            state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device) if of_torch else 0
            for key in STATE_KEYS:
                state[key] = torch.zeros_like(owner)
        return state

    def publish(self) -> None:
        """Make the weights of the module follow the masters, after the masters were written from outside."""
        if self.zero_stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.zero_stage == 3:
            self.write({shard.name: shard.master for shard in self.shards}, self._trainable)

    @contextmanager
    def weights(self, values: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The root module with other weights, one flat tensor a shard; restored to the bit at the end.

        All ranks enter and leave together.
        """
        kept = {}
        if self.zero_stage == 0:
            kept = {shard.name: shard.master.clone() for shard in self.shards}
        try:
            self.write(values, self._trainable)
            yield self.module
        finally:
            if self.zero_stage == 0:
                self.write(kept, self._trainable)
            else:
                self.publish()

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor], targets: Mapping[str, nn.Parameter]) -> None:
        """Write shard values into parameters of the module; the masters stay as they are.

        Args:
            values: one flat tensor a shard, by name.
            targets: the parameter that receives the value of each trained parameter: itself, or a frozen
                copy.
        """
        if self.zero_stage < 3:
            for name, value in self.full(values):
                targets[name].copy_(value)
            return
        # Small parameters are kept gathered between steps: their whole copy has to follow their partition.
        gathered = [p for p in targets.values() if getattr(p, "ds_persist", False)]
        for parameter in gathered:
            parameter.partition()  # type: ignore[attr-defined]  # ZeRO-3 adds methods to parameters
        for shard in self.shards:
            partition = targets[shard.name].ds_tensor  # type: ignore[attr-defined]
            partition.data.narrow(0, 0, shard.numel).copy_(values[shard.name])
        for parameter in targets.values():
            # The copy within a node, under zero_hpz_partition_size. DeepSpeed forgets those of trained
            # parameters after its steps, and never those of frozen ones.
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
        if gathered:
            gathered[0].all_gather(gathered)  # type: ignore[attr-defined]

    def full(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Full tensors from one flat tensor a shard, in the order of the parameters.

        Every rank receives them, no more at a time than the largest unit has; a tensor is good until the next
        one is asked for. The bits are exact: they travel as integers.
        """
        if self.zero_stage == 0:
            for shard in self.shards:
                yield shard.name, values[shard.name].view(shard.shape)
            return
        pieces = {shard.name: shard for shard in self.shards}
        memory = torch.empty(self._gathered_at_once, dtype=torch.int32, device=self.world.device)
        for names in self._gather_rounds():
            sizes = [_numel(self._trainable[name]) for name in names]
            buffer = memory.narrow(0, 0, sum(sizes)).zero_()
            offset = 0
            for name, size in zip(names, sizes, strict=True):
                if name in pieces:
                    piece = values[name].to(self.world.device, torch.float32).view(torch.int32)
                    buffer.narrow(0, offset + pieces[name].start, piece.numel()).copy_(piece)
                offset += size
            whole = self.world.sum(buffer).view(torch.float32)
            for name, part in zip(names, whole.split(sizes), strict=True):
                yield name, part.view(_full_shape(self._trainable[name]))

    def _gather_rounds(self) -> Iterator[list[str]]:
        names: list[str] = []
        total = 0
        for name, parameter in self._trainable.items():
            if names and total + _numel(parameter) > self._gathered_at_once:
                yield names
                names, total = [], 0
            names.append(name)
            total += _numel(parameter)
        if names:
            yield names

    def _make_shards(self) -> Iterator[Shard]:
        for name, parameter in self._trainable.items():
            shape = _full_shape(parameter)
            if self.zero_stage == 0:
                flat = parameter.detach().view(-1)
                yield Shard(name, shape, 0, flat, parameter, 0)
            elif self.zero_stage < 3:
                # Set by ZeRO; None if this rank updates none of the parameter.
                mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:
                    owner = self._inner.param_groups[mapping.param_group_index]["params"][0]
                    where = mapping.hp_fragment_address
                    master = owner.detach().narrow(0, where.start, where.numel)
                    yield Shard(name, shape, mapping.lp_fragment_address.start, master, owner, where.start)
            else:
                zero: Any = self._optimizer
                group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                owner = zero.fp32_partitioned_groups_flat[group]
                start = self.world.rank * size
                # The last ranks' partitions are padded.
                numel = min(size, _numel(parameter) - start)
                if numel > 0:
                    yield Shard(name, shape, start, owner.detach().narrow(0, offset, numel), owner, offset)


def _adamw(module: nn.Module, config: OptimizerConfig, *, by_deepspeed: bool) -> torch.optim.Optimizer:
    """AdamW of PyTorch, whose fused form runs on either device, or DeepSpeed's own for the host."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if by_deepspeed:
        from deepspeed.ops import adam

        # Its signature lacks types, and its defaults are taken for them.
        compiled: Any = adam.DeepSpeedCPUAdam
        return compiled(
            trained, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(
        trained,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _largest_unit(module: nn.Module, units: Sequence[type[nn.Module]]) -> int:
    """Trained elements of the largest unit; 0 without units."""
    found = [part for part in module.modules() if isinstance(part, tuple(units))]
    return max((sum(_numel(p) for p in part.parameters() if p.requires_grad) for part in found), default=0)


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, which under ZeRO-3 is not that of its tensor."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
