"""What the ranks of a test's process group do. Results are judged by the tests, in their own process."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import math
import os
import shutil
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.loader import StepLoader
from data_pipeline.storage import Folder
from tests.memory import LiveBytes
from tests.small_files import small_files
from tests.trainer.drawing import draw_where_needed
from tests.trainer.plain import steps_of
from tests.trainer.ranks import UNEVEN_SIZES, engine_file, recipe, write_data
from tim_ds.config.recipe import Recipe, recipe_hash
from tim_ds.errors import CheckpointError, NonFiniteError, RequestError
from tim_ds.model.export_folder import open_export, write_export
from tim_ds.model.init import initial_values
from tim_ds.model.tim import TiM
from tim_ds.pipeline import TiMPipeline
from tim_ds.trainer import assembly
from tim_ds.trainer import checkpoint_folder as folder_module
from tim_ds.trainer import run as run_module
from tim_ds.trainer.assembly import UNITS, build_root, teacher_parameters
from tim_ds.trainer.checkpoint import Piece, find_checkpoints
from tim_ds.trainer.checkpoint_folder import CheckpointFolder
from tim_ds.trainer.ema import Ema
from tim_ds.trainer.engine import (
    Engine,
    Splitter,
    collectives_through,
    merge_config,
    read_engine_file,
    start_world,
    stop_world,
)
from tim_ds.trainer.host_copy import HostCopy
from tim_ds.trainer.in_step import InStep
from tim_ds.trainer.loop import Loop
from tim_ds.trainer.memory import Ranks, estimate
from tim_ds.trainer.metrics import METRICS_FILE
from tim_ds.trainer.pieces import Trial, Wire, measure
from tim_ds.trainer.preview import describe_export
from tim_ds.trainer.run import train
from tim_ds.trainer.scaling import step_volume
from tim_ds.trainer.signals import RunStopped, StopSignals
from tim_ds.trainer.step import StepOutput, TransitionStep
from tim_ds.trainer.watch import Watch
from tim_ds.trainer.world import World

GUIDED = "objective.guided_target={w_gt: 0.5, w_cond: 0.5, start: 0.0, end: 1.0}"
PAIRED = "objective.derivative=paired"
PREVIEW = (
    "train.preview={every_steps: 2, prompts: [a cat, a dog before a cat], sizes: [4x6, 8x4], "
    "num_steps: [1, 3]}"
)
AVERAGES = (
    "train.ema={use: main, averages: [{name: fast, decay: 0.5}, {name: main, decay: 0.9}, "
    "{name: narrow, sigma_rel: 0.1}, {name: wide, sigma_rel: 0.25}], snapshots: {every_steps: 1}}"
)
# Short enough for a run that stops after its first step; a decay that shows in a few; a teacher.
ELSEWHERE = ("train.optimizer.warmup_steps=0", "train.optimizer.weight_decay=0.3", GUIDED)
GATHERS = {"count": 0, "elements": 0}


def shipped(name: str, **zero: Any) -> tuple[int, dict[str, Any]]:
    """Stage and ZeRO settings of a file in ds_configs, changed for two ranks."""
    settings = json.loads((Path(__file__).parents[2] / "ds_configs" / f"{name}.json").read_text())
    settings = {**settings["zero_optimization"], **zero}
    return settings.pop("stage"), settings


LOW_PRECISION = (("bf16_autocast", 0), ("bf16", 2))
OFFLOADED = {"zero2_offload": shipped("zero2_offload"), "zero3_offload": shipped("zero3_offload")}
# Both ranks are one node.
NODES = {"zero3_nodes": shipped("zero3_nodes", zero_hpz_partition_size=2)}


def run_cases(cases: tuple[str, ...], folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """The named cases, one after the other in one process group."""
    _count_gathers()
    world = start_world()
    results = {}
    for name in cases:
        place = folder / name
        if world.is_main:
            place.mkdir(parents=True, exist_ok=True)
        world.barrier()
        results[name] = CASES[name](world, place, shards, poisoned)
    stop_world(world)
    return results


def _count_gathers() -> None:
    plain = dist.all_gather_into_tensor

    def counting(*args: Any, **kwargs: Any) -> Any:
        GATHERS["count"] += 1
        GATHERS["elements"] += (kwargs["output_tensor"] if "output_tensor" in kwargs else args[0]).numel()
        return plain(*args, **kwargs)

    dist.all_gather_into_tensor = counting  # before DeepSpeed takes its reference


def shared_engine_file(world: World, folder: Path, stage: int, **zero: Any) -> Path:
    return world.from_main(engine_file(folder, stage, **zero) if world.is_main else Path())


def build(
    world: World, settings: Recipe, folder: Path, stage: int, root: TransitionStep | None = None, **zero: Any
) -> tuple[Engine, Ema]:
    engine = Engine(
        root or build_root(settings, world.size),
        read_engine_file(shared_engine_file(world, folder, stage, **zero)),
        settings.train,
        packs_per_step=settings.data.packs_per_step,
        world=world,
        units=UNITS,
    )
    return engine, Ema(engine, settings.train.ema)


def micro_batches(settings: Recipe, world: World, num_steps: int) -> list[Any]:
    return steps_of(settings, rank=world.rank, world_size=world.size, num_steps=num_steps)


def take_step(engine: Engine, batches: Any, lr: float = 1e-2) -> Any:
    for i, batch in enumerate(batches):
        engine.backward(engine.forward(batch).loss, last=i == len(batches) - 1)
    return engine.apply(lr)


def masters(engine: Engine) -> dict[str, Tensor]:
    values = {shard.name: shard.master for shard in engine.shards}
    return {name: value.clone() for name, value in engine.full(values)}


def train_every_stage(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, str]:
    """A few steps of the same recipe under every ZeRO stage; on several ranks, some variants too."""
    variants: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
        f"zero{stage}": (stage, (), {}) for stage in range(4)
    }
    variants["zero3_averages"] = (3, (AVERAGES,), {})
    if world.size > 1:
        recomputed = "train.activation_checkpointing=true"
        variants["zero3_recomputed"] = (3, (recomputed,), {})
        for stage in (0, 2):
            variants[f"zero{stage}_single"] = (stage, ("data.packs_per_step=2", recomputed), {})
        variants.update({f"zero{stage}_paired": (stage, (PAIRED,), {}) for stage in range(4)})
        variants["zero3_paired_recomputed"] = (3, (PAIRED, recomputed), {})
        for stage in (0, 1, 3):
            variants[f"zero{stage}_guided"] = (stage, (GUIDED,), {})
        for name, (stage, zero) in {**OFFLOADED, **NODES}.items():
            variants[f"{name}_guided"] = (stage, (GUIDED,), zero)
    for name, (stage, overrides, zero) in variants.items():
        file = shared_engine_file(world, folder, stage, **zero)
        train(recipe(shards, *overrides), folder / name, file, world)
    return {name: str(folder / name) for name in variants}


def train_unevenly(world: World, folder: Path, shards: Path, poisoned: Path) -> None:
    """Every stage, with packs of one image beside packs of many."""
    uneven = folder / "shards"
    if world.is_main:
        write_data(uneven, sizes=UNEVEN_SIZES)
    world.barrier()
    for stage in range(4):
        train(recipe(uneven), folder / f"zero{stage}", shared_engine_file(world, folder, stage), world)


def train_every_combination(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """Stages, with and without accumulation, with and without recomputation; and the packs of their steps."""
    found = {}
    for stage, packs, recomputed in itertools.product(range(4), (1, 2), ("false", "true")):
        place = folder / f"zero{stage}_{packs}_packs_a_rank_recomputed_{recomputed}_{world.size}"
        overrides = (
            f"data.packs_per_step={packs * world.size}",
            f"train.activation_checkpointing={recomputed}",
        )
        train(recipe(shards, *overrides), place, shared_engine_file(world, folder, stage), world)
        found[str(place)] = packs * world.size
    return found


ALIGNED = (
    "objective.repa_weight=0.5",
    "model.z_dim=8",
    "model.encoder_depth=1",
    "model.projector_dim=16",
    "data.image_encoder={kind: patches, width: 8}",
)
ADAPTED = ("train.adapter={rank: 2, alpha: 4}",)


def write_base(folder: Path, shards: Path, *overrides: str) -> Path:
    """An export whose network does something: at its own initialisation every block is the identity."""
    settings = recipe(shards, *overrides)
    network = build_root(settings, 1).network
    generator = torch.Generator().manual_seed(1)
    state = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in network.state_dict().items()
    }
    write_export(folder, describe_export(settings, 7, recipe_hash(settings)), state)
    return folder


def start_from_weights(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """Whole network, adapters and alignment, from the weights of an export, at several stages."""
    base = folder / "base"
    if world.is_main:
        write_base(base, shards)
    world.barrier()
    start = f"train.init_from={base}"
    variants: dict[str, tuple[int, tuple[str, ...]]] = {
        "whole_2": (2, (start,)),
        "aligned_3": (3, ALIGNED),
        **{f"adapted_{stage}": (stage, (start, *ADAPTED)) for stage in range(3)},
        "adapted_paired_3": (3, (start, *ADAPTED, PAIRED)),
    }
    for name, (stage, overrides) in variants.items():
        train(recipe(shards, *overrides), folder / name, shared_engine_file(world, folder, stage), world)
    # Interrupted half-way and continued at another stage.
    first = (start, *ADAPTED, "train.steps=2")
    train(recipe(shards, *first), folder / "continued", shared_engine_file(world, folder, 1), world)
    rest = recipe(shards, start, *ADAPTED)
    train(rest, folder / "continued", shared_engine_file(world, folder, 3), world)
    if world.is_main:
        write_base(folder / "other", shards, "train.seed=5")
    world.barrier()
    changed = recipe(shards, f"train.init_from={folder / 'other'}", *ADAPTED, "train.steps=5")
    try:
        train(changed, folder / "continued", shared_engine_file(world, folder, 1), world)
        refusal = ""
    except CheckpointError as error:
        refusal = str(error)
    return {"base": str(base), "refusal": refusal}


def train_in_low_precision(world: World, folder: Path, shards: Path, poisoned: Path) -> None:
    for precision, stage in (("bf16_autocast", 0), ("bf16_autocast", 3), ("bf16", 1), ("bf16", 3)):
        settings = recipe(shards, f"train.precision={precision}", "train.steps=2")
        file = shared_engine_file(world, folder, stage)
        train(settings, folder / f"{precision}_{stage}", file, world)


def train_with_previews(world: World, folder: Path, shards: Path, poisoned: Path) -> None:
    for stage in (1, 3):
        train(
            recipe(shards, PREVIEW), folder / f"zero{stage}", shared_engine_file(world, folder, stage), world
        )


def begin_everywhere(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """Masters before the first step of every stage, fresh and from exported weights."""
    found: dict[str, Any] = {}
    export = folder / "export"
    for precision, stages in (("fp32", range(4)), ("bf16", range(1, 4))):
        settings = recipe(shards, GUIDED, f"train.precision={precision}")
        if world.is_main and precision == "fp32":
            torch.manual_seed(99)
            write_export(export, describe_export(settings, 0, ""), TiM(settings.model).state_dict())
        world.barrier()
        for start, values in (("fresh", None), ("exported", open_export(export)[1])):
            for stage in stages:
                split = None
                zero = NODES["zero3_nodes"][1] if stage == 3 else {}
                file = read_engine_file(shared_engine_file(world, folder, stage, **zero))
                if stage == 3:
                    split = Splitter(
                        merge_config(file, settings.train, packs_per_step=4, world_size=world.size)
                    )
                root = build_root(settings, world.size, values=values, split=split)
                engine, _ = build(world, settings, folder, stage, root, **zero)
                found[f"{start} {precision} {stage}"] = masters(engine)
    return found


def hold_little(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """Bytes of tensors while a larger network is made and split, beside those before."""
    settings = recipe(shards, GUIDED, "model.hidden_size=128", "model.depth=6")
    export = folder / "export"
    if world.is_main:
        write_export(export, describe_export(settings, 0, ""), TiM(settings.model).state_dict())
    world.barrier()
    file = read_engine_file(shared_engine_file(world, folder, 3))
    merged = merge_config(file, settings.train, packs_per_step=4, world_size=world.size)
    found = {}
    with torch.device("meta"):
        network = TiM(settings.model)
    sizes = [4 * p.numel() for p in network.parameters()]
    for start, values in (
        ("fresh", initial_values(network, 0)),
        ("exported", open_export(export)[1]),
    ):
        # Only what is made from here on is looked at: the process holds a million objects besides.
        gc.collect()
        gc.freeze()
        seen: list[int] = []

        def watched(name: str, like: Tensor, make: Any = values, seen: list[int] = seen) -> Tensor:
            value = make(name, like)
            # Looking is slow: now and then, and always around the largest.
            look = len(seen) % 50 == 0 or value.nbytes == max(sizes)
            seen.append(bytes_alive() if look else 0)
            return value

        root = build_root(settings, world.size, values=watched, split=Splitter(merged))
        found[start] = {"peak": max(seen), "end": bytes_alive(), "questions": len(seen)}
        del root
        gc.unfreeze()
    return {**found, "model": sum(sizes), "largest": max(sizes), "parameters": len(sizes)}


def bytes_alive() -> int:
    """Memory of all tensors that have some, among what `gc` looks at."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def weigh(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """Bytes of the storages of weights, masters, AdamW's averages and the average, beside the estimate."""
    engines: dict[str, tuple[str, int, dict[str, Any]]] = {
        f"zero{stage} fp32": ("fp32", stage, {}) for stage in range(4)
    }
    engines |= {f"zero{stage} bf16": ("bf16", stage, {}) for stage in range(1, 4)}
    engines |= {f"{name} {p}": (p, *engine) for name, engine in OFFLOADED.items() for p in ("fp32", "bf16")}
    found = {}
    for name, (precision, stage, zero) in engines.items():
        settings = recipe(shards, GUIDED, f"train.precision={precision}")
        engine, ema = build(world, settings, folder, stage, None, **zero)
        take_step(engine, micro_batches(settings, world, 1)[0])
        states = [engine.optimizer_state(shard) for shard in engine.shards]
        trained = dict(engine.module.network.named_parameters())  # type: ignore[union-attr]
        frozen = dict(engine.module.teacher.named_parameters())  # type: ignore[union-attr]
        groups = {
            "weights": [_held(p) for p in trained.values()],
            "float32 masters": [shard.master for shard in engine.shards],
            "AdamW averages": [value for state in states for value in state.values()],
            "averaged weights": [value for average in ema.averages.values() for value in average.values()],
            "teacher": [_held(p) for p in frozen.values()],
        }
        storages = {kind: _storages(tensors) for kind, tensors in groups.items()}
        for start in storages["weights"]:
            # Masters that are the weights themselves.
            storages["float32 masters"].pop(start, None)
        predicted = estimate(
            settings, read_engine_file(shared_engine_file(world, folder, stage, **zero)), Ranks(world.size, 2)
        )
        found[name] = {
            "measured": {kind: sum(sizes.values()) for kind, sizes in storages.items()},
            "estimate": {part.name: part.device + part.host for part in predicted.parts},
            "on_host": {part.name for part in predicted.parts if part.host and not part.device},
            "checkpoint": predicted.checkpoint_bytes,
        }
    return found


def _held(parameter: Any) -> Tensor:
    """What a rank keeps of a parameter between steps."""
    return getattr(parameter, "ds_tensor", parameter)


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def train_with_evaluations(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, str]:
    """At ZeRO-3, in one go and stopped in between; and one whose data are missing."""
    from data_pipeline.handwriting import Settings, build

    data = folder / "handwriting"
    if world.is_main:
        build(data, Settings(samples=2, factor=2, text_width=8), progress=False)
    world.barrier()
    kinds = "kinds: [nfe, resolution], num_steps: [1], pictures: 65, held_back: 17, longest: 1"
    asked = f"kind: dpg, size: 8x8, questions: {write_questions(folder, world)}, vqa: {folder / 'vilt'}"
    benchmarks = f"benchmarks: [{{{asked}, batch: 2}}]"
    evaluation = f"train.evaluation={{every_steps: 2, {kinds}, data: {data}, {benchmarks}}}"
    missing = f"train.evaluation={{every_steps: 2, {kinds}, data: {folder / 'nothing'}}}"
    unscored = f"train.evaluation={{every_steps: 2, kinds: [], {benchmarks.replace('vilt', 'none')}}}"
    file = shared_engine_file(world, folder, 3)
    train(recipe(shards, evaluation), folder / "whole", file, world)
    train(recipe(shards, evaluation, "train.steps=2"), folder / "resumed", file, world)
    train(recipe(shards, evaluation), folder / "resumed", file, world)
    refused = []
    for name, setting in (("refused", missing), ("unscored", unscored)):
        try:
            train(recipe(shards, setting), folder / name, file, world)
        except RequestError as error:
            refused.append(str(error))
    only = f"train.evaluation={{every_steps: 1, kinds: [], num_steps: [1], {benchmarks}}}"
    train_through_failures(world, recipe(shards, only), folder)
    previews = "train.preview={every_steps: 1, prompts: [a cat], sizes: [8x8], num_steps: [1]}"
    train_in_step(world, recipe(shards, only, previews, "train.steps=2"), folder)
    return {"data": str(data), "refused": refused[0], "unscored": refused[1]}


def train_through_failures(world: World, settings: Recipe, folder: Path) -> None:
    """At ZeRO-1, where the ranks share the drawing: drawing fails at step 1, scoring at 2, writing at 3."""
    from tim_ds.eval import dpg
    from tim_ds.trainer import benchmarks

    draw, score, write = TiMPipeline.__call__, dpg.score_pictures, benchmarks.write
    drawn: list[int] = []

    def failing_draw(self: TiMPipeline, prompts: Any, *arguments: Any, **named: Any) -> Any:
        drawn.append(len(prompts))
        if world.rank == 1 and self.export.step == 1:
            raise RuntimeError("out of memory")
        return draw(self, prompts, *arguments, **named)

    def failing_score(*arguments: Any, **named: Any) -> Any:
        if failing_write.calls == 2:
            raise ValueError("a scorer with a flaw")
        return score(*arguments, **named)

    class FailingWrite:
        calls = 0

        def __call__(self, output: Any, *arguments: Any) -> None:
            self.calls = output.settings["step"]
            if self.calls == 3 and world.rank == 1:
                raise OSError(28, "No space left on device")
            write(output, *arguments)

    failing_write = FailingWrite()
    with (
        patch.object(TiMPipeline, "__call__", failing_draw),
        patch.object(dpg, "score_pictures", failing_score),
        patch.object(benchmarks, "write", failing_write),
        patch.object(benchmarks, "MEETING_S", 0.01),
    ):
        train(settings, folder / "failing", shared_engine_file(world, folder, 1), world)
    # Three pictures, two a call: two for rank 0 and one for rank 1, in each of four evaluations.
    assert drawn == [2 - world.rank] * 4
    signals, ended = StopSignals(), threading.Event()

    def endless_score(*arguments: Any, **named: Any) -> Any:
        signals.reason = "SIGTERM"
        ended.wait()
        raise RuntimeError("too late for anybody")

    with patch.object(dpg, "score_pictures", endless_score), patch.object(benchmarks, "MEETING_S", 0.01):
        with suppress(RunStopped):
            train(settings, folder / "stopping", shared_engine_file(world, folder, 1), world, signals=signals)
        ended.set()


def train_in_step(world: World, settings: Recipe, folder: Path) -> None:
    """At ZeRO-3, where all ranks draw together: at step 1 the second rank fails within a block."""
    from tim_ds.model.blocks import TransitionBlock

    evaluate, run = TransitionBlock._evaluate, TiMPipeline.run
    drawing: list[int] = []

    def counted(self: TiMPipeline, *arguments: Any, **options: Any) -> Any:
        drawing.append(len(drawing))
        try:
            return run(self, *arguments, **options)
        finally:
            drawing[-1] = -1

    def failing(self: TransitionBlock, *arguments: Any) -> Any:
        # A preview and the first pictures of a benchmark; the copies of a training step pass here too.
        if world.rank == 1 and drawing[-1:] in ([0], [1]):
            raise RuntimeError("out of memory")
        return evaluate(self, *arguments)

    file = shared_engine_file(world, folder, 3)
    with patch.object(TransitionBlock, "_evaluate", failing), patch.object(TiMPipeline, "run", counted):
        train(settings, folder / "in_step", file, world)
    train(settings, folder / "untroubled", file, world)


class RaiseAt(TorchDispatchMode):
    """Raises at the n-th operation on tensors, or the next that is not ZeRO's; n = 0 only counts."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.count = n, 0

    def around(self, action: Callable[[], Any]) -> Any:
        with self:
            return action()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        # While ZeRO gathers, or the ranks ask each other, they cannot leave.
        if self.count == self.n and any(
            "deepspeed" in frame.filename or frame.name == "_one_failed"
            for frame in traceback.extract_stack()
        ):
            self.n += 1
        if self.count == self.n:
            raise RuntimeError(f"at operation {self.n}")
        return func(*args, **(kwargs or {}))


def leave_drawings(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """At ZeRO-3, drawing that fails on one rank, at moments from the first operation to the last."""
    # Some parameters whole on every rank, some split.
    zero = {"stage3_param_persistence_threshold": 100}
    settings = recipe(shards)
    batches = micro_batches(settings, world, 3)
    found: dict[str, Any] = {"told": []}
    ends = []
    for failing in (False, True):
        engine, ema = build(world, settings, folder, 3, None, **zero)
        network: Any = engine.module.network
        pipeline = TiMPipeline(network, describe_export(settings, 0, ""))
        in_step = InStep(network, world)
        draw = partial(pipeline, ["a cat", "a dog"], ["8x8", "4x8"], num_steps=2, cfg_scale=2.0)
        for step, micro in enumerate(batches, start=1):
            assert take_step(engine, micro).applied
            ema.update(step)
            with ema.applied(), torch.no_grad():
                whole: Any = in_step.attempt(draw)[0]
                counted = RaiseAt(0)
                in_step.attempt(partial(counted.around, draw))
                moments = range(1, counted.count, counted.count // 15) if failing and step == 2 else ()
                for number, n in enumerate(moments):
                    one = RaiseAt(n if world.rank == number % world.size else 0)
                    found["told"].append(in_step.attempt(partial(one.around, draw)))
                again: Any = in_step.attempt(draw)[0]
            found["equal"] = all(
                (a == b).all() for a, b in zip(whole.pixels, again.pixels, strict=True)
            ) and found.get("equal", True)
        ends.append(masters(engine))
    found["masters_equal"] = all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    found["hooks"] = sum("forward" in module.__dict__ for module in network.modules())
    return found


def write_questions(folder: Path, world: World) -> Path:
    """Three prompts of DPG-Bench, and a ViLT in the folder `vilt`."""
    from tests.eval.tiny_scorers import save_vilt

    path = folder / "dpg_bench.csv"
    if world.is_main:
        save_vilt(folder / "vilt")
        path.write_text(
            "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
            "dog,a dog,1,0,entity - whole (dog),is there a dog?\n"
            "cat,a cat,1,0,entity - whole (cat),is there a cat?\n"
            "car,a car,1,0,entity - whole (car),is there a car?\n"
        )
    world.barrier()
    return path


def average_by_hand(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """EMA of the full masters, computed beside the sharded one, for several stages and precisions."""
    found = {}
    for stage, precision in ((0, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")):
        settings = recipe(shards, f"train.precision={precision}")
        engine, ema = build(world, settings, folder, stage)
        by_hand = masters(engine)
        for step, batches in enumerate(micro_batches(settings, world, 2), start=1):
            assert take_step(engine, batches).applied
            ema.update(step)
            for name, value in masters(engine).items():
                by_hand[name].lerp_(value, 1.0 - (settings.train.ema.used.decay or 0.0))
        moved = max(float((by_hand[name] - value).abs().max()) for name, value in masters(engine).items())
        error = max(float((by_hand[name] - value).abs().max()) for name, value in ema.full())
        found[f"zero{stage} {precision}"] = {
            "error": error,
            "moved": moved,
            "dtypes": {str(value.dtype) for value in ema.values.values()},
            "elements": sum(value.numel() for value in ema.values.values()),
            "parameters": sum(p.numel() for p in build_root(settings, 1).parameters()),
        }
    return found


def borrow_average(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """Sampling from the averaged weights while training: what it sees, and whether training notices."""
    found = {}
    settings = recipe(shards)
    batches = micro_batches(settings, world, 3)
    every_rank_same = micro_batches(settings, World(), 1)[0][0]
    # At stage 3, parameters above the threshold are partitioned and smaller ones kept whole: some of each.
    some_whole = {"stage3_param_persistence_threshold": 100}
    engines: dict[str, tuple[int, dict[str, Any]]] = {
        "zero0": (0, {}),
        "zero2": (2, {}),
        "zero3": (3, some_whole),
        "zero2_offload": OFFLOADED["zero2_offload"],
        "zero3_offload": shipped("zero3_offload", **some_whole),
        **NODES,
    }
    for name, (stage, zero) in engines.items():
        ends = []
        seen: dict[str, float] = {}
        for borrow in (False, True):
            engine, ema = build(world, settings, folder, stage, None, **zero)
            for step, micro in enumerate(batches, start=1):
                take_step(engine, micro)
                ema.update(step)
                if borrow and step == 2:
                    reference = build_root(settings, 1).network
                    full = {name.removeprefix("network."): value.clone() for name, value in ema.full()}
                    reference.load_state_dict(full)
                    with ema.applied() as module, torch.no_grad():
                        network: Any = module.network
                        x = every_rank_same
                        arguments = (x.x_TC, x.times.t_S, x.times.r_S, x.segments, x.condition)
                        seen["error"] = float(
                            (network(*arguments).F_TC - reference(*arguments).F_TC).abs().max()
                        )
                        seen["size"] = float(reference(*arguments).F_TC.abs().max())
            ends.append(masters(engine))
        plain, borrowed = ends
        seen["masters_equal"] = float(all(torch.equal(plain[name], borrowed[name]) for name in plain))
        found[name] = seen
    return found


class CountingScorer:
    """A scorer that needs no model."""

    def __init__(self, device: str) -> None: ...

    def score(self, captions: list[str], pictures: Any) -> dict[str, float | None]:
        return {"pictures": float(len(pictures))}


def gather_little(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """Bytes that previews, evaluations and export take at the most, where the average is split."""
    prompts = folder / "prompts.txt"
    if world.is_main:
        prompts.write_text("a bird\na bird beside a tree\n")
    world.barrier()
    settings = recipe(
        shards,
        # Blocks that are large beside the embedders, and a network that is large beside its activations.
        "model.hidden_size=64",
        "model.num_heads=2",
        "model.depth=4",
        "train.steps=1",
        "train.optimizer.warmup_steps=0",
        "train.preview={every_steps: 1, prompts: [a cat], sizes: [4x6], num_steps: [2]}",
        f"train.evaluation={{every_steps: 1, kinds: [resolution], prompts_file: {prompts}, sizes: [4x6], "
        f"num_steps: [2], scorer: '{__name__}:CountingScorer'}}",
    )
    looked, exported = Loop._on_average, run_module.export
    watch = Watch()
    peaks: dict[str, int] = {}
    moves: dict[str, int] = {}
    refusals: list[str] = []

    def beside(ema: Ema) -> LiveBytes:
        """What is taken beside weights, masters and averages."""
        engine = ema._engine
        averages = [value for average in ema.averages.values() for value in average.values()]
        weights = [_held(p) for p in engine.module.parameters()]
        return LiveBytes([*weights, *(shard.owner for shard in engine.shards), *averages], collects=False)

    def look(self: Loop, action: Any, step: int) -> None:
        before = watch._moves
        with beside(self.ema) as live:
            looked(self, action, step)
        peaks[type(action).__name__] = live.peak
        moves[type(action).__name__] = watch._moves - before

    def export(settings: Recipe, run_dir: Path, ema: Ema, *arguments: Any) -> None:
        before = watch._moves
        with beside(ema) as live:
            exported(settings, run_dir, ema, *arguments)
        peaks["export"] = live.peak
        moves["export"] = watch._moves - before
        with small_files(8192 if world.is_main else None):
            try:
                exported(settings, folder / "full", ema, *arguments)
            except CheckpointError as error:
                refusals.append(str(error))

    class Entered(Engine):
        """Takes note of whether the weights are split before DeepSpeed sees the network."""

        def __init__(self, module: Any, *arguments: Any, **named: Any) -> None:
            split.append(all(hasattr(p, "ds_tensor") for p in module.parameters()))
            super().__init__(module, *arguments, **named)

    split: list[bool] = []
    found: dict[str, Any] = {"split": split}
    for stage in (1, 2, 3):
        file = shared_engine_file(world, folder, stage, **(TIGHT if stage == 3 else {}))
        with (
            patch.object(Loop, "_on_average", look),
            patch.object(run_module, "export", export),
            patch.object(run_module, "Engine", Entered),
        ):
            train(settings, folder / f"zero{stage}", file, world, watch=watch)
        found[f"zero{stage}"] = {"peaks": dict(peaks), "moves": dict(moves)}
    network: Any = build_root(settings, 1).network
    modules = {"network": network, "module": network.blocks[0]}
    sizes = {name: 4 * sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    tensors = len(list(network.parameters()))
    return {**found, "sizes": sizes, "tensors": tensors, "refusals": refusals}


# Nothing stays gathered between a module's forward and its backward, and nothing is fetched ahead.
TIGHT = {
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


def watch_trace(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, dict[str, list[Any]]]:
    """All-gathers of each step under ZeRO-3, with packs of which many hold no transition image."""
    mixed = ("objective.diffusion_share=0.9", "objective.consistency_share=0.05")
    flow_matching = (
        "objective.diffusion_share=1.0",
        "objective.consistency_share=0.0",
        "sampler.mode=diffusion",
    )
    variants: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "dde": (mixed, {}),
        "paired": ((*mixed, PAIRED), {}),
        "dde_tight": (mixed, TIGHT),
        "paired_tight": ((*mixed, PAIRED), TIGHT),
        "flow_matching_tight": (flow_matching, TIGHT),
    }
    recomputed = "train.activation_checkpointing=true"
    for name in ("dde_tight", "paired_tight", "flow_matching_tight"):
        overrides, zero = variants[name]
        variants[f"{name}_recomputed"] = ((*overrides, recomputed), zero)
    found = {}
    for name, (overrides, zero) in variants.items():
        settings = recipe(shards, *overrides)
        engine, _ = build(world, settings, folder, 3, None, **zero)
        coordinator = engine._engine.optimizer.parameter_offload.get_param_coordinator()
        watched: dict[str, list[Any]] = {
            "gathers": [],
            "elements": [],
            "complete": [],
            "without_transition": [],
            "parameters": [sum(math.prod(shape) for shape in engine.parameter_shapes.values())],
        }
        for batches in micro_batches(settings, world, 4 if zero else 6):
            before = dict(GATHERS)
            take_step(engine, batches)
            watched["gathers"].append(GATHERS["count"] - before["count"])
            watched["elements"].append((GATHERS["elements"] - before["elements"]) / len(batches))
            watched["complete"].append(coordinator.is_complete_trace())
            watched["without_transition"] += [not batch.times.transition_indices for batch in batches]
        found[name] = watched
    return found


class _Wire(TorchDispatchMode):
    """Bytes that this rank sends in collectives, as rings: (N - 1) / N of a whole tensor for a gather, a
    scatter or a reduction to one, twice that where everyone gets the sum."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.share = (world.size - 1) / world.size
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            whole = max((x.numel() * x.element_size() for x in tensors), default=0)
            twice = func.__name__.startswith("allreduce_")
            self.sent += (2 if twice else 1) * self.share * whole
        return func(*args, **(kwargs or {}))


def count_traffic(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, tuple[float, float]]:
    """Bytes that a rank sends in a step, counted, and as the scaling model has them."""
    whole = {**TIGHT, "stage3_param_persistence_threshold": 0}
    variants: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
        "zero0": (0, (), {}),
        "zero1": (1, (), {}),
        "zero1_guided": (1, (GUIDED,), {}),
        "zero2": (2, (), {}),
        "zero2_to_one": (2, (), {"use_multi_rank_bucket_allreduce": False}),
        "zero3": (3, (), whole),
        "zero3_guided": (3, (GUIDED,), whole),
        "zero3_kept": (3, (), {"stage3_param_persistence_threshold": 0}),
        "zero3_nodes": (3, (), {**whole, "zero_hpz_partition_size": 2}),
        "zero3_small": (3, (), {**TIGHT, "stage3_param_persistence_threshold": 500}),
        "zero3_small_guided": (3, (GUIDED,), {**TIGHT, "stage3_param_persistence_threshold": 500}),
        # 45,000 parameters.
        "zero3_ahead": (
            3,
            ("model.depth=8", "data.packs_per_step=2"),
            {**whole, "stage3_max_live_parameters": 20_000, "stage3_prefetch_bucket_size": 2_000},
        ),
    }
    found = {}
    for name, (stage, overrides, zero) in variants.items():
        settings = recipe(shards, *overrides)
        engine, ema = build(world, settings, folder, stage, None, **zero)
        root: Any = engine.module
        teacher = teacher_parameters(root)
        # The first step of ZeRO-3 records what the second follows.
        for step, batches in enumerate(micro_batches(settings, world, 2), start=1):
            with _Wire(world) as wire:
                take_step(engine, batches)
                ema.update(step)
                if teacher:
                    ema.write_into(teacher)
        packs = settings.data.packs_per_step // world.size
        file = read_engine_file(shared_engine_file(world, folder, stage, **zero))
        volume = step_volume(settings, file, Ranks(world.size, world.size), packs)
        found[name] = (wire.sent, volume.everywhere + volume.in_node)
    return found


def measure_pieces(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """The pieces of a step, and steps whose wire is cut."""
    found: dict[str, Any] = {"stored": []}
    for stage, overrides in ((2, (GUIDED,)), (3, ())):
        settings = recipe(shards, *overrides, "data.text_encoder.max_tokens=2")
        engine = read_engine_file(shared_engine_file(world, folder, stage))
        pieces = measure(settings, engine, world, image_tokens=6, repetitions=3)
        path = folder / f"{world.rank}_{stage}.json"
        pieces.store(path)
        modelled = [step_volume(settings, engine, Ranks(2, 2), step.packs) for step in pieces.steps]
        found["stored"].append((path, [volume.everywhere for volume in modelled]))
    wire = Wire(fills=True)

    def wrap(backend: Any) -> Wire:
        wire.backend = backend
        return wire

    with collectives_through(wrap):
        trial = Trial(settings, engine, world, wire, image_tokens=6)
        for _ in range(2):
            trial.step(1)
        before = masters(trial.engine)
        with wire.cut():
            # Nobody waits: the ranks take different numbers of steps.
            for _ in range(1 + world.rank):
                trial.step(1)
        trial.step(1)
        found["kept"] = all(torch.equal(before[name], value) for name, value in masters(trial.engine).items())
    return found


def refresh_teacher(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """What a rank holds of the teacher under ZeRO-3 between steps, and what refreshing it sends."""
    settings = recipe(shards, GUIDED, AVERAGES)
    engine, ema = build(world, settings, folder, 3)
    root: Any = engine.module
    teacher = teacher_parameters(root)
    sent = 0
    for step, batches in enumerate(micro_batches(settings, world, 2), start=1):
        take_step(engine, batches)
        ema.update(step)
        before = dict(GATHERS)
        ema.write_into(teacher)
        sent += GATHERS["elements"] - before["elements"]
    pieces = {shard.name: shard for shard in engine.shards}
    held: Any = {name: p.ds_tensor for name, p in teacher.items()}  # type: ignore[attr-defined]
    return {
        "sent": sent,
        "whole": sum(p.numel() for p in teacher.values()),
        "held": sum(pieces[name].numel for name in held if name in pieces),
        "stored": sum(value.numel() for value in held.values()),
        "parameters": sum(math.prod(shape) for shape in engine.parameter_shapes.values()),
        "trained": sorted(set(engine.parameter_shapes) & {f"teacher.{name}" for name in teacher}),
        "equal": all(
            torch.equal(held[name][: piece.numel], ema.averages["main"][name])
            for name, piece in pieces.items()
        ),
        "other": any(
            not torch.equal(held[name][: piece.numel], ema.averages["fast"][name])
            for name, piece in pieces.items()
        ),
    }


def meet_poison(world: World, folder: Path, shards: Path, poisoned: Path) -> None:
    """A sample whose loss is not finite, at every stage."""
    for stage in range(4):
        train(recipe(poisoned), folder / f"zero{stage}", shared_engine_file(world, folder, stage), world)


class _PoisonedGradient(torch.autograd.Function):
    """Passes a value on, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.nan


class _PoisonedStep(TransitionStep):
    poisoned = False

    def forward(self, inputs: Any) -> StepOutput:
        output = super().forward(inputs)
        return output._replace(loss=_PoisonedGradient.apply(output.loss)) if self.poisoned else output


def meet_poisoned_gradient(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """A finite loss with a gradient that is not, in one micro-step of the last rank."""
    found = {}
    engines: dict[str, tuple[str, int, dict[str, Any]]] = {
        f"zero{stage}": ("fp32", stage, {}) for stage in range(4)
    }
    engines |= {name: ("fp32", *engine) for name, engine in OFFLOADED.items()}
    engines |= {f"{precision} {stage}": (precision, stage, {}) for precision, stage in LOW_PRECISION}
    for name, (precision, stage, zero) in engines.items():
        settings = recipe(shards, f"train.precision={precision}")
        root: Any = build_root(settings, world.size)
        root.__class__ = _PoisonedStep
        engine, _ = build(world, settings, folder, stage, root, **zero)
        steps = micro_batches(settings, world, 3)
        first = take_step(engine, steps[0]).applied
        before = masters(engine)
        root.poisoned = world.rank == world.size - 1
        refused = take_step(engine, steps[1]).applied
        kept = all(torch.equal(before[name], value) for name, value in masters(engine).items())
        root.poisoned = False
        # Nothing of the refused step may be left in an accumulation buffer.
        again = take_step(engine, steps[2])
        other, _ = build(world, settings, folder, stage, None, **zero)
        take_step(other, steps[0])
        clean = take_step(other, steps[2])
        same = all(torch.equal(value, masters(other)[name]) for name, value in masters(engine).items())
        found[name] = {
            "applied": (first, refused, again.applied, clean.applied),
            "kept": kept,
            "same_as_without": same,
        }
    return found


def meet_poisoned_gradient_in_a_run(
    world: World, folder: Path, shards: Path, poisoned: Path
) -> dict[str, list[str]]:
    """The same in a run, in its second step: the samples of that step on both ranks."""
    plain, steps = assembly.TransitionStep, []
    settings = recipe(shards, "train.steps=3")

    class Poisoned(_PoisonedStep):
        def forward(self, inputs: Any) -> StepOutput:
            steps.append(inputs.step)
            self.poisoned = inputs.step == 1 and world.rank == world.size - 1
            return super().forward(inputs)

    assembly.TransitionStep = Poisoned  # type: ignore[misc]  # put back below
    train(settings, folder / "run", shared_engine_file(world, folder, 2), world)
    assembly.TransitionStep = plain  # type: ignore[misc]  # as it was
    assert 1 in steps
    keys = [key for batch in micro_batches(settings, world, 2)[1] for key in batch.keys]
    return {"samples": [key for part in world.gather(keys) for key in part]}


def give_up(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """Nothing but poison: the run ends at its limit, twice; and gradients of one rank alone, at ZeRO-3."""
    if world.is_main:
        write_data(folder / "shards", poison=dict.fromkeys(range(64), 1e25))
    world.barrier()
    settings = recipe(folder / "shards", "train.max_skipped_steps=2", "train.steps=50")
    file = shared_engine_file(world, folder, 1)
    messages = []
    for _ in range(2):
        try:
            train(settings, folder / "run", file, world)
        except NonFiniteError as error:
            messages.append(str(error))

    class Poisoned(_PoisonedStep):
        def forward(self, inputs: Any) -> StepOutput:
            self.poisoned = inputs.step >= 1 and world.rank == world.size - 1
            return super().forward(inputs)

    settings = recipe(shards, "train.max_skipped_steps=2", "train.steps=50")
    gradients = ""
    with patch.object(assembly, "TransitionStep", Poisoned):
        try:
            train(settings, folder / "gradients", shared_engine_file(world, folder, 3), world)
        except NonFiniteError as error:
            gradients = str(error)
    steps = {
        name: [c.step for c in find_checkpoints(folder / name / "checkpoints")]
        for name in ("run", "gradients")
    }
    return {"messages": messages, "gradients": gradients, "steps": steps}


def fill_the_disk(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """Saves that fail in every way a full disk can make them fail, between two that succeed."""
    keeper = CheckpointFolder(folder / "checkpoints", world, keep=5)
    values = torch.arange(4000.0)

    def save(step: int) -> str | None:
        pieces = iter([Piece("master", "w", world.rank * 4000, values + world.rank)])
        try:
            keeper.save(step, pieces, {}, {"progress": {"step": step}, "world_size": world.size})
        except CheckpointError as error:
            return str(error)
        return None

    def left() -> list[str]:
        world.barrier()
        return sorted(path.name for path in (folder / "checkpoints").iterdir())

    results: dict[str, Any] = {"first": save(1)}
    last = world.size - 1
    with small_files(8192 if world.rank == last else None):
        results["half_written"] = save(2)
    results["left_after_half"] = left()
    plain = shutil.disk_usage
    if world.is_main:
        shutil.disk_usage = lambda path: plain(path)._replace(free=1000)  # type: ignore[assignment]
    results["no_room"] = save(3)
    shutil.disk_usage = plain
    results["left_after_no_room"] = left()
    import tim_ds.trainer.checkpoint_folder as module

    write = module.write_flushed

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    module.write_flushed = full
    results["no_manifest"] = save(4)
    module.write_flushed = write
    results["left_after_no_manifest"] = left()
    results["second"] = save(5)
    results["newest"] = None if (found := keeper.newest()) is None else found.step
    return results


def save_on_a_bad_disk(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """Runs whose saves at some steps are refused: by the disk of the last rank, or by all."""
    settings = ("train.steps=6", "train.checkpoint={every_steps: 2, keep: 2}")
    file = shared_engine_file(world, folder, 1)
    plain = folder_module.write_rank_file
    signals = StopSignals()

    def run(name: str, refused: tuple[int, ...], *, stop_after: int | None = None) -> str:
        def write(path: Path, tensors: Any) -> Any:
            if path.parent.name in {f".tmp-step_{step:09d}" for step in refused} and world.rank == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain(path, tensors)

        def step(self: Loop, micro_batches: Any) -> None:
            plain_step(self, micro_batches)
            # Whatever the disk, the write is over when the loop looks.
            self.saves._settle(wait=True)
            if self.progress.step == stop_after:
                signals.reason = "SIGTERM"

        plain_step = Loop._step
        signals.reason = None
        with patch.object(folder_module, "write_rank_file", write), patch.object(Loop, "_step", step):
            try:
                return train(recipe(shards, *settings), folder / name, file, world, signals=signals)
            except CheckpointError as error:
                return str(error)

    found: dict[str, Any] = {
        "folder": str(folder),
        "goes on": run("goes on", (2,)),
        "last fails": run("last fails", (6,)),
        "stopped": run("stopped", (4, 5), stop_after=3),
    }
    if world.is_main:
        # In the store of a group that goes on to other runs.
        world.store("stop").delete_key("last_step")
    found["left by the stopped"] = [c.step for c in find_checkpoints(folder / "stopped" / "checkpoints")]
    world.barrier()
    return {**found, "stopped, again": run("stopped", ())}


def save_first(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, Any]:
    """Who makes the memory of the saves, and after how many steps."""
    plain_make, plain_step = HostCopy._make, Loop._step
    steps: list[int] = []
    made: list[tuple[str, int]] = []

    def make(self: HostCopy, layout: Any) -> None:
        made.append((threading.current_thread().name, len(steps)))
        plain_make(self, layout)

    def step(self: Loop, micro_batches: Any) -> None:
        plain_step(self, micro_batches)
        steps.append(self.progress.step)

    HostCopy._make, Loop._step = make, step
    settings = recipe(shards, "train.steps=3", "train.checkpoint.every_steps=2")
    train(settings, folder / "run", shared_engine_file(world, folder, 2), world)
    HostCopy._make, Loop._step = plain_make, plain_step
    saved = find_checkpoints(folder / "run" / "checkpoints")
    return {"made": made, "saved": sorted(checkpoint.step for checkpoint in saved)}


def ask_again(world: World, folder: Path, shards: Path, poisoned: Path) -> str:
    """A run whose requests for data fail: for every pack, one on rank 0 and two on rank 1. Rank 1 takes more
    memory of its GPU, and rank 0 of its host."""
    asked = itertools.count(1)
    memory = {"memory_gib": 10.0 + world.rank, "host_memory_gib": 5.0 - world.rank}
    with (
        patch.object(Folder, "num_retries", property(lambda _: next(asked) * (1 + world.rank))),
        patch("tim_ds.trainer.loop.memory_of_process", lambda: memory),
    ):
        train(recipe(shards), folder / "run", shared_engine_file(world, folder, 1), world)
    return str(folder / "run")


def cut_an_interval(world: World, folder: Path, shards: Path, poisoned: Path) -> str:
    """A run that is continued after step 3 of the four between two lines."""
    settings = recipe(shards, "train.log_every=4", "train.checkpoint.every_steps=3")
    file = shared_engine_file(world, folder, 1)
    train(settings, folder / "run", file, world)
    if world.is_main:
        shutil.copy(folder / "run" / METRICS_FILE, folder / "whole.jsonl")
        shutil.rmtree(folder / "run" / "checkpoints" / "step_000000004")
        manifest = folder / "run" / "checkpoints" / "step_000000003" / "manifest.json"
        content = json.loads(manifest.read_text())
        assert content["interval_seconds"] > 0
        manifest.write_text(json.dumps({**content, "interval_seconds": 1000.0}))
    world.barrier()
    train(settings, folder / "run", file, world)
    return str(folder)


def refuse_other_runs(world: World, folder: Path, shards: Path, poisoned: Path) -> dict[str, str]:
    """The same folder, asked to continue with something else."""
    file = shared_engine_file(world, folder, 1)
    train(recipe(shards, "train.steps=2"), folder / "run", file, world)
    answers = {}
    for name, overrides, data in (
        ("model", ("model.depth=3", "objective.diffusion_share=0.25"), shards),
        ("data", (), poisoned),
        ("harmless", ("train.log_every=5", "train.checkpoint.keep=1", "train.steps=2"), shards),
    ):
        try:
            answers[name] = train(recipe(data, *overrides), folder / "run", file, world)
        except CheckpointError as error:
            answers[name] = str(error)
    # As if an encoder ran, whose weights were replaced since.
    manifest = folder / "run" / "checkpoints" / "step_000000002" / "manifest.json"
    if world.is_main:
        content = {**json.loads(manifest.read_text()), "encoders": {"text_encoder": {"revision": "old"}}}
        manifest.write_text(json.dumps(content))
    world.barrier()
    running = property(lambda _: {"text_encoder": {"path": "there", "revision": "new"}})
    with patch.object(StepLoader, "encoders", running):
        try:
            train(recipe(shards, "train.steps=3"), folder / "run", file, world)
        except CheckpointError as error:
            told_by_one = world.shared_error is error
            answers["encoders"] = f"{error} ({'told by one' if told_by_one else 'told by each'})"
    return answers


def continue_elsewhere(world: World, folder: Path, shards: Path, poisoned: Path) -> list[str]:
    """Continue a run that another group of ranks began, under other ZeRO stages."""
    (task,) = folder.glob("*.task")
    steps, names = task.read_text().split(":")
    engines = {**{f"zero{stage}": (stage, {}) for stage in range(4)}, **OFFLOADED, **NODES}
    messages = []
    for steps_now, name in zip(steps.split(), names.split(), strict=True):
        stage, zero = engines[name]
        file = shared_engine_file(world, folder, stage, **zero)
        messages.append(
            train(recipe(shards, *ELSEWHERE, f"train.steps={steps_now}"), folder / "run", file, world)
        )
    return messages


CASES: dict[str, Callable[[World, Path, Path, Path], Any]] = {
    function.__name__: function
    for function in (
        train_every_stage,
        train_unevenly,
        train_every_combination,
        train_in_low_precision,
        train_with_previews,
        draw_where_needed,
        begin_everywhere,
        hold_little,
        weigh,
        train_with_evaluations,
        leave_drawings,
        average_by_hand,
        borrow_average,
        gather_little,
        watch_trace,
        count_traffic,
        measure_pieces,
        refresh_teacher,
        meet_poison,
        meet_poisoned_gradient,
        meet_poisoned_gradient_in_a_run,
        give_up,
        fill_the_disk,
        save_on_a_bad_disk,
        save_first,
        ask_again,
        cut_an_interval,
        refuse_other_runs,
        continue_elsewhere,
        start_from_weights,
    )
}
