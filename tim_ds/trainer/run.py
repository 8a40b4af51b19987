"""Assembles a run from its recipe: data, network, engine, average, checkpoints. Resumes it, exports it.

    deepspeed launch/train.py RECIPE --ds ds_configs/zero3.json --run runs/NAME [section.key=value ...]

The same command starts a run, continues one that was stopped, and says so if the run is finished.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_pipeline.encoders.image import feature_width
from data_pipeline.errors import DataError
from data_pipeline.index import Index, load_index
from data_pipeline.loader import StepLoader, build_loader, load_null_states
from tim_ds import __version__
from tim_ds.config.load import dump, load_recipe, split_arguments
from tim_ds.config.recipe import Recipe, recipe_hash, to_dict
from tim_ds.errors import CheckpointError, ConfigError, TimError
from tim_ds.model.blocks import FinalLayer, TransitionBlock
from tim_ds.model.export_folder import EXPORT_FILE, meta_network, write_export
from tim_ds.model.init import initial_values
from tim_ds.model.ops import prove_attention
from tim_ds.model.tim import TiM
from tim_ds.trainer.checkpoint import (
    SPARE_BYTES,
    Checkpoint,
    CheckpointFolder,
    Piece,
    free_bytes,
    write_flushed,
)
from tim_ds.trainer.config import TrainConfig
from tim_ds.trainer.ema import Ema, piece_kind
from tim_ds.trainer.engine import (
    STATE_KEYS,
    TIMEOUT_MARGIN_S,
    Engine,
    Splitter,
    merge_config,
    read_engine_file,
    start_world,
    stop_world,
    zero_stage,
)
from tim_ds.trainer.evaluation import Evaluations
from tim_ds.trainer.flops import StepFlops, flops_of, peak_flops
from tim_ds.trainer.initial import InitialWeights, check_initial, read_initial, values_of
from tim_ds.trainer.inputs import Prepare, StepInputs
from tim_ds.trainer.loop import Loop, Progress
from tim_ds.trainer.lora import adapter_values, add_adapters, merged, write_adapter
from tim_ds.trainer.materialise import Split, Values, materialise
from tim_ds.trainer.metrics import MetricsLog, Sums
from tim_ds.trainer.phases import PhaseClock
from tim_ds.trainer.preview import Previews, describe_export
from tim_ds.trainer.signals import STOPPED, RunStopped, StopAgreement, StopSignals
from tim_ds.trainer.snapshots import SNAPSHOTS, Snapshots
from tim_ds.trainer.step import TransitionStep
from tim_ds.trainer.watch import DEAD_AFTER_S, HUNG_AFTER_S, Watch
from tim_ds.trainer.world import World

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
EXPORT = "export"
ADAPTER_FOLDER = "adapter"

UNITS = (TransitionBlock, FinalLayer)
"""Modules that ZeRO-3 gathers as one piece: without it every small layer has hooks and messages of its own.
Only modules whose input carries a gradient can be: DeepSpeed collects the gradients of such a piece when the
gradient of its input is known (the embedders' inputs have none, and would be collected before they exist)."""

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


def train(
    recipe: Recipe,
    run_dir: Path,
    engine_file: Path,
    world: World,
    *,
    signals: StopSignals | None = None,
    watch: Watch | None = None,
) -> str:
    """Train, or continue, the run of `recipe` in `run_dir`; every rank calls this.

    Args:
        engine_file: DeepSpeed settings in JSON (`ds_configs/`).
        world: from `start_world`.
        signals: what asks the run to stop; the same on every rank, or on none.
        watch: started; told where this rank stands.
    Returns:
        One sentence for the user.
    Raises:
        RunStopped: after a save, because `signals` asked for it.
        TimError, DataError: for everything that the user can put right.
    """
    engine_config, data = world.together(lambda: _read(recipe, engine_file, world), (TimError, DataError))
    with _only_run(run_dir, world):
        folder = CheckpointFolder(
            run_dir / CHECKPOINTS,
            world,
            keep=recipe.train.checkpoint.keep,
            milestones=recipe.train.checkpoint.milestones,
            strict=recipe.train.checkpoint.strict,
        )
        checkpoint = folder.newest()
        if checkpoint is not None:
            world.together(partial(check_same_run, checkpoint, recipe, data), (CheckpointError,))
            if checkpoint.step >= recipe.train.steps and _exported_step(run_dir) == checkpoint.step:
                return (
                    f"{run_dir}: finished at step {checkpoint.step}, nothing to do. "
                    f"Weights: {run_dir / EXPORT}"
                )
        watch = watch or Watch(world)
        watch.before_end = folder.leave
        return _run(
            recipe, run_dir, engine_config, world, data, folder, checkpoint, signals or StopSignals(), watch
        )


def _run(
    recipe: Recipe,
    run_dir: Path,
    engine_config: Mapping[str, Any],
    world: World,
    data: DataFacts,
    folder: CheckpointFolder,
    checkpoint: Checkpoint | None,
    signals: StopSignals,
    watch: Watch,
) -> str:
    config = recipe.train
    start_step = 0 if checkpoint is None else checkpoint.step
    loader = world.together(partial(_loader, recipe, world, data, start_step), (DataError,))
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    world.together(partial(prove_attention, world.device, dtype, recipe.model.head_dim), (ConfigError,))
    encoders = world.from_main(loader.encoders if world.is_main else {})
    if checkpoint is not None:
        check_same_encoders(checkpoint.manifest.get("encoders", {}), encoders, str(checkpoint.path))
    initial = world.together(partial(initial_weights, recipe, checkpoint), (TimError,))
    merged_config = merge_config(
        engine_config, config, packs_per_step=recipe.data.packs_per_step, world_size=world.size
    )
    split = Splitter(merged_config) if zero_stage(merged_config) == 3 else None
    watch.enter("build")
    root = build_root(recipe, world.size, initial, split=split)
    # Kept by an adapter alone, which goes with these weights and no others.
    initial_digest = None if initial is None else initial.digest
    del initial
    engine = Engine(
        root, engine_config, config, packs_per_step=recipe.data.packs_per_step, world=world, units=UNITS
    )
    watch.enter("restore")
    _check_room(run_dir, engine, world, len(config.ema.averages))
    ema = Ema(engine, config.ema)
    sums = Sums(root.transport, world.device, build_count(recipe))
    progress = Progress()
    if checkpoint is not None:
        progress = restore(checkpoint, engine, ema, sums)
        if world.is_main:
            logger.info("%s: continued after step %d", checkpoint.path, progress.step)
    teacher = teacher_parameters(root)
    if teacher:
        ema.write_into(teacher)
    log = _open_log(recipe, run_dir, engine, world, progress.step) if world.is_main else None
    preview = None
    if config.preview.every_steps:
        export_now = describe_export(recipe, progress.step, recipe_hash(recipe))
        preview = world.together(
            partial(Previews, recipe, export_now, root.network, run_dir, world, log), (TimError,)
        )
    evaluate = None
    if config.evaluation.every_steps:
        export_now = describe_export(recipe, progress.step, recipe_hash(recipe))
        evaluate = world.together(
            partial(Evaluations, recipe, export_now, root.network, run_dir, world, log, watch.enter),
            (TimError, DataError),
        )

    def save(progress: Progress) -> None:
        if log is not None:
            log.flush()
        manifest = _manifest(recipe, progress, engine, world, data)
        manifest |= {"encoders": encoders, "initial_weights": initial_digest}
        folder.start(progress.step, state_pieces(engine, ema), sums.state(), manifest)

    def prepare() -> None:
        folder.prepare(state_pieces(engine, ema), sums.state())

    clock, forward_phase = build_clock(recipe, root, world)
    loader.watch_encoders(partial(clock.phase, "encoders"))
    clock.entered = watch.enter
    watch.begin_step(progress.step)
    snapshots = Snapshots(run_dir / SNAPSHOTS, world, config.ema.snapshots)
    snapshots.drop_after(progress.step)

    def snapshot(progress: Progress) -> None:
        manifest = {"progress": asdict(progress), "recipe": to_dict(recipe), "versions": versions()}
        snapshots.save(progress.step, ema, manifest)

    loop = Loop(
        config=config,
        engine=engine,
        ema=ema,
        loader=loader,
        world=world,
        sums=sums,
        progress=progress,
        save=save,
        settle=lambda wait: folder.settle(wait=wait),
        prepare=prepare,
        snapshot=snapshot,
        clock=clock,
        forward_phase=forward_phase,
        teacher=teacher,
        preview=preview,
        evaluate=evaluate,
        log=log,
        stop=StopAgreement(signals, world),
        watch=watch,
    )
    try:
        progress = loop.run()
    except BaseException:
        folder.leave()
        raise
    finally:
        if log is not None:
            log.close()
    watch.enter("export")
    export(recipe, run_dir, ema, world, progress.step)
    return f"{run_dir}: finished at step {progress.step}. Weights: {run_dir / EXPORT}"


def _loader(recipe: Recipe, world: World, data: DataFacts, start_step: int) -> StepLoader[StepInputs]:
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


def _open_log(recipe: Recipe, run_dir: Path, engine: Engine, world: World, start_step: int) -> MetricsLog:
    """Begin the run folder with its settings, and its log. On rank 0."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_flushed(run_dir / "recipe.yaml", dump(recipe))
    write_flushed(run_dir / "engine.json", json.dumps(engine.config, indent=2) + "\n")
    return MetricsLog(
        run_dir,
        tokens_per_pack=recipe.data.tokens_per_pack,
        start_step=start_step,
        num_devices=world.size,
        peak_flops=device_peak(recipe.train, world),
    )


def _manifest(
    recipe: Recipe, progress: Progress, engine: Engine, world: World, data: DataFacts
) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
        "progress": asdict(progress),
        "optimizer_steps": engine.optimizer_steps,
        "data": {"index_hash": data.hash, "samples": data.samples},
        "recipe": to_dict(recipe),
        "recipe_hash": recipe_hash(recipe),
        "zero_stage": engine.zero_stage,
        "world_size": world.size,
        "versions": versions(),
    }


def initial_weights(recipe: Recipe, checkpoint: Checkpoint | None) -> InitialWeights | None:
    """Weights that the run needs from elsewhere: its first ones, or with adapters, always, the frozen ones.

    Raises:
        CheckpointError, ConfigError: if they are not there, do not fit, or are not those of the checkpoint.
    """
    path = recipe.train.init_from
    if path is None or (checkpoint is not None and recipe.train.adapter is None):
        return None
    initial = read_initial(path)
    check_initial(initial, recipe)
    if checkpoint is not None and checkpoint.manifest["initial_weights"] != initial.digest:
        raise CheckpointError(
            f"{checkpoint.path}: its adapter belongs to weights {checkpoint.manifest['initial_weights']}, "
            f"train.init_from names {initial.digest} ({initial.source})"
        )
    return initial


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


def teacher_parameters(root: TransitionStep) -> dict[str, nn.Parameter]:
    """Frozen parameters of the teacher, by the name of the trained one."""
    if root.teacher is None:
        return {}
    return {f"network.{name}": parameter for name, parameter in root.teacher.named_parameters()}


def state_pieces(engine: Engine, ema: Ema) -> Iterator[Piece]:
    """What a checkpoint holds of this rank: masters, AdamW's averages and the EMAs."""
    if engine.zero_stage == 0 and not engine.world.is_main:
        # Every rank has everything.
        return
    for shard in engine.shards:
        yield Piece("master", shard.name, shard.start, shard.master)
        for kind, value in engine.optimizer_state(shard).items():
            yield Piece(kind, shard.name, shard.start, value)
    yield from ema.pieces()


def restore(checkpoint: Checkpoint, engine: Engine, ema: Ema, sums: Sums) -> Progress:
    """Put a checkpoint's state into engine, average and sums, whatever ranks and stage wrote it."""
    for shard in engine.shards:
        checkpoint.fill("master", shard.name, shard.start, shard.master)
        for name, values in ema.averages.items():
            checkpoint.fill(piece_kind(name), shard.name, shard.start, values[shard.name])
        state = engine.optimizer_state(shard)
        for kind in STATE_KEYS:
            checkpoint.fill(kind, shard.name, shard.start, state[kind])
    engine.optimizer_steps = checkpoint.manifest["optimizer_steps"]
    engine.publish()
    world = engine.world
    ranks = checkpoint.manifest["world_size"]
    if ranks == world.size:
        sums.load_state(checkpoint.own(world.rank))
    elif world.is_main:
        # Other ranks than those that counted: their sums are added up here.
        sums.add_states([checkpoint.own(rank) for rank in range(ranks)])
    return Progress(**checkpoint.manifest["progress"])


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
            f"{checkpoint.path}: not a checkpoint of this run; choose another run folder, or give back\n"
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


def export(recipe: Recipe, run_dir: Path, ema: Ema, world: World, step: int) -> None:
    """Write the averaged weights as an export folder; every rank calls this.

    An adapter is written in a folder of its own, and merged into the weights that it was trained on.
    """
    state = {}
    for name, value in ema.full():
        if world.is_main:
            state[name.removeprefix("network.")] = value.to("cpu", copy=True)
    problem = None
    if world.is_main:
        description = describe_export(recipe, step, recipe_hash(recipe))
        adapter, base = recipe.train.adapter, recipe.train.init_from
        try:
            if adapter is not None and base is not None:
                write_adapter(run_dir / ADAPTER_FOLDER, state, adapter, base)
                network = meta_network(recipe.model).state_dict()
                state = merged(
                    {k: v for k, v in read_initial(base).state.items() if k in network}, state, adapter
                )
            write_export(run_dir / EXPORT, description, state, overwrite=True)
        except CheckpointError as error:
            problem = str(error)
    problem = world.from_main(problem)
    if problem is not None:
        world.raise_everywhere(CheckpointError(problem))


def versions() -> dict[str, str]:
    return {
        "tim_ds": __version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }


def prepare_of(recipe: Recipe, data: DataFacts) -> Prepare:
    """The loader's last step for this recipe."""
    null_states, null_label = None, None
    if recipe.objective.guided_target is not None:
        if data.has_text:
            null_states = load_null_states(recipe.data, data.text_width)
        else:
            null_label = data.num_classes
    return Prepare(recipe.objective, recipe.train.seed, null_states, null_label)


def _read(recipe: Recipe, engine_file: Path, world: World) -> tuple[dict[str, Any], DataFacts]:
    """What the run reads before anything is built, checked against the recipe."""
    engine_config = read_engine_file(engine_file)
    merge_config(
        engine_config, recipe.train, packs_per_step=recipe.data.packs_per_step, world_size=world.size
    )
    data = DataFacts.of(load_index(recipe.data.shards, kept_in=recipe.data.index))
    check_parts(recipe, engine_config, data)
    return engine_config, data


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


def _check_room(run_dir: Path, engine: Engine, world: World, num_averages: int) -> None:
    """Raises CheckpointError, before any work, if the disk cannot hold a checkpoint and the export."""
    numel = sum(torch.Size(shape).numel() for shape in engine.parameter_shapes.values())
    network = engine.module.get_submodule("network")
    # Frozen weights are only exported; every trained one besides as a master, AdamW's two and the averages.
    exported = sum(int(getattr(p, "ds_numel", p.numel())) for p in network.parameters())
    needed = 4 * (numel * (len(STATE_KEYS) + 1 + num_averages) + exported) + SPARE_BYTES
    free = world.from_main(free_bytes(run_dir))
    if free < needed:
        world.raise_everywhere(
            CheckpointError(
                f"{run_dir}: {needed:,} bytes are needed for one checkpoint and the exported weights, "
                f"{free:,} are free; free space or choose another run folder"
            )
        )


@contextmanager
def _only_run(run_dir: Path, world: World) -> Iterator[None]:
    """Keeps a second process from training in the folder: rank 0's lock, which ends with the process."""
    with ExitStack() as stack:
        problem = None
        if world.is_main:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((run_dir / ".lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = (
                    f"{run_dir}: another process is training there; wait for it or choose another folder"
                )
            except OSError as error:
                problem = f"{run_dir}: cannot be used as a run folder: {error.strerror}"
        problem = world.from_main(problem)
        if problem is not None:
            world.raise_everywhere(CheckpointError(problem))
        yield


def _exported_step(run_dir: Path) -> int | None:
    """Step of the exported weights; None without a whole export."""
    try:
        return int(json.loads((run_dir / EXPORT / EXPORT_FILE).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `launch/train.py`. Returns the exit status: 2 for what the user can put right,
    `STOPPED` after a signal. (`LOST`, where another rank is missing, does not return.)"""
    parser = argparse.ArgumentParser(
        prog="launch/train.py", description="Train, or continue, the run of a recipe under DeepSpeed."
    )
    parser.add_argument("recipe", nargs="+", help="a YAML file, and section.key=value to override settings")
    parser.add_argument("--ds", required=True, type=Path, help="engine file: ds_configs/*.json")
    parser.add_argument("--run", type=Path, help="folder of the run, made or continued")
    parser.add_argument(
        "--check",
        action="store_true",
        help="verify everything, take one step, write nothing, and say what would be",
    )
    parser.add_argument("--no-step", action="store_true", help="with --check: without the step")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="with --check and no launcher: ranks that the run will have (1)",
    )
    parser.add_argument("--per-node", type=int, metavar="N", help="with --check: ranks of a node (8)")
    parser.add_argument(
        "--card-gib", type=float, metavar="GIB", help="with --check: GPU memory, if not this one's"
    )
    parser.add_argument(
        "--hung-after",
        type=float,
        default=HUNG_AFTER_S,
        metavar="SECONDS",
        help="end the job, naming the rank that is behind, when no rank advances for so long "
        "(default %(default)g)",
    )
    parser.add_argument(
        "--dead-after",
        type=float,
        default=DEAD_AFTER_S,
        metavar="SECONDS",
        help="end the job, naming the rank, when one gives no sign of life for so long (default %(default)g)",
    )
    # The deepspeed launcher adds it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    paths, overrides = split_arguments(options.recipe)
    if len(paths) != 1:
        parser.error(f"expected one recipe, received {len(paths)}: {' '.join(paths)}")
    if options.run is None and not options.check:
        parser.error("the following arguments are required: --run")
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    if options.check:
        # It assembles a run as this module does, and so imports it.
        from tim_ds.trainer.preflight import check

        return check(
            paths[0],
            overrides,
            options.ds,
            options.run,
            ranks=options.ranks,
            per_node=options.per_node,
            card_gib=options.card_gib,
            with_step=not options.no_step,
        )
    with StopSignals().installed() as signals:
        return _main(options, paths[0], overrides, signals, is_main)


def _main(
    options: argparse.Namespace, path: str, overrides: Sequence[str], signals: StopSignals, is_main: bool
) -> int:
    world = None
    try:
        recipe = load_recipe(path, overrides)
        read_engine_file(options.ds)
        # The watch names who is missing before a collective fails without a name.
        world = start_world(timeout_s=options.hung_after + TIMEOUT_MARGIN_S)
        with Watch(world, options.hung_after, options.dead_after) as watch:
            message = train(recipe, options.run, options.ds, world, signals=signals, watch=watch)
    except RunStopped as stopped:
        assert world is not None  # a run stops after it began
        stop_world(world)
        if is_main:
            print(f"{options.run}: {stopped}. The same command continues it")
        return STOPPED
    except (TimError, DataError) as error:
        # Before the ranks met, each meets the same error; later, one may fail alone.
        alone = world is not None and world.shared_error is not error
        if is_main or alone:
            rank = f" (rank {world.rank})" if world is not None and not is_main else ""
            print(f"error{rank}: {error}", file=sys.stderr)
        if world is not None:
            stop_world(world, failed=True)
        return 2
    stop_world(world)
    if is_main:
        print(message)
    return 0
