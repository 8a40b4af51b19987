"""Runs what a recipe describes, in a folder: begins or continues it, saves it, exports it."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.index import load_index
from data_pipeline.loader import StepLoader
from tim_ds import __version__
from tim_ds.config.load import dump
from tim_ds.config.recipe import Recipe, recipe_hash, to_dict
from tim_ds.errors import CheckpointError, ConfigError, TimError
from tim_ds.model.export_folder import EXPORT_FILE, stream_export
from tim_ds.model.ops import prove_attention
from tim_ds.pipeline import PromptLike
from tim_ds.trainer.agreement import DataFacts, check_parts, check_same_encoders, check_same_run
from tim_ds.trainer.assembly import (
    UNITS,
    build_clock,
    build_count,
    build_root,
    build_run_loader,
    device_peak,
    initial_weights,
    teacher_parameters,
)
from tim_ds.trainer.checkpoint import (
    SPARE_BYTES,
    Checkpoint,
    CheckpointFolder,
    Piece,
    free_bytes,
)
from tim_ds.trainer.config import EmaConfig
from tim_ds.trainer.drawing import drawing_pipeline, prepare_captions
from tim_ds.trainer.ema import Ema, piece_kind
from tim_ds.trainer.ema_profiles import remark_on_start
from tim_ds.trainer.engine import (
    STATE_KEYS,
    Engine,
    Splitter,
    merge_config,
    read_engine_file,
    zero_stage,
)
from tim_ds.trainer.events import BEGAN, CONTINUED, FAILED, FINISHED, STOPPED, Events
from tim_ds.trainer.initial import read_initial
from tim_ds.trainer.inputs import StepInputs
from tim_ds.trainer.loop import Loop, Progress
from tim_ds.trainer.lora import merged, write_adapter
from tim_ds.trainer.memory import snapshot_copies
from tim_ds.trainer.metrics import MetricsLog, Sums
from tim_ds.trainer.preview import Previews, describe_export
from tim_ds.trainer.run_folder import RunFolder, held_by_this_run
from tim_ds.trainer.saves import Saves
from tim_ds.trainer.signals import RunStopped, StopAgreement, StopSignals
from tim_ds.trainer.snapshots import SNAPSHOTS, Snapshots
from tim_ds.trainer.step import TransitionStep
from tim_ds.trainer.watch import Watch
from tim_ds.trainer.world import World

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
EXPORT = "export"
ADAPTER_FOLDER = "adapter"


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
        watch: told where this rank stands.
    Returns:
        One sentence for the user.
    Raises:
        RunStopped: after a save, because `signals` asked for it.
        TimError, DataError: for everything that the user can put right.
    """
    watch = watch or Watch()
    watch.enter("data")
    engine_config, data = world.together(lambda: _read(recipe, engine_file, world), (TimError, DataError))
    if world.is_main and (remark := remark_on_start(recipe.train)) is not None:
        logger.warning(remark)
    with held_by_this_run(run_dir, world) as run_folder:
        folder = CheckpointFolder(
            run_dir / CHECKPOINTS,
            world,
            keep=recipe.train.checkpoint.keep,
            milestones=recipe.train.checkpoint.milestones,
            strict=recipe.train.checkpoint.strict,
        )
        watch.enter("checkpoint")
        checkpoint = folder.newest()
        if checkpoint is not None:
            world.together(partial(check_same_run, checkpoint, recipe, data), (CheckpointError,))
            if checkpoint.step >= recipe.train.steps and _exported_step(run_dir) == checkpoint.step:
                return (
                    f"{run_dir}: finished at step {checkpoint.step}, nothing to do. "
                    f"Weights: {run_dir / EXPORT}"
                )
        watch.before_end = folder.leave
        return _run(
            recipe,
            run_dir,
            run_folder,
            engine_config,
            world,
            data,
            folder,
            checkpoint,
            signals or StopSignals(),
            watch,
        )


def _run(
    recipe: Recipe,
    run_dir: Path,
    run_folder: RunFolder | None,
    engine_config: Mapping[str, Any],
    world: World,
    data: DataFacts,
    folder: CheckpointFolder,
    checkpoint: Checkpoint | None,
    signals: StopSignals,
    watch: Watch,
) -> str:
    config = recipe.train
    watch.enter("loader")
    loader, encoders = _open_data(recipe, world, data, checkpoint)
    engine, root, initial_digest = _build_engine(recipe, engine_config, world, checkpoint, watch)
    watch.enter("restore")
    _check_room(run_dir, engine, world, config.ema)
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
    log, events = world.together(
        partial(_open_logs, recipe, run_folder, engine, world, folder, checkpoint), (CheckpointError,)
    )
    preview, evaluate = _viewers(recipe, run_dir, root, world, loader, progress, log, signals, watch)

    def describe(progress: Progress) -> dict[str, Any]:
        manifest = _manifest(recipe, progress, engine, world, data)
        manifest |= {"encoders": encoders, "initial_weights": initial_digest}
        if log is not None:
            manifest["interval_seconds"] = log.interval_seconds
        return manifest

    clock, forward_phase = build_clock(recipe, root, world)
    loader.watch_encoders(partial(clock.phase, "encoders"))
    clock.entered = watch.enter
    watch.begin_step(progress.step)
    snapshots = Snapshots(run_dir / SNAPSHOTS, world, config.ema.snapshots)
    snapshots.drop_after(progress.step)

    def save_snapshot(progress: Progress) -> None:
        manifest = {"progress": asdict(progress), "recipe": to_dict(recipe), "versions": versions()}
        manifest["initial_weights"] = initial_digest
        snapshots.save(progress.step, ema, manifest)

    saves = Saves(
        checkpoints=folder,
        world=world,
        pieces=partial(state_pieces, engine, ema),
        own=sums.state,
        describe=describe,
        save_snapshot=save_snapshot,
        milestones=config.checkpoint.milestones,
        saved_step=progress.step,
        run_folder=run_folder,
        log=log,
        events=events,
    )
    loop = Loop(
        config=config,
        engine=engine,
        ema=ema,
        loader=loader,
        world=world,
        sums=sums,
        progress=progress,
        saves=saves,
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
        watch.enter("export")
        _export_last(recipe, run_dir, ema, world, loop, watch)
        if events is not None:
            events.add(FINISHED, progress.step)
    except BaseException as error:
        folder.leave()
        if events is not None:
            event = STOPPED if isinstance(error, RunStopped) else FAILED
            events.add(event, loop.progress.step, reason=f"{error or type(error).__name__}".splitlines()[0])
        raise
    finally:
        for file in (log, events):
            if file is not None:
                file.close()
    return f"{run_dir}: finished at step {progress.step}. Weights: {run_dir / EXPORT}"


def _export_last(recipe: Recipe, run_dir: Path, ema: Ema, world: World, loop: Loop, watch: Watch) -> None:
    """Export what the run ends with, also where its last checkpoint failed: that is four times as large.

    Raises:
        CheckpointError: on every rank, if one of the two could not be written.
    """
    step, problem = loop.progress.step, loop.unsaved
    exported = f"the averaged weights of step {step} are in {run_dir / EXPORT}"
    try:
        export(recipe, run_dir, ema, world, step, watch.moved)
    except CheckpointError as error:
        if problem is None:
            raise
        exported = f"nor could the averaged weights be exported ({error})"
    if problem is not None:
        world.raise_everywhere(
            CheckpointError(
                f"{run_dir}: trained up to step {step}, but its last checkpoint is NOT SAVED: {problem}; "
                f"{exported}. See to the disk; the same command repeats what comes after step "
                f"{loop.saves.saved_step}, to the same bits"
            )
        )


def _open_data(
    recipe: Recipe, world: World, data: DataFacts, checkpoint: Checkpoint | None
) -> tuple[StepLoader[StepInputs], dict[str, dict[str, Any]]]:
    """The loader from where the checkpoint stands, and what is known of the encoders that it runs."""
    start_step = 0 if checkpoint is None else checkpoint.step
    loader = world.together(partial(build_run_loader, recipe, world, data, start_step), (DataError,))
    encoders = world.from_main(loader.encoders if world.is_main else {})
    if checkpoint is not None:
        recorded, source = checkpoint.manifest.get("encoders", {}), str(checkpoint.path)
        world.together(partial(check_same_encoders, recorded, encoders, source), (CheckpointError,))
    return loader, encoders


def _build_engine(
    recipe: Recipe,
    engine_config: Mapping[str, Any],
    world: World,
    checkpoint: Checkpoint | None,
    watch: Watch,
) -> tuple[Engine, TransitionStep, str | None]:
    """Engine and root module with first weights, and the digest of weights that came from elsewhere."""
    config, packs = recipe.train, recipe.data.packs_per_step
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    world.together(partial(prove_attention, world.device, dtype, recipe.model.head_dim), (ConfigError,))
    watch.enter("weights")
    initial = world.together(partial(initial_weights, recipe, checkpoint), (TimError,))
    merged_config = merge_config(engine_config, config, packs_per_step=packs, world_size=world.size)
    split = Splitter(merged_config) if zero_stage(merged_config) == 3 else None
    watch.enter("build")
    root = build_root(recipe, world.size, initial, split=split)
    # Kept by an adapter alone, which goes with these weights and no others.
    initial_digest = None if initial is None else initial.digest
    del initial
    engine = Engine(root, engine_config, config, packs_per_step=packs, world=world, units=UNITS)
    return engine, root, initial_digest


def _viewers(
    recipe: Recipe,
    run_dir: Path,
    root: TransitionStep,
    world: World,
    loader: StepLoader[StepInputs],
    progress: Progress,
    log: MetricsLog | None,
    signals: StopSignals,
    watch: Watch,
) -> tuple[Callable[[int], None] | None, Callable[[int], None] | None]:
    """What looks at the averaged weights every so many steps, where the recipe asks for it."""
    config = recipe.train
    if not config.preview.every_steps and not config.evaluation.every_steps:
        return None, None
    described = describe_export(recipe, progress.step, recipe_hash(recipe))
    errors = (TimError, DataError)
    pipeline = drawing_pipeline(recipe, described, root.network, run_dir, world, loader)
    preview = None
    prompts: list[PromptLike] = []
    if config.preview.every_steps:
        prompts += config.preview.prompts
        preview = world.together(partial(Previews, recipe, pipeline, run_dir, world, log), errors)
    evaluate = None
    if config.evaluation.every_steps:
        # With its libraries of scores and plots, a second or two of every rank's start.
        from tim_ds.trainer.evaluation import Evaluations

        evaluate = world.together(
            lambda: Evaluations(
                recipe, pipeline, run_dir, world, log, watch.enter, lambda: signals.requested
            ),
            errors,
        )
        prompts += evaluate.prompts
    watch.enter("captions")
    prepare_captions(pipeline, prompts, world, loader, watch.moved)
    return preview, evaluate


def _open_logs(
    recipe: Recipe,
    run_folder: RunFolder | None,
    engine: Engine,
    world: World,
    folder: CheckpointFolder,
    checkpoint: Checkpoint | None,
) -> tuple[MetricsLog | None, Events | None]:
    """Begin the run folder with its settings, its metrics and its events; on rank 0.

    Raises:
        CheckpointError: if the disk refuses.
    """
    if run_folder is None:
        return None, None
    path = run_folder.path
    try:
        run_folder.write_settings("recipe.yaml", dump(recipe))
        run_folder.write_settings("engine.json", json.dumps(engine.config, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path}: its settings cannot be written: {error}") from error
    log = MetricsLog(
        path,
        tokens_per_pack=recipe.data.tokens_per_pack,
        start_step=0 if checkpoint is None else checkpoint.step,
        num_devices=world.size,
        peak_flops=device_peak(recipe.train, world),
        # Of earlier versions without it.
        seconds_before=0.0 if checkpoint is None else checkpoint.manifest.get("interval_seconds", 0.0),
    )
    events = Events(path)
    facts = {"ranks": world.size, "zero_stage": engine.zero_stage}
    if checkpoint is None:
        events.add(BEGAN, 0, **facts)
    else:
        reason = "; ".join(folder.passed_over)
        events.add(CONTINUED, checkpoint.step, **facts, **({"reason": reason} if reason else {}))
    return log, events


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


def export(
    recipe: Recipe,
    run_dir: Path,
    ema: Ema,
    world: World,
    step: int,
    moved: Callable[[], None] = lambda: None,
) -> None:
    """Write the averaged weights as an export folder, as they are gathered; every rank calls this.

    An adapter is written in a folder of its own, and merged into the weights that it was trained on.

    Args:
        moved: called with every tensor.
    Raises:
        CheckpointError: on every rank, if it cannot be written.
    """

    def gather() -> Iterator[tuple[str, Tensor]]:
        for name, value in ema.full():
            moved()
            yield name.removeprefix("network."), value

    gathered, problem = gather(), None
    if world.is_main:
        try:
            _write_export(recipe, run_dir, gathered, step)
        except CheckpointError as error:
            problem = str(error)
    # The others gather what could not be written as well.
    for _ in gathered:
        pass
    problem = world.from_main(problem)
    if problem is not None:
        world.raise_everywhere(CheckpointError(problem))


def _write_export(recipe: Recipe, run_dir: Path, gathered: Iterator[tuple[str, Tensor]], step: int) -> None:
    description = describe_export(recipe, step, recipe_hash(recipe))
    adapter, base = recipe.train.adapter, recipe.train.init_from
    if adapter is None or base is None:

        def read(name: str, like: Tensor) -> Tensor:
            given, value = next(gathered)
            assert given == name  # both come in the network's own order
            return value

        stream_export(run_dir / EXPORT, description, read, overwrite=True)
        return
    state = {name: value.to("cpu", copy=True) for name, value in gathered}
    write_adapter(run_dir / ADAPTER_FOLDER, state, adapter, base)
    values = merged(read_initial(base).value, state, adapter)
    stream_export(run_dir / EXPORT, description, values, overwrite=True)


def versions() -> dict[str, str]:
    return {
        "tim_ds": __version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }


def _read(recipe: Recipe, engine_file: Path, world: World) -> tuple[dict[str, Any], DataFacts]:
    """What the run reads before anything is built, checked against the recipe."""
    engine_config = read_engine_file(engine_file)
    merge_config(
        engine_config, recipe.train, packs_per_step=recipe.data.packs_per_step, world_size=world.size
    )
    data = DataFacts.of(load_index(recipe.data.shards, kept_in=recipe.data.index))
    check_parts(recipe, engine_config, data)
    return engine_config, data


def _check_room(run_dir: Path, engine: Engine, world: World, config: EmaConfig) -> None:
    """Raises CheckpointError, before any work, if the disk cannot hold a checkpoint, a snapshot of the
    averages where the run makes them, and the export."""
    numel = sum(torch.Size(shape).numel() for shape in engine.parameter_shapes.values())
    network = engine.module.get_submodule("network")
    # Frozen weights are only exported; every trained one besides as a master, AdamW's two and the averages.
    exported = sum(int(getattr(p, "ds_numel", p.numel())) for p in network.parameters())
    copies = len(STATE_KEYS) + 1 + len(config.averages) + snapshot_copies(config)
    needed = 4 * (numel * copies + exported) + SPARE_BYTES
    free = world.from_main(free_bytes(run_dir))
    if free < needed:
        world.raise_everywhere(
            CheckpointError(
                f"{run_dir}: {needed:,} bytes are needed for one checkpoint"
                f"{', one snapshot of the averages' if snapshot_copies(config) else ''} and the exported "
                f"weights, {free:,} are free; free space or choose another run folder"
            )
        )


def _exported_step(run_dir: Path) -> int | None:
    """Step of the exported weights; None without a whole export."""
    try:
        return int(json.loads((run_dir / EXPORT / EXPORT_FILE).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
