"""A root module under DeepSpeed: micro-steps, optimiser steps under a guard against non-finite gradients, and
the float32 state as `Shard`s, the same at every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.utils import groups
from torch import Tensor, nn

from tim_ds.trainer.config import OptimizerConfig, TrainConfig
from tim_ds.trainer.engine.file import merge_config, zero_settings, zero_stage
from tim_ds.trainer.world import World

STATE_KEYS = ("exp_avg", "exp_avg_sq")
"""Tensors that AdamW keeps for every parameter."""

GATHER_ELEMENTS = 1 << 25
"""The most that are gathered at a time when full tensors are put together from shards (128 MiB), unless one
parameter has more; less where the largest unit of the network has less."""


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
            partition = targets[shard.name].ds_tensor  # type: ignore[attr-defined]  # likewise
            partition.data.narrow(0, 0, shard.numel).copy_(values[shard.name])
        for parameter in targets.values():
            # The copy within a node, under zero_hpz_partition_size. DeepSpeed forgets those of trained
            # parameters after its steps, and never those of frozen ones.
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]  # likewise
        if gathered:
            gathered[0].all_gather(gathered)  # type: ignore[attr-defined]  # likewise

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
                mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # stages 1 and 2 add it
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
