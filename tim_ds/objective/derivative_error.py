"""How well, and at what price, each estimator finds dF/dt: tables for a trained or a random network.

python -m tim_ds.objective.derivative_error runs/NAME --data runs/handwriting
python -m tim_ds.objective.derivative_error --recipe launch/recipes/t2i_xl.yaml --images 2
python -m tim_ds.objective.derivative_error --hidden-size 384 --depth 12 --num-heads 6 --grid 16x16

Error: against forward mode in float64 of the same weights, over one pack in which every image has r < t.
Cost: a training step, forward and backward, on a pack of which every second image has r < t, over the step
of flow matching (all r = t, no derivative); in float32 on a CPU, with bfloat16 products on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.command import command
from data_pipeline.errors import DataError
from data_pipeline.index import load_index
from data_pipeline.reader import ShardReader
from tim_ds.config.load import load_recipe
from tim_ds.errors import RequestError, TimError
from tim_ds.model.blocks import TransitionBlock
from tim_ds.model.config import ModelConfig
from tim_ds.model.embed import PatchProjection, PreciseLinear
from tim_ds.model.export_folder import meta_network
from tim_ds.model.ops import transition_loss_terms
from tim_ds.model.tim import TiM
from tim_ds.model.weights import load_weights_into
from tim_ds.objective.config import ObjectiveConfig, TransportConfig, WeightConfig
from tim_ds.objective.derivative import Derivative, central_difference, forward_mode, path_direction
from tim_ds.objective.loss import transition_loss
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.time_sampling import Times, draw_times
from tim_ds.objective.transport import Transport, build_transport
from tim_ds.packed import ClassCondition, Condition, Segments, TextCondition, patchify
from tim_ds.sources import read_source

Precision = Literal["float32", "bf16 products", "bf16 everywhere"]
"""`bf16 products`: matrix products and attention in bfloat16, the rest (residual, times, norms, head) in
float32, as in training. `bf16 everywhere`: the rest is rounded to bfloat16 too, as under plain autocast."""

STEPS = (0.05, 0.02, 0.01, 0.005, 0.001)


@dataclass(frozen=True, eq=False)
class Case:
    """One network and one pack, in float32 (or float64); times in float64, as in training."""

    network: TiM
    pack: NoisedPack

    def widened(self) -> Case:
        """The same numbers in float64."""
        pack, condition = self.pack, self.pack.condition
        if isinstance(condition, TextCondition):
            condition = replace(condition, states_LE=condition.states_LE.double())
        wide = replace(pack, x_TC=pack.x_TC.double(), z_TC=pack.z_TC.double(), condition=condition)
        return Case(copy.deepcopy(self.network).double(), wide)

    def difference(self, step: float | None) -> Tensor:
        return self._estimate(central_difference, step)

    def exact(self) -> Tensor:
        return self._estimate(forward_mode, None)

    def carried(self) -> Tensor:
        pack = self.pack
        direction = path_direction(pack, pack.times.transition_indices)
        main = (pack.x_t_TC, pack.c_t_S, pack.c_r_S, pack.segments, pack.condition)
        with torch.no_grad():
            output = self.network(*main, direction=direction)
        assert output.dF_TC is not None, "a direction was given"
        return output.dF_TC

    def _estimate(self, estimator: Derivative, step: float | None) -> Tensor:
        return estimator(self.network, self.pack, self.pack.times.transition_indices, step)


@dataclass(frozen=True, slots=True)
class ErrorRow:
    estimator: str
    precision: Precision
    step: float | None
    error: float
    """Of dF/dt, relative, in the 2-norm over the pack."""
    cosine: float


@dataclass(frozen=True, slots=True)
class CostRow:
    estimator: str
    flops: float
    """Of a step, over those of flow matching."""
    seconds: float
    """Likewise; processor time on a CPU."""
    memory: float | None
    """Peak, likewise; None on a CPU."""


def measure_errors(case: Case, steps: Sequence[float | None]) -> list[ErrorRow]:
    """Every estimator in every precision against forward mode in float64."""
    truth = case.widened().exact()
    rows = []
    for precision in get_args(Precision):
        with at_precision(case.network, precision):
            estimates = [("dde", step, case.difference(step)) for step in steps]
            estimates.append(("paired", None, case.carried()))
        for name, step, estimate in estimates:
            found = estimate.double()
            error = float((found - truth).norm() / truth.norm())
            cosine = float((found * truth).sum() / (found.norm() * truth.norm()))
            rows.append(ErrorRow(name, precision, step, error, cosine))
    return rows


def measure_cost(case: Case, *, repeats: int) -> list[CostRow]:
    """A step with each estimator over a flow-matching step, on the device of the case."""
    device, transport = case.pack.x_TC.device, case.pack.transport
    t_S, r_S = case.pack.times.t_S.cpu(), case.pack.times.r_S.cpu()
    still = Times.from_tensors(transport, t_S, t_S).to(device)
    half = torch.arange(still.num_segments) % 2 == 0
    mixed = Times.from_tensors(transport, t_S, torch.where(half, r_S, t_S)).to(device)
    plain = ObjectiveConfig(weight=WeightConfig(time_type="constant", adaptive=False), diffusion_share=1.0)
    steps: dict[str, Callable[[], None]] = {
        "flow matching": lambda: _step(case, plain, still),
        "dde": lambda: _step(case, replace(plain, diffusion_share=0.5, derivative="dde"), mixed),
        "paired": lambda: _step(case, replace(plain, diffusion_share=0.5, derivative="paired"), mixed),
    }
    flops, memory = {}, {}
    for name, step in steps.items():
        # The counter knows products; a fused attention would hide its own from it.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            step()
        flops[name] = counter.get_total_flops()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step()
            memory[name] = torch.cuda.max_memory_allocated(device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():  # in turn, so that a busy machine slows all of them
            seconds[name].append(_seconds(step, device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = "flow matching"
    return [
        CostRow(
            name,
            flops[name] / flops[first],
            medians[name] / medians[first],
            memory[name] / memory[first] if memory else None,
        )
        for name in steps
    ]


def _step(case: Case, config: ObjectiveConfig, times: Times) -> None:
    case.network.zero_grad()
    pack = case.pack
    bf16 = torch.autocast("cuda", dtype=torch.bfloat16) if pack.x_TC.is_cuda else nullcontext()
    with bf16:
        terms = transition_loss(
            case.network,
            pack.transport,
            config,
            pack.x_TC,
            pack.z_TC,
            times,
            pack.segments,
            pack.condition,
            latent_channels=case.network.config.in_channels,
            terms_of_images=transition_loss_terms,
        )
        loss = terms.total_S.sum()
    loss.backward()


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def at_precision(network: nn.Module, precision: Precision) -> Iterator[None]:
    """Within the block the forward passes of `network` compute in `precision`."""
    with ExitStack() as stack:
        if precision != "float32":
            device = next(network.parameters()).device.type
            stack.enter_context(torch.autocast(device, dtype=torch.bfloat16))
        if precision == "bf16 everywhere":
            for module in network.modules():
                if isinstance(module, PreciseLinear | PatchProjection | TransitionBlock):
                    handle = module.register_forward_hook(_round)
                    stack.callback(handle.remove)
        yield


def _round(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output.to(torch.bfloat16).to(output.dtype)


def random_network(config: ModelConfig, seed: int) -> TiM:
    """No weight is zero, so every branch and every time takes part."""
    network = meta_network(config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            if "norm.weight" in name:
                parameter.add_(1.0)
    return network.eval()


def random_pack(
    config: ModelConfig, grid: tuple[int, int], images: int, text_tokens: int, seed: int
) -> tuple[Tensor, Segments, Condition]:
    """Unit normal latents, and captions or labels."""
    generator = torch.Generator().manual_seed(seed)
    segments = Segments.from_grids([grid] * images)
    x_TC = torch.randn(segments.num_tokens, config.token_channels, generator=generator)
    if config.condition == "text":
        states = torch.randn(images * text_tokens, config.text_dim or 0, generator=generator)
        return x_TC, segments, TextCondition(states, Segments.from_lengths([text_tokens] * images))
    labels = torch.randint(0, config.num_classes or 1, (images,), generator=generator)
    return x_TC, segments, ClassCondition(labels)


def stored_pack(config: ModelConfig, folder: Path, images: int) -> tuple[Tensor, Segments, Condition]:
    """Images of shards, spread evenly over them.

    Raises:
        RequestError: if the shards hold fewer images, or what the network does not take.
        DataError: if they cannot be read.
    """
    index = load_index(folder)
    if len(index) < images or index.has_text != (config.condition == "text"):
        raise RequestError(
            f"--data {folder}: holds {len(index)} samples with {'captions' if index.has_text else 'labels'}; "
            f"expected at least {images} with {config.condition}"
        )
    reader = ShardReader(index)
    samples = [reader.read(i * len(index) // images) for i in range(images)]
    p = config.patch_size
    segments = Segments.from_grids([(s.latent.shape[1] // p, s.latent.shape[2] // p) for s in samples])
    x_TC = torch.cat([patchify(s.latent.float(), p) for s in samples])
    if config.condition == "text":
        states = [s.states.float() for s in samples if s.states is not None]
        return (
            x_TC,
            segments,
            TextCondition(torch.cat(states), Segments.from_lengths([len(s) for s in states])),
        )
    return x_TC, segments, ClassCondition(torch.tensor([s.label or 0 for s in samples]))


def build_case(
    network: TiM, transport: Transport, pack: tuple[Tensor, Segments, Condition], seed: int
) -> Case:
    """Noise and times of a pack; every image has r < t."""
    x_TC, segments, condition = pack
    generator = torch.Generator().manual_seed(seed + 1)
    count = segments.num_segments
    normals = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    config = ObjectiveConfig(
        weight=WeightConfig(time_type="constant"), diffusion_share=0.0, consistency_share=0.0
    )
    times = draw_times(transport, config, normals, uniforms, dtype=torch.float64)
    z_TC = torch.randn(x_TC.shape, generator=generator)
    return Case(network, NoisedPack(transport, x_TC, z_TC, times, segments, condition))


def to_device(case: Case, device: torch.device | str) -> Case:
    return Case(case.network.to(device), case.pack.to(device))


def describe(case: Case) -> str:
    """What the tables are of: which network and pack, in one line."""
    config, segments = case.network.config, case.pack.segments
    parameters = sum(p.numel() for p in case.network.parameters()) / 1e6
    return (
        f"{parameters:.1f}M parameters ({config.hidden_size} wide, {config.depth} blocks, "
        f"{config.num_heads} heads, AdaLN {config.adaln_width}); {segments.num_segments} images, "
        f"{segments.num_tokens} tokens; {case.pack.transport.name}"
    )


def error_table(rows: Sequence[ErrorRow]) -> str:
    """In Markdown."""
    lines = ["| estimator | precision | e | relative error | cosine |", "|---|---|---|---|---|"]
    for row in rows:
        step = "-" if row.step is None else f"{row.step:g}"
        lines.append(f"| {row.estimator} | {row.precision} | {step} | {row.error:.2e} | {row.cosine:.5f} |")
    return "\n".join(lines)


def cost_table(rows: Sequence[CostRow]) -> str:
    """In Markdown."""
    lines = ["| step | FLOPs | time | peak memory |", "|---|---|---|---|"]
    for row in rows:
        memory = "-" if row.memory is None else f"{row.memory:.3f}"
        lines.append(f"| {row.estimator} | {row.flops:.3f} | {row.seconds:.2f} | {memory} |")
    return "\n".join(lines)


@command(TimError, DataError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables and what they are of; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tim_ds.objective.derivative_error",
        description="Error and cost of the estimators of dF/dt, for trained weights or a random network.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "source", type=Path, nargs="?", help="run, checkpoint, export or released file; else random weights"
    )
    source.add_argument("--recipe", type=Path, help="whose network and transport the random weights are for")
    parser.add_argument("--data", type=Path, help="shards to take images from (default: noise for latents)")
    parser.add_argument("--images", type=int, default=8, help="in the pack (default: %(default)s)")
    parser.add_argument(
        "--grid", default="8x8", help="tokens of an image without --data (default: %(default)s)"
    )
    parser.add_argument("--text-tokens", type=int, default=16, help="of a caption (default: %(default)s)")
    parser.add_argument(
        "--steps", type=float, nargs="+", default=STEPS, help="half-widths e of the difference"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    shape = parser.add_argument_group("shape of the random network, without a recipe")
    shape.add_argument("--hidden-size", type=int, default=128)
    shape.add_argument("--depth", type=int, default=6)
    shape.add_argument("--num-heads", type=int, default=4)
    options = parser.parse_args(arguments)
    case = _case_of(options)
    print(describe(case), flush=True)
    print("", error_table(measure_errors(case, options.steps)), sep="\n", flush=True)
    print("", cost_table(measure_cost(case, repeats=options.repeats)), sep="\n")
    return 0


def _case_of(options: argparse.Namespace) -> Case:
    if options.source is not None:
        found = read_source(options.source)
        network = meta_network(found.export.model).to_empty(device="cpu")
        load_weights_into(network, found.state, source=str(options.source))
        network, transport = network.eval(), build_transport(found.export.transport)
    elif options.recipe is not None:
        recipe = load_recipe(options.recipe)
        network = random_network(recipe.model, options.seed)
        transport = build_transport(recipe.objective.transport)
    else:
        config = ModelConfig(
            condition="text",
            in_channels=32,
            hidden_size=options.hidden_size,
            depth=options.depth,
            num_heads=options.num_heads,
            text_dim=options.hidden_size,
            z_dim=None,
        )
        network, transport = random_network(config, options.seed), build_transport(TransportConfig())
    if options.data is not None:
        pack = stored_pack(network.config, options.data, options.images)
    else:
        sides = options.grid.split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise RequestError(f"--grid: expected HEIGHTxWIDTH in tokens, received {options.grid!r}")
        grid = (int(sides[0]), int(sides[1]))
        pack = random_pack(network.config, grid, options.images, options.text_tokens, options.seed)
    return to_device(build_case(network, transport, pack, options.seed), options.device)


if __name__ == "__main__":
    sys.exit(main())
