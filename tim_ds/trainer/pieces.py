"""Measures the pieces of a step on the machines at hand, for `tim_ds.trainer.scaling` to put together.

    deepspeed --num_gpus 8 --module tim_ds.trainer.pieces RECIPE --ds FILE --out pieces.json
    torchrun --nproc_per_node 8 -m tim_ds.trainer.pieces RECIPE --ds FILE --out pieces.json
    python -m tim_ds.trainer.pieces RECIPE --ds FILE --out pieces.json [section.key=value ...]

The trainer's own step (network, objective, engine file, averages) with random weights and packs, no data. In
turn: the whole step; the step alone, where every collective is answered at once with what the rank has
itself, so that the engine does all it does but nobody waits for anybody; and the step's collectives with
nothing between them. Then collectives of each kind by themselves, small ones and such as the step makes.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data_pipeline.command import command
from tim_ds.config.load import load_recipe, split_arguments
from tim_ds.config.recipe import Recipe, latent_stride, recipe_hash
from tim_ds.errors import NonFiniteError, RequestError, TimError
from tim_ds.packed import ClassCondition, Condition, Segments, TextCondition
from tim_ds.trainer.assembly import UNITS, build_root, teacher_parameters
from tim_ds.trainer.bench.contenders import random_values
from tim_ds.trainer.bench.report import environment
from tim_ds.trainer.bench.work import Sides, as_inputs, draw_work
from tim_ds.trainer.ema import Ema
from tim_ds.trainer.engine import (
    Engine,
    Splitter,
    collectives_through,
    merge_config,
    read_engine_file,
    start_world,
    stop_world,
    zero_settings,
    zero_stage,
)
from tim_ds.trainer.inputs import StepInputs
from tim_ds.trainer.measured import Collective, Kind, Pieces, Scope, Seconds, Sent, Step, sent_bytes, work_of
from tim_ds.trainer.memory import Ranks
from tim_ds.trainer.scaling import even_pack, step_volume
from tim_ds.trainer.world import World

SMALL_ELEMENTS = 256
"""A rank, of the tensors that measure latency."""
WARM_UPS = 3
"""Under ZeRO-3 the first step records the order of its modules, which the later follow."""
LEAST_REPETITIONS = 3
COLLECTIVE_S = 2.0
"""About how long one collective is repeated."""
SCHEDULE = Path("/proc/thread-self/schedstat")
"""Of Linux: nanoseconds that a thread ran, and that it waited for a core."""


class Call(NamedTuple):
    """A collective of a step."""

    kind: Kind
    elements: int
    """Of the whole tensor."""
    dtype: torch.dtype
    group: Any
    root: int


class _Done:
    """The handle of a collective that is over."""

    def wait(self) -> None:
        return

    def is_completed(self) -> bool:
        return True


class Wire:
    """DeepSpeed's collectives as a measurement wants them: passed on, and counted, or answered at once."""

    def __init__(self, *, fills: bool) -> None:
        self.fills = fills
        """Whether a gather that is answered fills the parts of the other ranks, with this rank's: ZeRO-3
        gathers into new memory. The earlier stages gather into the weights, where the parts are already."""
        self.backend: Any = None
        self.is_cut = False
        """Whether collectives are answered from what this rank has."""
        self.calls: list[Call] | None = None
        """Collectives are written down here, where it is not None."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    @contextmanager
    def cut(self) -> Iterator[None]:
        self.is_cut = True
        try:
            yield
        finally:
            self.is_cut = False

    @contextmanager
    def counted(self) -> Iterator[list[Call]]:
        self.calls = calls = []
        try:
            yield calls
        finally:
            self.calls = None

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if self._answers("all_reduce", tensor, group):
            return _Done() if async_op else None
        return self.backend.all_reduce(tensor, op, group, async_op)

    def reduce(
        self,
        tensor: Tensor,
        dst: int,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if self._answers("reduce", tensor, group, dst):
            return _Done() if async_op else None
        return self.backend.reduce(tensor, dst, op, group, async_op)

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if not self._answers("all_gather", output_tensor, group):
            return self.backend.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
        if self.fills:
            mine, parts = input_tensor.view(-1), output_tensor.view(-1, input_tensor.numel())
            own = dist.get_rank(group)
            # Its own part may lie there already.
            parts[:own].copy_(mine.expand_as(parts[:own]))
            parts[own + 1 :].copy_(mine.expand_as(parts[own + 1 :]))
            if parts[own].data_ptr() != mine.data_ptr():
                parts[own].copy_(mine)
        return _Done() if async_op else None

    def reduce_scatter_tensor(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if not self._answers("reduce_scatter", input_tensor, group):
            return self.backend.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)
        size = output_tensor.numel()
        mine = input_tensor.view(-1).narrow(0, dist.get_rank(group) * size, size)
        if mine.data_ptr() != output_tensor.data_ptr():
            output_tensor.view(-1).copy_(mine)
        return _Done() if async_op else None

    def _answers(self, kind: Kind, whole: Tensor, group: Any, root: int = 0) -> bool:
        if self.calls is not None:
            self.calls.append(Call(kind, whole.numel(), whole.dtype, group, root))
        return self.is_cut

    def repeat(self, call: Call, scratch: Tensor) -> None:
        """The same collective, on other numbers."""
        backend, (kind, elements, dtype, group, root) = self.backend, call
        whole = scratch.view(dtype)[:elements]
        if kind == "all_reduce":
            backend.all_reduce(whole, group=group)
        elif kind == "reduce":
            backend.reduce(whole, root, group=group)
        else:
            size = elements // dist.get_world_size(group)
            part = scratch.view(dtype)[elements : elements + size]
            if kind == "all_gather":
                backend.all_gather_into_tensor(whole, part, group=group)
            else:
                backend.reduce_scatter_tensor(part, whole, group=group)


@dataclass(eq=False)
class _WiredWorld(World):
    """Sums what the ranks sum outside DeepSpeed by the same wire."""

    wire: Wire = field(kw_only=True)

    def sum(self, value: Tensor) -> Tensor:
        if self.size > 1:
            self.wire.all_reduce(value)
        return value


class Trial:
    """The trainer's step on random work, at a learning rate of zero: every repetition is the same step."""

    def __init__(
        self, recipe: Recipe, engine_config: dict[str, Any], world: World, wire: Wire, *, image_tokens: int
    ) -> None:
        packs, config = recipe.data.packs_per_step, recipe.train
        merged = merge_config(engine_config, config, packs_per_step=packs, world_size=world.size)
        split = Splitter(merged) if zero_stage(merged) == 3 else None
        root = build_root(recipe, world.size, values=random_values(world.device, 0), split=split)
        own_world = _WiredWorld(world.rank, world.size, world.device, wire=wire)
        self.engine = Engine(root, engine_config, config, packs_per_step=packs, world=own_world, units=UNITS)
        self._ema, self._teacher = Ema(self.engine, config.ema), teacher_parameters(root)
        self._inputs = _full_pack(recipe, image_tokens, world)
        self.trained = sum(torch.Size(shape).numel() for shape in self.engine.parameter_shapes.values())

    def step(self, packs: int) -> None:
        for number in range(packs):
            # A new object: tokens are made of latents in every step, as those of a loader's pack.
            output = self.engine.forward(replace(self._inputs))
            self.engine.backward(output.loss, last=number == packs - 1)
        result = self.engine.apply(0.0)
        if not result.applied:
            raise NonFiniteError(f"gradient norm is {float(result.grad_norm)} with random weights and packs")
        self._ema.update(1)
        if self._teacher:
            self._ema.write_into(self._teacher)


def _full_pack(recipe: Recipe, image_tokens: int, world: World) -> StepInputs:
    pack = even_pack(recipe, image_tokens)
    side = latent_stride(recipe.data.autoencoder) * recipe.model.patch_size
    height = max(h for h in range(1, int(image_tokens**0.5) + 1) if image_tokens % h == 0)
    sides: Sides = (height * side, image_tokens // height * side)
    text = 0 if pack.text_lengths is None else pack.text_lengths[0]
    work = draw_work(
        recipe, [(sides, len(pack.image_lengths))], text_tokens=text, device=world.device, seed=world.rank
    )
    inputs = as_inputs(work, recipe)
    if recipe.objective.guided_target is None:
        return inputs
    null: Condition
    if isinstance(inputs.condition, TextCondition):
        states = torch.zeros_like(inputs.condition.states_LE)
        null = TextCondition(states, Segments.from_lengths([text] * inputs.num_images)).to(world.device)
    else:
        label = recipe.model.num_classes or 0
        null = ClassCondition(torch.full((inputs.num_images,), label)).to(world.device)
    return replace(inputs, null_condition=null)


def measure(
    recipe: Recipe,
    engine_config: dict[str, Any],
    world: World,
    *,
    image_tokens: int | None = None,
    packs: Sequence[int] = (1, 2),
    repetitions: int = 10,
    command: str = "",
) -> Pieces:
    """All pieces, on every rank alike. Called by all ranks.

    Args:
        image_tokens: of one image of the packs; None: of 1024 x 1024 pixels, or the whole pack.
        packs: a rank and step, at least two different numbers, fewest first.
        repetitions: of every step.
    Raises:
        RequestError: for numbers that measure nothing, or hosts with unequal numbers of ranks.
    """
    _check_numbers(recipe, image_tokens, packs, repetitions)
    host_of = world.gather(platform.node())
    hosts = list(dict.fromkeys(host_of))
    counts = Counter(host_of)
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} on {host}" for host, count in counts.items())
        raise RequestError(f"ranks: expected as many on every host, received {told}")
    tokens = even_pack(recipe, image_tokens).image_lengths[0]
    wire = Wire(fills=zero_stage(engine_config) == 3)

    def wrap(backend: Any) -> Wire:
        wire.backend = backend
        return wire

    with collectives_through(wrap):
        sized = replace(recipe, data=replace(recipe.data, packs_per_step=packs[-1] * world.size))
        trial = Trial(sized, engine_config, world, wire, image_tokens=tokens)
        steps, calls = _measure_steps(trial, wire, world, packs, repetitions)
        collectives: tuple[Collective, ...] = ()
        if world.size > 1:
            groups = _groups(host_of, world)
            sizes = _sizes(engine_config, trial.trained, calls)
            collectives = tuple(_measure_collectives(wire, world, groups, sizes, repetitions))
    about = {
        **environment(world.device),
        "deepspeed": version("deepspeed"),
        "backend": dist.get_backend(),
        "hosts": hosts,
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "command": command,
    }
    threads = about.get("threads")
    about["device"] = about["gpu"] or f"{about['cpu']} CPU, {threads} thread{'s'[: threads != 1]} a rank"
    return Pieces(
        about=about,
        work=work_of(recipe),
        engine=engine_config,
        ranks=world.size,
        per_node=counts[hosts[0]],
        stage=zero_stage(engine_config),
        image_tokens=tokens,
        trained=trial.trained,
        steps=steps,
        collectives=collectives,
    )


def _check_numbers(recipe: Recipe, image_tokens: int | None, packs: Sequence[int], repetitions: int) -> None:
    problems = []
    if image_tokens is not None and not 0 < image_tokens <= recipe.data.tokens_per_pack:
        problems.append(
            f"--image-tokens: expected 1 to data.tokens_per_pack {recipe.data.tokens_per_pack}, "
            f"received {image_tokens}"
        )
    if len(packs) < 2 or min(packs) < 1 or sorted(set(packs)) != list(packs):
        problems.append(
            "--packs: expected at least two rising numbers, so that what a pack takes can be told from what "
            f"a step takes; received {','.join(map(str, packs))}"
        )
    if repetitions < LEAST_REPETITIONS:
        problems.append(f"--repetitions: expected at least {LEAST_REPETITIONS}, received {repetitions}")
    if problems:
        raise RequestError("\n".join(problems))


def _clock(world: World, action: Callable[[], object], *, apart: bool = False) -> float:
    """Seconds of an action that all ranks begin together, of the rank that took longest.

    On a CPU, time in which a rank could have run and others had its core is taken off: of the rank that lost
    most, since the others wait for it meanwhile, or of each its own where they work `apart`.
    """
    _wait(world)
    world.barrier()
    start, queued_s = time.perf_counter(), _queued_s(world)
    action()
    _wait(world)
    every = world.gather((time.perf_counter() - start, _queued_s(world) - queued_s))
    if apart:
        return max(taken - lost for taken, lost in every)
    return max(taken for taken, _ in every) - max(lost for _, lost in every)


def _queued_s(world: World) -> float:
    """Seconds that this thread has waited for a core so far; 0 for a device of its own, and where the system
    does not tell."""
    if world.device.type != "cpu":
        return 0.0
    try:
        return 1e-9 * int(SCHEDULE.read_text().split()[1])
    except OSError:
        return 0.0


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _bar(world: World, total: int, text: str) -> tqdm:  # type: ignore[type-arg]  # generic in its stubs alone
    return tqdm(total=total, desc=text, disable=not world.is_main, file=sys.stderr)


def _measure_steps(
    trial: Trial, wire: Wire, world: World, packs: Sequence[int], repetitions: int
) -> tuple[tuple[Step, ...], list[Call]]:
    """Steps, and the collectives of the longest."""
    calls_of: dict[int, list[Call]] = {}
    times: dict[tuple[int, str], list[float]] = {}
    with _bar(world, (repetitions + WARM_UPS + 1) * len(packs), "steps") as bar:
        for count in packs:
            for _ in range(WARM_UPS):
                trial.step(count)
                bar.update()
            with wire.counted() as calls_of[count]:
                trial.step(count)
            with wire.cut():
                trial.step(count)
            bar.update()
        longest = max((_bytes(call) for calls in calls_of.values() for call in calls), default=0)
        # The whole tensor and a rank's part of it beside each other.
        scratch = torch.zeros(2 * longest, dtype=torch.uint8, device=world.device)

        def replay(count: int) -> None:
            for call in calls_of[count]:
                wire.repeat(call, scratch)

        # In turn, so that a clock that drifts or a busy machine meets all of them.
        for _ in range(repetitions):
            for count in packs:
                with wire.cut():
                    taken = _clock(world, lambda count=count: trial.step(count), apart=True)
                times.setdefault((count, "alone"), []).append(taken)
                taken = _clock(world, lambda count=count: trial.step(count))
                times.setdefault((count, "whole"), []).append(taken)
                taken = _clock(world, lambda count=count: replay(count))
                times.setdefault((count, "wire"), []).append(taken)
                bar.update()
    steps = tuple(
        Step(
            count,
            Seconds.of(times[count, "whole"]),
            Seconds.of(times[count, "alone"]),
            Seconds.of(times[count, "wire"]),
            _sent(calls_of[count], world),
        )
        for count in packs
    )
    return steps, calls_of[packs[-1]]


def _bytes(call: Call) -> int:
    return call.elements * call.dtype.itemsize


def _sent(calls: Sequence[Call], world: World) -> tuple[Sent, ...]:
    found: dict[tuple[Kind, Scope, int], list[float]] = {}
    for call in calls:
        size = dist.get_world_size(call.group)
        if size == 1:
            continue
        scope: Scope = "everywhere" if size == world.size else "node"
        total = found.setdefault((call.kind, scope, size), [0.0, 0.0])
        total[0] += sent_bytes(call.kind, _bytes(call), size)
        total[1] += 1
    return tuple(Sent(*key, *total) for key, total in found.items())


def _groups(host_of: Sequence[str], world: World) -> dict[Scope, Any]:
    """The group of all ranks, and where there are several hosts with several ranks, that of this host's."""
    groups: dict[Scope, Any] = {"everywhere": dist.group.WORLD}
    hosts = list(dict.fromkeys(host_of))
    if 1 < len(hosts) < world.size:
        for host in hosts:
            # All ranks take part in making each.
            group = dist.new_group([rank for rank, other in enumerate(host_of) if other == host])
            if host_of[world.rank] == host:
                groups["node"] = group
    return groups


def _sizes(engine_config: dict[str, Any], trained: int, calls: Sequence[Call]) -> dict[Kind, int]:
    """Elements (float32, whole) of the large tensor of each kind: the largest that the step sends; of kinds
    that it does not use, a bucket of the engine file."""
    found: dict[Kind, int] = {}
    kinds: list[Kind] = ["all_gather", "reduce_scatter", "all_reduce"]
    if any(call.kind == "reduce" for call in calls):
        kinds.append("reduce")
    for kind in kinds:
        largest = max((_bytes(call) // 4 for call in calls if call.kind == kind), default=0)
        # The norm of the gradient is a sum of single numbers, which says nothing about sums of gradients.
        bucket = min(int(zero_settings(engine_config).reduce_bucket_size), trained)
        found[kind] = largest if largest > SMALL_ELEMENTS else bucket
    return found


def _measure_collectives(
    wire: Wire,
    world: World,
    groups: dict[Scope, Any],
    sizes: dict[Kind, int],
    repetitions: int,
) -> Iterator[Collective]:
    wanted: list[tuple[Scope, Kind, int]] = [
        (scope, kind, elements)
        for scope in groups
        for kind in sizes
        for elements in (SMALL_ELEMENTS * dist.get_world_size(groups[scope]), sizes[kind])
    ]
    with _bar(world, len(wanted), "collectives") as bar:
        for scope, kind, elements in wanted:
            group = groups[scope]
            ranks = dist.get_world_size(group)
            elements = -(-elements // ranks) * ranks
            root = dist.get_global_rank(group, 0)
            scratch = torch.zeros(2 * elements, device=world.device).view(torch.uint8)
            call = Call(kind, elements, torch.float32, group, root)
            once = _clock(world, lambda call=call, scratch=scratch: wire.repeat(call, scratch))
            times = []
            # Several in a row: a clock of the host does not tell microseconds.
            row = max(1, min(50, round(0.01 / once)))
            count = max(LEAST_REPETITIONS, min(3 * repetitions, round(COLLECTIVE_S / (row * once))))
            for _ in range(count):

                def several(call: Call = call, scratch: Tensor = scratch, row: int = row) -> None:
                    for _ in range(row):
                        wire.repeat(call, scratch)

                times.append(_clock(world, several) / row)
            yield Collective(kind, scope, ranks, 4 * elements, Seconds.of(times))
            bar.update()


def page(pieces: Pieces, recipe: Recipe) -> str:
    """What was measured, as text, with the bytes that the model has beside those that were counted."""
    ranks = Ranks(pieces.ranks, pieces.per_node)
    lines = [f"Measured: {pieces.where}; {pieces.about['recipe']}, ZeRO stage {pieces.stage}.", ""]
    lines.append(f"{'packs':>5} {'whole s':>22} {'alone s':>22} {'wire s':>22} {'MB sent':>9} {'model':>9}")
    for step in pieces.steps:
        volume = step_volume(recipe, pieces.engine, ranks, step.packs)
        parts = " ".join(f"{_spread(one):>22}" for one in (step.whole, step.alone, step.wire))
        sent = sum(one.sent_bytes for one in step.sent)
        lines.append(
            f"{step.packs:>5} {parts} {sent / 1e6:>9.2f} {(volume.everywhere + volume.in_node) / 1e6:>9.2f}"
        )
    lines += ["", f"A pack takes {pieces.pack_s:.4g} s, an update {pieces.update_s:.4g} s."]
    if pieces.overlap is not None:
        exposed = ", ".join(f"{step.exposed_s:.4g}" for step in pieces.steps)
        lines[-1] += f" The ranks wait {exposed} s for the wire: overlap {pieces.overlap:.0%}."
        lines[-1] += f" In the step the wire takes {pieces.in_step:.2f} times as long as by kinds:"
        lines += ["", f"{'':<15} {'ranks':>5} {'bytes':>12} {'ms':>24} {'bus GB/s':>9}"]
    for one in pieces.collectives:
        lines.append(
            f"{one.kind:<15} {one.ranks:>5} {one.whole_bytes:>12,} {_spread(one.seconds, 1e3):>24} "
            f"{one.bus_bytes_per_s / 1e9:>9.3g}"
        )
    return "\n".join(lines)


def _spread(seconds: Seconds, unit: float = 1.0) -> str:
    return f"{unit * seconds.p50:.4g} ({unit * seconds.p20:.4g}, {unit * seconds.p80:.4g})"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tim_ds.trainer.pieces",
        description="Measures computation, collectives and steps on these ranks, for the scaling model.",
    )
    parser.add_argument("recipe", nargs="+", help="a YAML file, and section.key=value to override settings")
    parser.add_argument("--ds", required=True, type=Path, help="engine file: ds_configs/*.json")
    parser.add_argument("--out", required=True, type=Path, help="JSON for tim_ds.trainer.scaling --measured")
    parser.add_argument(
        "--packs", type=_numbers, default=[1, 2], metavar="N,N", help="packs a rank and step (1,2)"
    )
    parser.add_argument("--image-tokens", type=int, metavar="T", help="of one image (of 1024 pixels a side)")
    parser.add_argument("--repetitions", type=int, default=10, help="of every step (%(default)s)")
    # What the deepspeed launcher adds to every command.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


@command(TimError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line, on every rank. Returns 2 for a wrong recipe, file or number."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_intermixed_args(words)
    paths, overrides = split_arguments(options.recipe)
    if len(paths) != 1:
        parser.error("expected one recipe")
    recipe, engine_config = load_recipe(paths[0], overrides), read_engine_file(options.ds)
    _check_numbers(recipe, options.image_tokens, options.packs, options.repetitions)
    world = start_world()
    failed = True
    try:
        pieces = measure(
            recipe,
            engine_config,
            world,
            image_tokens=options.image_tokens,
            packs=options.packs,
            repetitions=options.repetitions,
            command=f"python -m tim_ds.trainer.pieces {shlex.join(words)}",
        )
        if world.is_main:
            pieces.store(options.out)
            print(page(pieces, recipe))
        failed = False
    finally:
        stop_world(world, failed=failed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
