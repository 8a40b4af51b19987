"""From the loader's pack to what one micro-step reads, noise and times included.

`Prepare` runs in the loader (in its workers, when it has some), so that the training process only moves
tensors. Latents travel as they were stored; the device makes tokens of them. Everything random is drawn per
sample from counters (seed, purpose, epoch, sample): the same sample in the same epoch gets the same noise and
the same (t, r) on any rank, in any pack, and after any resume.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Latents, PackedBatch
from data_pipeline.draws import generator
from data_pipeline.encoders.text import fill_up
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.time_sampling import Times, draw_times
from tim_ds.objective.transport import build_transport
from tim_ds.packed import ClassCondition, Condition, Segments, TextCondition


@dataclass(frozen=True, eq=False)
class StepInputs:
    """One micro-step of one rank.

    Shapes:
        z_TC: float32 [T, C], unit noise.
        features_TZ: [T, Z], of an image encoder in its dtype; None without feature alignment.
    """

    latents: Latents
    z_TC: Tensor
    times: Times
    segments: Segments
    condition: Condition
    null_condition: Condition | None
    """The condition of every image replaced by the null one; only where the objective asks for it."""
    keys: tuple[str, ...]
    sample_ids: tuple[int, ...]
    images_in_step: int
    epoch: int
    step: int
    features_TZ: Tensor | None = None
    num_replaced: int = 0
    """Images that stand in for damaged samples."""

    @cached_property
    def x_TC(self) -> Tensor:
        """Clean tokens, float32 [T, C], made at the first use by the device that holds the latents."""
        return self.latents.tokens()

    @property
    def num_images(self) -> int:
        return self.segments.num_segments

    def pin_memory(self) -> StepInputs:
        """The same inputs with their large tensors in pinned memory, from which `to` copies without waiting.

        The loader calls it where there is a device.
        """
        condition = self.condition
        if isinstance(condition, TextCondition):
            condition = replace(condition, states_LE=condition.states_LE.pin_memory())
        features = None if self.features_TZ is None else self.features_TZ.pin_memory()
        return replace(
            self,
            latents=self.latents.pin_memory(),
            z_TC=self.z_TC.pin_memory(),
            condition=condition,
            features_TZ=features,
        )

    def to(self, device: torch.device) -> StepInputs:
        """The same inputs on `device`, copied without waiting."""
        if self.z_TC.device == device:
            return self
        null, features = self.null_condition, self.features_TZ
        return replace(
            self,
            latents=self.latents.to(device, non_blocking=True),
            z_TC=self.z_TC.to(device, non_blocking=True),
            times=self.times.to(device, non_blocking=True),
            segments=self.segments.to(device, non_blocking=True),
            condition=self.condition.to(device, non_blocking=True),
            null_condition=None if null is None else null.to(device, non_blocking=True),
            features_TZ=None if features is None else features.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Prepare:
    """Turns a `PackedBatch` into `StepInputs`: the loader's `finish`.

    Args:
        objective: decides how times are drawn.
        seed: of the run.
        null_states_LE: states of the empty caption, for a guided target on captions.
        null_label: label that stands for no class, for a guided target on classes.
    """

    objective: ObjectiveConfig
    seed: int
    null_states_LE: Tensor | None = None
    null_label: int | None = None

    def __call__(self, batch: PackedBatch) -> StepInputs:
        segments = Segments.from_grids(batch.grids)
        return StepInputs(
            latents=batch.latents,
            z_TC=draw_noise(batch, self.seed),
            times=self._times(batch),
            segments=segments,
            condition=_condition(batch),
            null_condition=self._null_condition(batch),
            keys=batch.keys,
            sample_ids=batch.sample_ids,
            images_in_step=batch.images_in_step,
            epoch=batch.epoch,
            step=batch.step,
            features_TZ=batch.features_TZ,
            num_replaced=batch.num_replaced,
        )

    def _times(self, batch: PackedBatch) -> Times:
        normals, uniforms = [], []
        for sample_id in batch.sample_ids:
            draws = generator(self.seed, "times", batch.epoch, sample_id)
            normals.append(draws.standard_normal(2))
            uniforms.append(draws.random(3))
        return draw_times(
            build_transport(self.objective.transport),
            self.objective,
            torch.from_numpy(np.stack(normals)),
            torch.from_numpy(np.stack(uniforms)),
            dtype=torch.float64,
        )

    def _null_condition(self, batch: PackedBatch) -> Condition | None:
        if self.objective.guided_target is None:
            return None
        num_images = len(batch.grids)
        if self.null_states_LE is not None:
            # As long as the captions of the pack, where these are filled up.
            longest = max(batch.text_lengths or (0,))
            (states,) = fill_up([self.null_states_LE], batch.padding_1E, longest)
            return TextCondition(
                states.repeat(num_images, 1), Segments.from_lengths([len(states)] * num_images)
            )
        assert self.null_label is not None  # run.py gives one of the two
        return ClassCondition(torch.full((num_images,), self.null_label))


def draw_noise(batch: PackedBatch, seed: int) -> Tensor:
    """Unit noise of every image of the pack, drawn for the image alone: float32 [T, C]."""
    channels = batch.latents.token_channels
    parts = [
        generator(seed, "noise", batch.epoch, sample_id).standard_normal((h * w, channels), dtype=np.float32)
        for sample_id, (h, w) in zip(batch.sample_ids, batch.grids, strict=True)
    ]
    return torch.from_numpy(np.concatenate(parts))


def _condition(batch: PackedBatch) -> Condition:
    if batch.labels_S is not None:
        return ClassCondition(batch.labels_S)
    assert batch.text_LE is not None and batch.text_lengths is not None  # PackedBatch carries text or labels
    return TextCondition(batch.text_LE, Segments.from_lengths(batch.text_lengths))
