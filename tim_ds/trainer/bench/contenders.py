"""Who is timed: our training step and the baseline's, over one set of weights.

The optimiser does all of its work at a learning rate of zero. The weights stay what they are, so that every
repetition of every contender computes the same numbers, and one can be compared with another at any time.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tim_ds.config.recipe import Recipe
from tim_ds.errors import ConfigError, NonFiniteError
from tim_ds.model import ops
from tim_ds.model.config import ModelConfig
from tim_ds.model.tim import TiM
from tim_ds.objective.config import ObjectiveConfig, WeightConfig
from tim_ds.trainer.bench.baseline_network import BaselineNetwork
from tim_ds.trainer.bench.baseline_step import DIFFERENCE_STEP, Terms, batch_loss, transition_terms
from tim_ds.trainer.bench.work import Work, as_inputs
from tim_ds.trainer.materialise import Values, materialise
from tim_ds.trainer.step import TransitionStep

Objective = Literal["flow matching", "dde", "paired"]
Implementation = Literal["ours", "ours, twins", "baseline", "baseline, compiled"]

OURS: dict[str, Literal["auto", "torch"]] = {"ours": "auto", "ours, twins": "torch"}
"""Path of the operations: kernels where there is a GPU, or their definitions in plain PyTorch."""

IN_ORDER: tuple[tuple[Implementation, Objective], ...] = (
    ("ours", "flow matching"),
    ("ours", "dde"),
    ("ours", "paired"),
    ("baseline", "dde"),
    ("baseline, compiled", "dde"),
    ("ours, twins", "paired"),
    ("ours, twins", "dde"),
    ("ours, twins", "flow matching"),
    ("baseline", "flow matching"),
    ("baseline, compiled", "flow matching"),
)
"""What is most worth knowing first: time may run out."""


@dataclass(frozen=True, eq=False)
class Checked:
    """One step in float32, for comparison."""

    denoising: Tensor
    """Unweighted squared error of every image, in the order of the work: [S]."""
    gradient: dict[str, Tensor]
    """Of the mean loss, by parameter."""


class Contender(Protocol):
    implementation: Implementation
    objective: Objective

    def prepare(self, work: Work) -> Callable[[], Tensor]:
        """A whole training step on this work, inputs made: forward, derivative, loss, backward, clipping,
        optimiser. It returns the unweighted squared error of every image, in the order of the work."""
        ...

    def check(self, work: Work) -> Checked:
        """Loss and gradient in float32."""
        ...


class PlainEngine:
    """A module and AdamW, without DeepSpeed: what `engine.Engine` does in one process at stage 0."""

    name = "plain"

    def __init__(self, module: nn.Module, recipe: Recipe, device: torch.device) -> None:
        self._module = module
        self._autocast = autocast_of(recipe, device)
        self._grad_clip = recipe.train.optimizer.grad_clip
        self._parameters = list(module.parameters())
        self.optimizer = adamw(self._parameters, recipe)

    def forward(self, inputs: Any) -> Any:
        with self._autocast():
            return self._module(inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def apply(self) -> None:
        clip_and_step(self._parameters, self.optimizer, self._grad_clip, refuse=True)


class DeepSpeedEngine:
    """The trainer's own engine, at stage 0: the weights stay whole tensors that the baseline can share."""

    name = "deepspeed"

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        from tim_ds.trainer.engine import Engine, start_world

        self._world = start_world()
        stage_0 = {"zero_optimization": {"stage": 0}}
        self._engine = Engine(module, stage_0, recipe.train, packs_per_step=1, world=self._world)

    def forward(self, inputs: Any) -> Any:
        return self._engine.forward(inputs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, last=True)

    def apply(self) -> None:
        result = self._engine.apply(0.0)
        if not result.applied:
            raise NonFiniteError(f"gradient norm is {float(result.grad_norm)}")

    def close(self) -> None:
        from tim_ds.trainer.engine import stop_world

        stop_world(self._world)


class Ours:
    def __init__(
        self,
        implementation: Implementation,
        objective: Objective,
        recipe: Recipe,
        root: TransitionStep,
        engine: PlainEngine | DeepSpeedEngine,
    ) -> None:
        self.implementation: Implementation = implementation
        self.objective: Objective = objective
        self._config = objective_of(objective, recipe.objective)
        self._path: Literal["auto", "torch"] = OURS[implementation]
        self._recipe, self._root, self._engine = recipe, root, engine

    def prepare(self, work: Work) -> Callable[[], Tensor]:
        inputs, place = as_inputs(work, self._recipe), _place(work)

        def step() -> Tensor:
            self._root.objective = self._config
            with ops.kernels(self._path):
                # A new object: tokens are made of latents in every step, as those of a loader's pack.
                output = self._engine.forward(replace(inputs))
                self._engine.backward(output.loss)
                self._engine.apply()
            return output.terms.denoising_S[place]

        return step

    def check(self, work: Work) -> Checked:
        self._root.objective = self._config
        with ops.kernels(self._path):
            output = self._root(as_inputs(work, self._recipe))
            output.loss.backward()
        return Checked(output.terms.denoising_S[_place(work)], take_gradient(self._root.network))


class Baseline:
    def __init__(
        self,
        implementation: Implementation,
        objective: Objective,
        recipe: Recipe,
        network: BaselineNetwork,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        terms: Terms = transition_terms,
    ) -> None:
        self.implementation: Implementation = implementation
        self.objective: Objective = objective
        self._network, self._terms = network, terms
        self.parameters = list(network.parameters())
        self._optimizer, self._grad_clip = optimizer, recipe.train.optimizer.grad_clip
        self._alignment_weight = recipe.objective.repa_weight
        self._autocast = autocast_of(recipe, device)

    def prepare(self, work: Work) -> Callable[[], Tensor]:
        def step() -> Tensor:
            denoising = self._backward(work, self._autocast)
            clip_and_step(self.parameters, self._optimizer, self._grad_clip, refuse=False)
            return denoising

        return step

    def check(self, work: Work) -> Checked:
        denoising = self._backward(work, nullcontext)
        return Checked(denoising, take_gradient(self._network))

    def _backward(self, work: Work, autocast: Callable[[], AbstractContextManager[object]]) -> Tensor:
        found = []
        for batch in work.batches:
            loss = batch_loss(
                self._network,
                batch,
                autocast=autocast,
                alignment_weight=self._alignment_weight,
                terms=self._terms,
            )
            (loss.total / work.num_images).backward()
            found.append(loss.denoising)
        return torch.cat(found)


@dataclass(frozen=True, eq=False)
class Field:
    """All contenders of a run."""

    contenders: tuple[Contender, ...]
    """In the order of `IN_ORDER`."""
    reference: Baseline
    """What the others are compared with."""
    engine: PlainEngine | DeepSpeedEngine
    parameters: tuple[nn.Parameter, ...]

    def close(self) -> None:
        if isinstance(self.engine, DeepSpeedEngine):
            self.engine.close()


def build_field(
    recipe: Recipe,
    device: torch.device,
    *,
    engine: Literal["plain", "deepspeed"],
    wanted: Sequence[tuple[Implementation, Objective]] = IN_ORDER,
    backend: str = "inductor",
    seed: int = 0,
) -> Field:
    """Both networks and what steps them.

    Args:
        backend: of `torch.compile`.
    Raises:
        ConfigError: if the baseline has no such recipe, or DeepSpeed is asked for and missing.
    """
    check_recipe(recipe)
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("--engine deepspeed: deepspeed is not installed here; use plain")
    network = random_network(recipe, device, seed)
    root = TransitionStep(network, recipe.objective, latent_channels=recipe.model.in_channels, world_size=1)
    stepping = PlainEngine(root, recipe, device) if engine == "plain" else DeepSpeedEngine(root, recipe)
    eager = shared_baseline(recipe, network)
    # DeepSpeed keeps its optimiser to itself.
    optimizer = stepping.optimizer if isinstance(stepping, PlainEngine) else adamw(eager.parameters(), recipe)
    compiled, compiled_terms = eager, transition_terms
    if any(implementation == "baseline, compiled" for implementation, _ in wanted):
        compiled = shared_baseline(recipe, network)
        compiled.compile_parts(backend)
        compiled_terms = torch.compile(transition_terms, backend=backend, dynamic=False)
    contenders: list[Contender] = []
    for implementation, objective in IN_ORDER:
        if (implementation, objective) not in wanted:
            continue
        if implementation in OURS:
            contenders.append(Ours(implementation, objective, recipe, root, stepping))
        elif implementation == "baseline":
            contenders.append(Baseline(implementation, objective, recipe, eager, optimizer, device))
        else:
            contenders.append(
                Baseline(implementation, objective, recipe, compiled, optimizer, device, compiled_terms)
            )
    return Field(
        tuple(contenders),
        Baseline("baseline", "dde", recipe, eager, optimizer, device),
        stepping,
        tuple(network.parameters()),
    )


def check_recipe(recipe: Recipe) -> None:
    """
    Raises:
        ConfigError: naming every setting that the baseline does not have.
    """
    model, objective, transport = recipe.model, recipe.objective, recipe.objective.transport
    expected: dict[str, tuple[object, object]] = {
        "model.time_condition": (model.time_condition, "t-r"),
        "model.separate_interval_embedder": (model.separate_interval_embedder, True),
        "model.qk_norm": (model.qk_norm, True),
        "model.distance_aware": (model.distance_aware, True),
        "objective.transport.kind": (transport.kind, "ot_fm"),
        "objective.transport.sigma_data": (transport.sigma_data or 1.0, 1.0),
        "objective.derivative_step": (objective.derivative_step or DIFFERENCE_STEP, DIFFERENCE_STEP),
        "objective.weight": (objective.weight, WeightConfig(adaptive_over="image")),
        "objective.directional": (objective.directional, True),
        "objective.guided_target": (objective.guided_target, None),
        "train.adapter": (recipe.train.adapter, None),
    }
    wrong = [
        f"{key}: the baseline has {value!r}, received {received!r}"
        for key, (received, value) in expected.items()
        if received != value
    ]
    if recipe.train.precision == "bf16":
        wrong.append("train.precision: the baseline has 'fp32' or 'bf16_autocast', received 'bf16'")
    if wrong:
        raise ConfigError("\n".join(wrong))


def objective_of(objective: Objective, config: ObjectiveConfig) -> ObjectiveConfig:
    if objective == "flow matching":
        return replace(config, diffusion_share=1.0)
    return replace(config, derivative=objective)


def random_network(recipe: Recipe, device: torch.device, seed: int) -> TiM:
    with torch.device("meta"):
        network = TiM(recipe.model, checkpoint_blocks=recipe.train.activation_checkpointing)
    materialise(network, random_values(device, seed), device=device)
    return network


def random_values(device: torch.device, seed: int) -> Values:
    """No weight is zero: a GPU multiplies zeros faster, and a gate of zero would hide its branch."""
    generator = torch.Generator(device).manual_seed(seed)

    def value(name: str, like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, device=device)
        fan_in = like[0].numel() if like.ndim > 1 else 16
        return drawn / fan_in**0.5 + (1.0 if "norm.weight" in name else 0.0)

    return value


def shared_baseline(recipe: Recipe, network: TiM) -> BaselineNetwork:
    """The baseline with the very parameters of `network`."""
    with torch.device("meta"):
        baseline = baseline_network(recipe.model, checkpoint_blocks=recipe.train.activation_checkpointing)
    baseline.load_state_dict(network.state_dict(keep_vars=True), strict=True, assign=True)
    return baseline


def baseline_network(config: ModelConfig, *, checkpoint_blocks: bool = False) -> BaselineNetwork:
    is_text = config.condition == "text"
    return BaselineNetwork(
        in_channels=config.in_channels,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_hidden=config.mlp_hidden,
        adaln_hidden=config.adaln_width,
        text_dim=config.text_dim if is_text else None,
        num_labels=None if is_text else (config.num_classes or 0) + int(config.class_dropout),
        encoder_depth=config.encoder_depth,
        z_dim=config.z_dim,
        projector_dim=config.projector_dim,
        rope_layout=config.rope_layout,
        checkpoint_blocks=checkpoint_blocks,
    )


def autocast_of(recipe: Recipe, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    if recipe.train.precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def adamw(parameters: Any, recipe: Recipe) -> torch.optim.AdamW:
    """The fused form, for everyone."""
    config = recipe.train.optimizer
    return torch.optim.AdamW(
        parameters, lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def clip_and_step(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, grad_clip: float, *, refuse: bool
) -> None:
    """
    Args:
        refuse: look at the norm on the host before the optimiser moves, as our trainer does.
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if refuse and not bool(norm.isfinite()):
        optimizer.zero_grad()
        raise NonFiniteError(f"gradient norm is {float(norm)}")
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def take_gradient(network: nn.Module) -> dict[str, Tensor]:
    """The gradients by name, taken from the parameters."""
    found = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad
            parameter.grad = None
    return found


def clear(network_parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """Forget what a contender that failed left behind."""
    for parameter in network_parameters:
        parameter.grad = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _place(work: Work) -> Tensor:
    """Place in the pack of every image, in the order of the work."""
    return torch.argsort(work.order()).to(work.batches[0].x.device)
