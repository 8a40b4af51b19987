"""The parts of a run, made from its recipe: network with its first weights, loader, clock, counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from data_pipeline.loader import StepLoader, build_loader
from data_pipeline.shard_encoders import load_null_states
from tim_ds.config.recipe import Recipe
from tim_ds.model.blocks import FinalLayer, TransitionBlock
from tim_ds.model.init import initial_values
from tim_ds.model.tim import TiM
from tim_ds.trainer.agreement import DataFacts
from tim_ds.trainer.checkpoint import Checkpoint
from tim_ds.trainer.config import TrainConfig
from tim_ds.trainer.flops import StepFlops, flops_of, peak_flops
from tim_ds.trainer.initial import InitialWeights, check_initial, read_base, read_initial, values_of
from tim_ds.trainer.inputs import Prepare, StepInputs
from tim_ds.trainer.lora import adapter_values, add_adapters
from tim_ds.trainer.materialise import Split, Values, materialise
from tim_ds.trainer.phases import PhaseClock
from tim_ds.trainer.step import TransitionStep
from tim_ds.trainer.world import World

UNITS = (TransitionBlock, FinalLayer)
"""Modules that ZeRO-3 gathers as one piece: without it every small layer has hooks and messages of its own.
Only modules whose input carries a gradient can be: DeepSpeed collects the gradients of such a piece when the
gradient of its input is known (the embedders' inputs have none, and would be collected before they exist)."""


def build_root(
    recipe: Recipe,
    world_size: int,
    initial: InitialWeights | None = None,
    *,
    values: Values | None = None,
    split: Split | None = None,
) -> TransitionStep:
    """The root module with its first weights, the same on every rank at every stage, and adapters.

    Args:
        initial: weights to start from; None: freshly initialised from the recipe's seed.
        values: of the network's parameters by name, in place of both.
        split: splits every parameter among the ranks as soon as it has its value.
    """
    # For whatever asks a generator without saying so; weights, adapters and data do not.
    torch.manual_seed(recipe.train.seed)
    with torch.device("meta"):
        network = TiM(recipe.model, checkpoint_blocks=recipe.train.activation_checkpointing)
    values = values or initial_values(network, recipe.train.seed)
    if initial is not None:
        values = values_of(initial, network, values)
    if recipe.train.adapter is not None:
        with torch.device("meta"):
            add_adapters(network, recipe.train.adapter)
        values = adapter_values(values, recipe.train.seed)
    teacher = None
    if recipe.objective.guided_target is not None:
        teacher = copy.deepcopy(network).requires_grad_(False)
    dtype = torch.bfloat16 if split is not None and recipe.train.precision == "bf16" else torch.float32
    for module in (network, teacher):
        if module is not None:
            materialise(module, values, dtype=dtype, split=split)
    return TransitionStep(
        network,
        recipe.objective,
        latent_channels=recipe.model.in_channels,
        world_size=world_size,
        teacher=teacher,
    )


def initial_weights(recipe: Recipe, checkpoint: Checkpoint | None) -> InitialWeights | None:
    """Weights that the run needs from elsewhere: its first ones, or with adapters, always, the frozen ones.

    Raises:
        CheckpointError, ConfigError: if they are not there, do not fit, or are not those of the checkpoint.
    """
    path = recipe.train.init_from
    if path is None or (checkpoint is not None and recipe.train.adapter is None):
        return None
    initial = read_initial(path) if checkpoint is None else read_base(checkpoint, path)
    check_initial(initial, recipe)
    return initial


def teacher_parameters(root: TransitionStep) -> dict[str, nn.Parameter]:
    """Frozen parameters of the teacher, by the name of the trained one."""
    if root.teacher is None:
        return {}
    return {f"network.{name}": parameter for name, parameter in root.teacher.named_parameters()}


def build_run_loader(
    recipe: Recipe, world: World, data: DataFacts, start_step: int
) -> StepLoader[StepInputs]:
    """This rank's steps from `start_step` to the end of the run."""
    return build_loader(
        recipe.data,
        patch_size=recipe.model.patch_size,
        rank=world.rank,
        world_size=world.size,
        seed=recipe.train.seed,
        start_step=start_step,
        num_steps=max(recipe.train.steps - start_step, 0),
        finish=prepare_of(recipe, data),
        device=world.device,
    )


def prepare_of(recipe: Recipe, data: DataFacts) -> Prepare:
    """The loader's last step for this recipe."""
    null_states, null_label = None, None
    if recipe.objective.guided_target is not None:
        if data.has_text:
            null_states = load_null_states(recipe.data, data.text_width)
        else:
            null_label = data.num_classes
    return Prepare(recipe.objective, recipe.train.seed, null_states, null_label)


def build_clock(recipe: Recipe, root: TransitionStep, world: World) -> tuple[PhaseClock, str]:
    """The clock of a run, and what the phase around the forward is called."""
    clock = PhaseClock(world.device)
    objective = recipe.objective
    carried = objective.derivative != "jvp" and objective.diffusion_share < 1.0
    forward_phase = "forward_and_derivative" if carried else "forward"
    clock.watch(root.network, "derivative", inside=forward_phase)
    if root.teacher is not None:
        clock.watch(root.teacher, "teacher", inside=forward_phase)
    return clock, forward_phase


def build_count(recipe: Recipe) -> Callable[[StepInputs], StepFlops] | None:
    """Counts the operations of a micro-step; None for adapters: frozen weights have another backward."""
    if recipe.train.adapter is not None:
        return None
    return partial(
        flops_of,
        config=recipe.model,
        objective=recipe.objective,
        checkpointing=recipe.train.activation_checkpointing,
    )


def device_peak(config: TrainConfig, world: World) -> float | None:
    """Peak of this rank's device in FLOP/s, where it is known."""
    if config.peak_tflops is not None:
        return 1e12 * config.peak_tflops
    if world.device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(world.device), config.precision)
