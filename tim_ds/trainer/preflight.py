"""Everything that can be known of a run before it runs: `launch/train.py --check RECIPE --ds FILE`.

Each part is looked at even where another has a problem; all problems are listed at the end. Nothing is
written, into the run folder or elsewhere. Under a launcher all ranks take part, and the step is the run's;
without one, `--ranks` says how many the run will have, and the step is that of one of them.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from data_pipeline.encoders.autoencoder import build_autoencoder
from data_pipeline.encoders.identity import revision, text_width
from data_pipeline.encoders.weight_files import check_weights
from data_pipeline.errors import DataError
from data_pipeline.index import Index, load_index
from data_pipeline.loader import StepLoader, build_loader, load_null_states
from data_pipeline.online import OnlineReader
from data_pipeline.packing import StepPlan
from data_pipeline.reader import ShardReader
from tim_ds.config.load import load_recipe
from tim_ds.config.recipe import Recipe, recipe_hash
from tim_ds.errors import TimError
from tim_ds.model.export_folder import meta_network
from tim_ds.model.ops import prove_attention
from tim_ds.pipeline import TiMPipeline
from tim_ds.trainer.agreement import DataFacts, check_parts, check_same_run
from tim_ds.trainer.assembly import UNITS, build_root, initial_weights, prepare_of
from tim_ds.trainer.checkpoint import find_checkpoints
from tim_ds.trainer.checkpoint_folder import SPARE_BYTES, free_bytes
from tim_ds.trainer.ema import Ema
from tim_ds.trainer.ema_profiles import remark_on_start
from tim_ds.trainer.engine import (
    Engine,
    Splitter,
    merge_config,
    read_engine_file,
    start_world,
    stop_world,
    zero_stage,
)
from tim_ds.trainer.flops import PackShape
from tim_ds.trainer.host_copy import available_bytes
from tim_ds.trainer.inputs import StepInputs
from tim_ds.trainer.meeting import START_WITHIN_S
from tim_ds.trainer.memory import GIB, RUNTIME_BYTES, MemoryEstimate, Ranks, estimate
from tim_ds.trainer.preview import describe_export
from tim_ds.trainer.run import CHECKPOINTS
from tim_ds.trainer.scaling import expected_flops
from tim_ds.trainer.world import World

T = TypeVar("T")

SAMPLES_READ = 16
"""Samples that are read and decoded, spread evenly over the index."""
PER_NODE = 8
"""Ranks of a node, where nothing is said."""


@dataclass
class Findings:
    """What is found, part by part."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _told: bool = field(default=False, init=False)

    def tell(self) -> None:
        """Print what was found since the last time."""
        text = "\n".join(self.lines)
        print(text if self._told else text.lstrip("\n"), flush=True)
        self._told = True
        self.lines.clear()

    def title(self, name: str) -> None:
        self.lines += ["", name]

    def say(self, name: str, text: str) -> None:
        self.lines.append(f"  {name:<18} {text}")

    def attempt(self, action: Callable[[], T]) -> T | None:
        """The result of `action`; None, and one problem or several, if it cannot be had."""
        try:
            return action()
        except (TimError, DataError) as error:
            # Indented lines belong to the one above them.
            self.problems += re.split(r"\n(?! )", str(error))
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            self.problems.append(f"{type(error).__name__}: {error}")
        return None


def check(
    recipe_file: str,
    overrides: Sequence[str],
    engine_file: Path,
    run_dir: Path | None,
    *,
    ranks: int | None = None,
    per_node: int | None = None,
    card_gib: float | None = None,
    with_step: bool = True,
    start_within_s: float = START_WITHIN_S,
) -> int:
    """Look at everything, print it on rank 0. Returns 0, or 2 if there is a problem; called by all ranks.

    Raises:
        RankAbsentError: if a rank did not start.
    """
    found = Findings()
    recipe = found.attempt(lambda: load_recipe(recipe_file, overrides))
    engine_config = found.attempt(lambda: read_engine_file(engine_file))
    world = start_world(start_within_s=start_within_s)
    launched = world.size > 1
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
    size = world.size if launched else ranks or 1
    planned = Ranks(size, per_node or (on_host if launched else 0) or min(PER_NODE, size))
    tried = True
    if recipe is not None:
        _look_at_recipe(found, recipe)
        index, loader = _look_at_data(found, recipe, world, planned)
        _look_at_encoders(found, recipe, loader)
        _look_at_drawing(found, recipe, world, run_dir)
        _look_at_start(found, recipe, run_dir, index)
        _look_at_device(found, recipe, world)
        if engine_config is not None:
            images = None if loader is None else max(map(len, loader.plan.step(0).packs))
            online = None if index is None else index.online
            needs = _look_at_machine(
                found, recipe, engine_config, world, planned, images, online, run_dir, card_gib
            )
            if index is not None:
                found.attempt(lambda: check_parts(recipe, engine_config, DataFacts.of(index)))
            if any(world.gather(found.problems)):
                found.title("one step")
                found.say("not taken", "because of the problems below; a check without them may find others")
            elif with_step:
                found.title("one step")
                tried = _has_room(found, needs, world, on_host)
                if tried:
                    if world.is_main:
                        # It may take minutes, without a word.
                        found.tell()
                    _take_step(found, recipe, engine_config, world, planned)
    problems = list(dict.fromkeys(p for part in world.gather(found.problems) for p in part))
    if world.is_main:
        found.tell()
        if problems:
            print(f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''}:", file=sys.stderr)
            for problem in problems:
                print(textwrap.indent(problem, "  "), file=sys.stderr)
        else:
            print("\nno problems: the run can begin" if tried else "\nno problems; the step is untried")
    stop_world(world)
    return 2 if problems else 0


def _look_at_recipe(found: Findings, recipe: Recipe) -> None:
    config, objective = recipe.train, recipe.objective
    found.title("recipe")
    found.say("name", f"{recipe.name}, hash {recipe_hash(recipe)}")
    found.say("objective", f"{objective.transport.kind}, derivative {objective.derivative}")
    found.say(
        "precision",
        f"{config.precision}, activation checkpointing {str(config.activation_checkpointing).lower()}",
    )
    if (remark := remark_on_start(config)) is not None:
        found.say("average", remark)
    if config.init_from is not None:
        found.say(
            "starts from", f"{config.init_from}{' with adapters' if config.adapter is not None else ''}"
        )


def _look_at_data(
    found: Findings, recipe: Recipe, world: World, planned: Ranks
) -> tuple[Index | None, StepLoader[StepInputs] | None]:
    data, config = recipe.data, recipe.train
    found.title("data")
    index = found.attempt(lambda: load_index(data.shards, kept_in=data.index, verify=True))
    if index is None:
        found.say("shards", f"{data.shards}: not there; packs, epochs and operations are not known")
        return None, None
    found.say(
        "shards",
        f"{index.folder}: {len(index.shards)} of {sum(index.shard_bytes) / GIB:.2f} GiB, {len(index):,} "
        f"samples, hash {index.hash}",
    )
    if index.num_bad:
        found.say(
            "left out", f"{index.num_bad:,} samples that break the schema; one: {' '.join(index.bad[0])}"
        )
    if world.is_main:
        _read_some(found, index, recipe)
    loader = found.attempt(
        lambda: build_loader(
            data,
            patch_size=recipe.model.patch_size,
            rank=world.rank if world.size > 1 else 0,
            world_size=planned.size,
            seed=config.seed,
            num_steps=1,
            finish=prepare_of(recipe, DataFacts.of(index)),
            device=world.device,
        )
    )
    if loader is None:
        return index, None
    plan = loader.plan
    step = plan.step(0)
    tokens = sum(plan_tokens(index, step, recipe.model.patch_size))
    steps = plan.steps_per_epoch
    found.say("an epoch", f"{len(index) - plan.left_out_per_epoch:,} images in {steps:,} steps")
    found.say("the run", f"{config.steps:,} steps, {config.steps / steps:,.2f} epochs")
    found.say(
        "a step",
        f"{data.packs_per_step} packs, {data.packs_per_step // planned.size} a rank on {planned.size} "
        f"rank{'s' if planned.size > 1 else ''}; the first has {step.num_images:,} images, {tokens:,} tokens",
    )
    found.say(
        "fill and balance",
        f"{plan.fill():.1%} of the tokens of a pack; dearest pack / mean {plan.balance():.3f}",
    )
    null_length = 0
    if recipe.objective.guided_target is not None and index.has_text:
        null_length = len(load_null_states(data, index.text_width))
    filled = data.text_encoder is not None and data.text_encoder.padding == "constant"
    packs = pack_shapes(index, step, recipe.model.patch_size, filled=filled)
    operations = sum(
        expected_flops(recipe, pack, max(pack.text_lengths or (0,)) if filled else null_length).model
        for pack in packs
    )
    found.say("operations", f"{operations:.3e} FLOP a step over all ranks (matrix products and attention)")
    return index, loader


def _read_some(found: Findings, index: Index, recipe: Recipe) -> None:
    chosen = np.unique(np.linspace(0, len(index) - 1, SAMPLES_READ).astype(np.int64)).tolist()
    online = bool(index.online) or recipe.data.image_encoder is not None
    # Pictures of shards that leave something to encode are decoded; encoding them is the step's.
    reader = OnlineReader(index, index_channels(recipe)) if online else ShardReader(index)
    try:
        samples: Sequence[Any]
        samples = reader.read_raw(chosen) if isinstance(reader, OnlineReader) else reader.read_all(chosen)
        bad = [sample for sample in samples if isinstance(sample, DataError)]
        found.problems += [str(error) for error in bad]
        found.say(
            "read", f"{len(chosen) - len(bad)} of {len(chosen)} samples, spread over the index, are whole"
        )
    finally:
        reader.close()


def index_channels(recipe: Recipe) -> int:
    """Channels of the pictures that the autoencoder reads."""
    autoencoder = recipe.data.autoencoder
    return autoencoder.channels if autoencoder.kind == "pixels" else 3


def plan_tokens(index: Index, step: StepPlan, patch_size: int) -> list[int]:
    """Image tokens of every sample of a step."""
    samples = np.array([sample for pack in step.packs for sample in pack])
    return [height * width for height, width in index.grids(samples, patch_size)]


def pack_shapes(index: Index, step: StepPlan, patch_size: int, *, filled: bool = False) -> list[PackShape]:
    """Lengths of every pack of a step, with whole captions, or filled up to the longest of their pack."""
    shapes = []
    for pack in step.packs:
        grids = index.grids(np.array(pack), patch_size)
        text = tuple(int(index.columns["text_length"][sample]) for sample in pack) if index.has_text else None
        if filled and text is not None:
            text = (max(text),) * len(text)
        shapes.append(PackShape(tuple(height * width for height, width in grids), text))
    return shapes


def _look_at_drawing(found: Findings, recipe: Recipe, world: World, run_dir: Path | None) -> None:
    """What previews and evaluations need, by their own checks, with encoders without values."""
    config = recipe.train.evaluation
    if not recipe.train.preview.every_steps and not config.every_steps:
        return
    if any(p.startswith(("data.autoencoder.path:", "data.text_encoder.path:")) for p in found.problems):
        # Told already, and without them nothing is known of the pictures.
        return
    pipeline = found.attempt(lambda: empty_pipeline(recipe))
    if pipeline is None or not config.every_steps:
        return
    # matplotlib and the networks' library are for those who ask for them.
    from tim_ds.trainer.evaluation import Evaluations

    found.title("evaluations while training")
    times = (
        f"every {config.every_steps:,} steps of the run, {recipe.train.steps // config.every_steps:,} times"
    )
    steps = f"at {', '.join(map(str, config.num_steps))} steps, {times}"
    if config.kinds:
        alone = replace(recipe, train=replace(recipe.train, evaluation=replace(config, benchmarks=())))
        found.attempt(lambda: Evaluations(alone, pipeline, run_dir or Path("runs"), world, None))
        found.say(", ".join(config.kinds), f"handwriting or prompts, {steps}")
    for i, one in enumerate(config.benchmarks):
        count = found.attempt(partial(_pictures_of, recipe, i, pipeline, world))
        if count is not None:
            found.say(one.name, f"{count:,} pictures, {steps}")


def empty_pipeline(recipe: Recipe) -> TiMPipeline:
    """What a run draws with, without the values of any weights: it takes and refuses the same requests.

    Raises:
        RequestError, DataError: if an encoder is not there or does not fit the network.
    """
    data, text_encoder = recipe.data, None
    if data.text_encoder is not None and data.text_encoder.path is not None:
        from data_pipeline.encoders.language_model import LanguageModelEncoder, empty_model

        config = data.text_encoder
        text_encoder = LanguageModelEncoder(
            empty_model(config), None, width=text_width(config), max_tokens=config.max_tokens
        )
    pipeline = TiMPipeline(
        meta_network(recipe.model),
        describe_export(recipe, 0, recipe_hash(recipe)),
        autoencoder=build_autoencoder(data.autoencoder, weights=False),
        text_encoder=text_encoder,
    )
    # That of the devices is estimated by itself.
    pipeline.checks_memory = False
    return pipeline


def _pictures_of(recipe: Recipe, i: int, pipeline: TiMPipeline, world: World) -> int:
    """How many pictures a benchmark draws. Rank 0 alone loads its networks.

    Raises:
        RequestError: if a file or a network is missing, or ours cannot draw the pictures.
    """
    from tim_ds.eval.benchmarks import check_network
    from tim_ds.trainer.benchmarks import build_loaded

    config = recipe.train.evaluation.benchmarks[i]
    benchmark = build_loaded(config, i, num_classes=recipe.model.num_classes, loads=world.is_main)
    check_network(benchmark, pipeline)
    wanted = tuple(benchmark.wanted(recipe.train.evaluation.seed))
    pipeline.request(wanted[0].prompt, config.size)
    return len(wanted)


def _look_at_encoders(found: Findings, recipe: Recipe, loader: StepLoader[StepInputs] | None) -> None:
    running = loader.encoders if loader is not None else {}
    parts = {
        "autoencoder": recipe.data.autoencoder,
        "text_encoder": recipe.data.text_encoder,
        "image_encoder": recipe.data.image_encoder,
    }
    found.title("frozen encoders")
    for name, part in parts.items():
        if part is None:
            continue
        purpose = _purpose(name, recipe, None if loader is None else name in running)
        if part.path is None:
            found.say(name, f"{part.kind}, without weights")
        elif purpose is None:
            found.say(name, f"{part.kind}, {part.path}: not needed by this run")
        else:
            known = running.get(name, {}).get("revision") or revision(part.path)
            if not any(p.startswith(f"data.{name}.path:") for p in found.problems):
                problem = missing_weights(part.path, known)
                if problem is not None:
                    found.problems.append(f"data.{name}.path: {problem}; needed for {purpose}")
                else:
                    found.attempt(partial(check_weights, part))
            found.say(name, f"{part.kind}, {part.path}, {known or 'not here'}; for {purpose}")


def _purpose(name: str, recipe: Recipe, running: bool | None) -> str | None:
    """What a run needs a frozen encoder for; None if for nothing.

    Args:
        running: whether it encodes while training; None where the shards, which decide it, cannot be read.
    """
    if name == "image_encoder":
        return "the alignment (objective.repa_weight)"
    if running or (running is None and recipe.data.encode_online):
        return "encoding while training (data.encode_online)"
    if recipe.train.preview.every_steps > 0:
        return "previews (train.preview)"
    if recipe.train.evaluation.every_steps > 0:
        return "evaluations (train.evaluation)"
    return None


def missing_weights(path: str, known: str | None) -> str | None:
    """What is wrong with the weights at a path, or None: a folder with a configuration and weights, or a name
    that is in the hub's cache."""
    folder = Path(path)
    if not folder.is_dir():
        if known is None:
            return (
                f"{path!r} is neither a folder nor in the hub's cache; if it is a name of the hub, "
                f"`hf download {path}` puts it there"
            )
        return None
    if not (folder / "config.json").is_file():
        return f"{path}: no config.json"
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        return f"{path}: no weights (*.safetensors or *.bin)"
    return None


def _look_at_start(found: Findings, recipe: Recipe, run_dir: Path | None, index: Index | None) -> None:
    found.title("run folder")
    checkpoint = None
    if run_dir is not None and (run_dir / CHECKPOINTS).is_dir():
        newest = found.attempt(
            lambda: find_checkpoints(run_dir / CHECKPOINTS, strict=recipe.train.checkpoint.strict)
        )
        checkpoint = newest[0] if newest else None
    if checkpoint is not None and index is not None:
        facts = DataFacts.of(index)
        found.attempt(lambda: check_same_run(checkpoint, recipe, facts))
    found.attempt(lambda: initial_weights(recipe, checkpoint))
    where = "not given (--run)" if run_dir is None else str(run_dir)
    found.say("folder", where)
    found.say("starts", "at step 1" if checkpoint is None else f"again after step {checkpoint.step:,}")


def _look_at_device(found: Findings, recipe: Recipe, world: World) -> None:
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "no GPU here"
    works = found.attempt(lambda: (prove_attention(world.device, dtype, recipe.model.head_dim), True))
    found.title("device")
    found.say("name", f"{world.device}, {name}")
    found.say(
        "attention",
        f"head_dim {recipe.model.head_dim} in {str(dtype).removeprefix('torch.')}: "
        f"{'tried, works' if works else 'does not work'}",
    )


def _look_at_machine(
    found: Findings,
    recipe: Recipe,
    engine_config: dict[str, Any],
    world: World,
    planned: Ranks,
    images: int | None,
    online: Collection[str] | None,
    run_dir: Path | None,
    card_gib: float | None,
) -> MemoryEstimate | None:
    """Memory for packs of so many images, of which the shards leave that to encode; None: where the data are
    not known, of 1024 x 1024 pixels each, with all encoders that the recipe may run."""
    config = recipe.train
    merged = found.attempt(
        lambda: merge_config(
            engine_config, config, packs_per_step=recipe.data.packs_per_step, world_size=planned.size
        )
    )
    tokens = None if images is None else max(1, recipe.data.tokens_per_pack // images)
    needs = found.attempt(
        lambda: estimate(recipe, engine_config, planned, image_tokens=tokens, online=online)
    )
    if merged is None or needs is None:
        return needs
    found.title("engine and memory")
    found.say(
        "ZeRO stage", f"{zero_stage(merged)}, {merged['gradient_accumulation_steps']} micro-steps a step"
    )
    if card_gib is None and world.device.type == "cuda":
        card_gib = torch.cuda.get_device_properties(world.device).total_memory / GIB
    found.say(
        "memory",
        "for packs of 1024 x 1024 pixels an image: the data are not known"
        if images is None
        else f"for packs of {images:,} images, as in the fullest of the first step",
    )
    found.lines += [f"  {line}".rstrip() for line in needs.table(card_gib).splitlines()]
    if world.device.type != "cuda":
        on_host = needs.device_bytes - RUNTIME_BYTES + needs.host_bytes
        found.say(
            "no GPU here",
            f"the column is that of a run on GPUs. On a CPU both are host memory, without CUDA: at least "
            f"{on_host / GIB:.2f} GiB a rank (plain operations keep more than the kernels)",
        )
    if card_gib is not None and needs.fits(card_gib) is False:
        found.problems.append(
            f"memory: a rank needs {needs.device_bytes / GIB:.1f} GiB (+- {needs.device_spread / GIB:.1f}) "
            f"of {card_gib:.1f} on its GPU; see ds_configs/README.md for engine files that need less"
        )
    host = available_bytes()
    if host is not None and needs.host_bytes_per_node > host:
        found.problems.append(
            f"memory: a node needs {needs.host_bytes_per_node / GIB:.1f} GiB of host memory, "
            f"{host / GIB:.1f} are available here; the copy of a checkpoint that is written and the "
            "loader processes are part of it (table above)"
        )
    _look_at_disk(found, recipe, needs, run_dir)
    return needs


def _has_room(found: Findings, needs: MemoryEstimate | None, world: World, on_host: int) -> bool:
    """Whether the step can be tried: a machine without a GPU would kill what takes all of its memory. The
    same on every rank."""
    room = available_bytes()
    if world.device.type != "cpu" or needs is None or room is None:
        return True
    wanted = needs.device_bytes * max(1, on_host)
    if any(world.gather(wanted > room)):
        found.say(
            "not tried",
            f"without a GPU the machine would have to hold {wanted / GIB:.1f} GiB and more, {room / GIB:.1f} "
            "are available; a smaller data.tokens_per_pack, or smaller pictures, take less",
        )
        return False
    return True


def _look_at_disk(found: Findings, recipe: Recipe, needs: MemoryEstimate, run_dir: Path | None) -> None:
    checkpoint, preview = recipe.train.checkpoint, recipe.train.preview
    found.title("saves and previews")
    steps = recipe.train.steps
    found.say(
        "checkpoints",
        f"every {checkpoint.every_steps:,} steps, {-(-steps // checkpoint.every_steps):,} in the run, "
        f"{needs.checkpoint_bytes / GIB:.2f} GiB each, the newest {checkpoint.keep} kept"
        + (f", and steps {', '.join(map(str, checkpoint.milestones))}" if checkpoint.milestones else ""),
    )
    # One more than is kept: the oldest goes when the newest is complete.
    kept = checkpoint.keep + 1 + len([step for step in checkpoint.milestones if step <= steps])
    full = kept * (needs.checkpoint_bytes + SPARE_BYTES) + needs.export_bytes
    parts = f"{kept:,} checkpoints"
    snapshots = recipe.train.ema.snapshots
    if needs.snapshot_bytes:
        # The last step is one of theirs.
        made = -(-steps // snapshots.every_steps)
        kept = min(snapshots.keep + 1, made)
        full += kept * (needs.snapshot_bytes + SPARE_BYTES)
        parts += f", {kept:,} snapshots of the averages"
        found.say(
            "EMA snapshots",
            f"every {snapshots.every_steps:,} steps, {made:,} in the run, "
            f"{needs.snapshot_bytes / GIB:.2f} GiB each, {min(snapshots.keep, made):,} kept",
        )
    free = free_bytes((run_dir or Path("runs")).absolute())
    found.say("disk", f"{full / GIB:.2f} GiB at most, exported weights included; {free / GIB:.2f} GiB free")
    if free < full:
        found.problems.append(
            f"disk: {parts} and the exported weights need {full / GIB:.2f} GiB, {free / GIB:.2f} are free "
            f"where {run_dir or 'runs'} is; free space, keep fewer, or choose another run folder"
        )
    if preview.every_steps:
        found.say(
            "previews",
            f"every {preview.every_steps:,} steps: {len(preview.prompts)} prompts at "
            f"{', '.join(map(str, preview.num_steps))} sampler steps",
        )
        for prompt, size in zip(preview.prompts, preview.sizes, strict=False):
            found.say("", f"{size}  {prompt}")
    else:
        found.say("previews", "none")


def _take_step(
    found: Findings, recipe: Recipe, engine_config: dict[str, Any], world: World, planned: Ranks
) -> None:
    """One step of the real network on the real device with the first data, as a rank of the run takes it."""
    if world.size == 1:
        # What one of the ranks does; whole states instead of a share of them.
        packs = recipe.data.packs_per_step // planned.size
        recipe = replace(recipe, data=replace(recipe.data, packs_per_step=packs))
        result = found.attempt(lambda: _step(recipe, engine_config, world))
    else:
        # An error of one rank alone ends the job: the others wait in a collective.
        result = _step(recipe, engine_config, world)
    if result is None:
        return
    loss, norm, applied, seconds = result
    alone = f", one of {planned.size} ranks, with the states of all" if world.size != planned.size else ""
    found.say("on", f"{world.device}{alone}")
    found.say("loss", f"{loss:.5f}, gradient norm {norm:.5f}")
    found.say("time", f"{seconds:.2f} s, the first, with all that is done once")
    if world.device.type == "cuda":
        found.say("peak memory", f"{torch.cuda.max_memory_allocated(world.device) / GIB:.2f} GiB allocated")
    if not applied:
        found.problems.append(
            f"one step: refused, the gradient's norm is {norm}; inspect data and learning rate"
        )


def _step(recipe: Recipe, engine_config: dict[str, Any], world: World) -> tuple[float, float, bool, float]:
    """Loss, gradient norm, whether it was applied, seconds."""
    config = recipe.train
    data = DataFacts.of(load_index(recipe.data.shards, kept_in=recipe.data.index))
    loader = build_loader(
        recipe.data,
        patch_size=recipe.model.patch_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        num_steps=1,
        finish=prepare_of(recipe, data),
        device=world.device,
    )
    merged = merge_config(
        engine_config, config, packs_per_step=recipe.data.packs_per_step, world_size=world.size
    )
    split = Splitter(merged) if zero_stage(merged) == 3 else None
    root = build_root(recipe, world.size, initial_weights(recipe, None), split=split)
    engine = Engine(
        root, engine_config, config, packs_per_step=recipe.data.packs_per_step, world=world, units=UNITS
    )
    # Held for its memory, as in the run.
    averages = Ema(engine, config.ema)
    (micro_batches,) = loader
    start = time.perf_counter()
    total = torch.zeros((), device=world.device)
    for number, batch in enumerate(micro_batches):
        output = engine.forward(batch.to(world.device))
        total += output.loss.detach()
        engine.backward(output.loss, last=number == len(micro_batches) - 1)
    result = engine.apply(config.optimizer.lr)
    if result.applied:
        averages.update(1)
    loss = float(world.sum(total)) / world.size
    return loss, float(result.grad_norm), result.applied, time.perf_counter() - start
