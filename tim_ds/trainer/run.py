"""Runs what a recipe describes, in a folder: begins or continues it, saves it, exports it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import DataError
from data_pipeline.index import load_index
from data_pipeline.loader import StepLoader
from tim_ds.config.load import dump
from tim_ds.config.recipe import Recipe, recipe_hash, to_dict
from tim_ds.errors import CheckpointError, ConfigError, TimError
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
from tim_ds.trainer.checkpoint import Checkpoint
from tim_ds.trainer.checkpoint_folder import SPARE_BYTES, CheckpointFolder, free_bytes
from tim_ds.trainer.drawing import drawing_pipeline, prepare_captions
from tim_ds.trainer.ema import Ema
from tim_ds.trainer.ema_profiles import remark_on_start
from tim_ds.trainer.engine import STATE_KEYS, Engine, Splitter, merge_config, read_engine_file, zero_stage
from tim_ds.trainer.events import BEGAN, CONTINUED, FAILED, FINISHED, STOPPED, Events
from tim_ds.trainer.inputs import StepInputs
from tim_ds.trainer.loop import Loop, Progress
from tim_ds.trainer.memory import snapshot_copies
from tim_ds.trainer.metrics import MetricsLog, Sums
from tim_ds.trainer.preview import Previews, describe_export
from tim_ds.trainer.run_export import EXPORT, export, exported_step
from tim_ds.trainer.run_folder import RunFolder, held_by_this_run
from tim_ds.trainer.run_state import restore, state_pieces, versions
from tim_ds.trainer.saves import Saves
from tim_ds.trainer.signals import RunStopped, StopAgreement, StopSignals
from tim_ds.trainer.snapshots import SNAPSHOTS, Snapshots
from tim_ds.trainer.step import TransitionStep
from tim_ds.trainer.watch import Watch
from tim_ds.trainer.world import World

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"


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
            if checkpoint.step >= recipe.train.steps and exported_step(run_dir) == checkpoint.step:
                return (
                    f"{run_dir}: finished at step {checkpoint.step}, nothing to do. "
                    f"Weights: {run_dir / EXPORT}"
                )
        watch.before_end = folder.leave
        run = _Run(
            recipe=recipe,
            path=run_dir,
            folder=run_folder,
            engine_config=engine_config,
            world=world,
            data=data,
            checkpoints=folder,
            checkpoint=checkpoint,
            signals=signals or StopSignals(),
            watch=watch,
        )
        return run.train()


@dataclass(frozen=True, eq=False)
class _Trained:
    """What a step changes and a checkpoint keeps."""

    engine: Engine
    root: TransitionStep
    ema: Ema
    sums: Sums
    progress: Progress
    teacher: dict[str, torch.nn.Parameter]
    initial_digest: str | None
    """Of weights that came from elsewhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """A run in its folder. All ranks call its methods together.

    Args:
        folder: held, on rank 0.
        checkpoint: from which the run continues.
    """

    recipe: Recipe
    path: Path
    folder: RunFolder | None
    engine_config: Mapping[str, Any]
    world: World
    data: DataFacts
    checkpoints: CheckpointFolder
    checkpoint: Checkpoint | None
    signals: StopSignals
    watch: Watch

    def train(self) -> str:
        """Put everything together, train up to the last step, export; one sentence for the user."""
        self.watch.enter("loader")
        loader, encoders = self._open_data()
        trained = self._build()
        log, events = self.world.together(partial(self._open_logs, trained.engine), (CheckpointError,))
        preview, evaluate = self._viewers(trained, loader, log)
        clock, forward_phase = build_clock(self.recipe, trained.root, self.world)
        loader.watch_encoders(partial(clock.phase, "encoders"))
        clock.entered = self.watch.enter
        self.watch.begin_step(trained.progress.step)
        loop = Loop(
            config=self.recipe.train,
            engine=trained.engine,
            ema=trained.ema,
            loader=loader,
            world=self.world,
            sums=trained.sums,
            progress=trained.progress,
            saves=self._saves(trained, encoders, log, events),
            clock=clock,
            forward_phase=forward_phase,
            teacher=trained.teacher,
            preview=preview,
            evaluate=evaluate,
            log=log,
            stop=StopAgreement(self.signals, self.world),
            watch=self.watch,
        )
        step = self._carry_out(loop, log, events)
        return f"{self.path}: finished at step {step}. Weights: {self.path / EXPORT}"

    def _open_data(self) -> tuple[StepLoader[StepInputs], dict[str, dict[str, Any]]]:
        """The loader from where the checkpoint stands, and what is known of the encoders that it runs."""
        world, checkpoint = self.world, self.checkpoint
        start_step = 0 if checkpoint is None else checkpoint.step
        load = partial(build_run_loader, self.recipe, world, self.data, start_step)
        loader = world.together(load, (DataError,))
        encoders = world.from_main(loader.encoders if world.is_main else {})
        if checkpoint is not None:
            recorded, source = checkpoint.manifest.get("encoders", {}), str(checkpoint.path)
            world.together(partial(check_same_encoders, recorded, encoders, source), (CheckpointError,))
        return loader, encoders

    def _build(self) -> _Trained:
        """Network, optimiser, averages and sums: as they begin, or as the checkpoint left them."""
        config = self.recipe.train
        engine, root, initial_digest = self._build_engine()
        self.watch.enter("restore")
        self._check_room(engine)
        ema = Ema(engine, config.ema)
        sums = Sums(root.transport, self.world.device, build_count(self.recipe))
        progress = Progress()
        if self.checkpoint is not None:
            progress = restore(self.checkpoint, engine, ema, sums)
            if self.world.is_main:
                logger.info("%s: continued after step %d", self.checkpoint.path, progress.step)
        teacher = teacher_parameters(root)
        if teacher:
            ema.write_into(teacher)
        return _Trained(engine, root, ema, sums, progress, teacher, initial_digest)

    def _build_engine(self) -> tuple[Engine, TransitionStep, str | None]:
        """Engine and root module with first weights, and the digest of weights that came from elsewhere."""
        recipe, world = self.recipe, self.world
        config, packs = recipe.train, recipe.data.packs_per_step
        dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
        world.together(partial(prove_attention, world.device, dtype, recipe.model.head_dim), (ConfigError,))
        self.watch.enter("weights")
        initial = world.together(partial(initial_weights, recipe, self.checkpoint), (TimError,))
        merged_config = merge_config(self.engine_config, config, packs_per_step=packs, world_size=world.size)
        split = Splitter(merged_config) if zero_stage(merged_config) == 3 else None
        self.watch.enter("build")
        root = build_root(recipe, world.size, initial, split=split)
        # Kept by an adapter alone, which goes with these weights and no others.
        initial_digest = None if initial is None else initial.digest
        del initial
        engine = Engine(root, self.engine_config, config, packs_per_step=packs, world=world, units=UNITS)
        return engine, root, initial_digest

    def _check_room(self, engine: Engine) -> None:
        """Raises CheckpointError, before any work, if the disk cannot hold a checkpoint, a snapshot of the
        averages where the run makes them, and the export."""
        config = self.recipe.train.ema
        numel = sum(torch.Size(shape).numel() for shape in engine.parameter_shapes.values())
        network = engine.module.get_submodule("network")
        # Frozen weights are only exported; every trained one is also a master, AdamW's two and the averages.
        exported = sum(int(getattr(p, "ds_numel", p.numel())) for p in network.parameters())
        copies = len(STATE_KEYS) + 1 + len(config.averages) + snapshot_copies(config)
        needed = 4 * (numel * copies + exported) + SPARE_BYTES
        free = self.world.from_main(free_bytes(self.path))
        if free < needed:
            self.world.raise_everywhere(
                CheckpointError(
                    f"{self.path}: {needed:,} bytes are needed for one checkpoint"
                    f"{', one snapshot of the averages' if snapshot_copies(config) else ''} and the exported "
                    f"weights, {free:,} are free; free space or choose another run folder"
                )
            )

    def _open_logs(self, engine: Engine) -> tuple[MetricsLog | None, Events | None]:
        """Begin the run folder with its settings, its metrics and its events; on rank 0.

        Raises:
            CheckpointError: if the disk refuses.
        """
        if self.folder is None:
            return None, None
        recipe, checkpoint, path = self.recipe, self.checkpoint, self.folder.path
        try:
            self.folder.write_settings("recipe.yaml", dump(recipe))
            self.folder.write_settings("engine.json", json.dumps(engine.config, indent=2) + "\n")
        except OSError as error:
            raise CheckpointError(f"{path}: its settings cannot be written: {error}") from error
        log = MetricsLog(
            path,
            tokens_per_pack=recipe.data.tokens_per_pack,
            start_step=0 if checkpoint is None else checkpoint.step,
            num_devices=self.world.size,
            peak_flops=device_peak(recipe.train, self.world),
            # Of earlier versions without it.
            seconds_before=0.0 if checkpoint is None else checkpoint.manifest.get("interval_seconds", 0.0),
        )
        events = Events(path)
        facts = {"ranks": self.world.size, "zero_stage": engine.zero_stage}
        if checkpoint is None:
            events.add(BEGAN, 0, **facts)
        else:
            reason = "; ".join(self.checkpoints.passed_over)
            events.add(CONTINUED, checkpoint.step, **facts, **({"reason": reason} if reason else {}))
        return log, events

    def _viewers(
        self, trained: _Trained, loader: StepLoader[StepInputs], log: MetricsLog | None
    ) -> tuple[Callable[[int], None] | None, Callable[[int], None] | None]:
        """What looks at the averaged weights every so many steps, where the recipe asks for it."""
        recipe, world, watch = self.recipe, self.world, self.watch
        config = recipe.train
        if not config.preview.every_steps and not config.evaluation.every_steps:
            return None, None
        described = describe_export(recipe, trained.progress.step, recipe_hash(recipe))
        errors = (TimError, DataError)
        pipeline = drawing_pipeline(recipe, described, trained.root.network, self.path, world, loader)
        preview = None
        prompts: list[PromptLike] = []
        if config.preview.every_steps:
            prompts += config.preview.prompts
            preview = world.together(partial(Previews, recipe, pipeline, self.path, world, log), errors)
        evaluate = None
        if config.evaluation.every_steps:
            # With its libraries of scores and plots, a second or two of every rank's start.
            from tim_ds.trainer.evaluation import Evaluations

            evaluate = world.together(
                lambda: Evaluations(
                    recipe, pipeline, self.path, world, log, watch.enter, lambda: self.signals.requested
                ),
                errors,
            )
            prompts += evaluate.prompts
        watch.enter("captions")
        prepare_captions(pipeline, prompts, world, loader, watch.moved)
        return preview, evaluate

    def _saves(
        self,
        trained: _Trained,
        encoders: dict[str, dict[str, Any]],
        log: MetricsLog | None,
        events: Events | None,
    ) -> Saves:
        """Checkpoints and snapshots, with what each says of itself."""
        recipe, world, engine, ema = self.recipe, self.world, trained.engine, trained.ema
        known = {"recipe": to_dict(recipe), "versions": versions(), "initial_weights": trained.initial_digest}

        def describe(progress: Progress) -> dict[str, Any]:
            manifest = {
                **known,
                "progress": asdict(progress),
                "optimizer_steps": engine.optimizer_steps,
                "data": {"index_hash": self.data.hash, "samples": self.data.samples},
                "recipe_hash": recipe_hash(recipe),
                "zero_stage": engine.zero_stage,
                "world_size": world.size,
                "encoders": encoders,
            }
            if log is not None:
                manifest["interval_seconds"] = log.interval_seconds
            return manifest

        snapshots = Snapshots(self.path / SNAPSHOTS, world, recipe.train.ema.snapshots)
        snapshots.drop_after(trained.progress.step)

        def save_snapshot(progress: Progress) -> None:
            snapshots.save(progress.step, ema, {**known, "progress": asdict(progress)})

        return Saves(
            checkpoints=self.checkpoints,
            world=world,
            pieces=partial(state_pieces, engine, ema),
            own=trained.sums.state,
            describe=describe,
            save_snapshot=save_snapshot,
            milestones=recipe.train.checkpoint.milestones,
            saved_step=trained.progress.step,
            run_folder=self.folder,
            log=log,
            events=events,
        )

    def _carry_out(self, loop: Loop, log: MetricsLog | None, events: Events | None) -> int:
        """Train and export; the last step. How it ended is an event."""
        try:
            step = loop.run().step
            self.watch.enter("export")
            self._export(loop)
            if events is not None:
                events.add(FINISHED, step)
            return step
        except BaseException as error:
            self.checkpoints.leave()
            if events is not None:
                event = STOPPED if isinstance(error, RunStopped) else FAILED
                reason = f"{error or type(error).__name__}".splitlines()[0]
                events.add(event, loop.progress.step, reason=reason)
            raise
        finally:
            for file in (log, events):
                if file is not None:
                    file.close()

    def _export(self, loop: Loop) -> None:
        """Export what the run ends with, also where its last checkpoint failed: that is four times as large.

        Raises:
            CheckpointError: on every rank, if one of the two could not be written.
        """
        step, problem = loop.progress.step, loop.unsaved
        exported = f"the averaged weights of step {step} are in {self.path / EXPORT}"
        try:
            export(self.recipe, self.path, loop.ema, self.world, step, self.watch.moved)
        except CheckpointError as error:
            if problem is None:
                raise
            exported = f"nor could the averaged weights be exported ({error})"
        if problem is not None:
            self.world.raise_everywhere(
                CheckpointError(
                    f"{self.path}: trained up to step {step}, but its last checkpoint is NOT SAVED: "
                    f"{problem}; {exported}. See to the disk; the same command repeats what comes after step "
                    f"{loop.saves.saved_step}, to the same bits"
                )
            )


def _read(recipe: Recipe, engine_file: Path, world: World) -> tuple[dict[str, Any], DataFacts]:
    """What the run reads before anything is built, checked against the recipe."""
    engine_config = read_engine_file(engine_file)
    merge_config(
        engine_config, recipe.train, packs_per_step=recipe.data.packs_per_step, world_size=world.size
    )
    data = DataFacts.of(load_index(recipe.data.shards, kept_in=recipe.data.index))
    check_parts(recipe, engine_config, data)
    return engine_config, data
