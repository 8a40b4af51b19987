"""The public entry: `build_loader` gives, for every optimiser step, the packs of this rank, in order.

What a step holds is decided by `packing.Plan` alone; this file reads, checks, replaces what is damaged, and
assembles. Workers change speed, never content.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipeline.batch import PackedBatch
from data_pipeline.config import DataConfig
from data_pipeline.draws import generator
from data_pipeline.errors import DataError
from data_pipeline.index import Index, load_index
from data_pipeline.packing import Plan
from data_pipeline.reader import ShardReader, image_tokens, same_grid
from data_pipeline.schema import MANIFEST_NAME, NULL_NAME, check_states

logger = logging.getLogger(__name__)

T = TypeVar("T")

CACHE_BYTES = 1 << 30
"""Samples that an in-process loader keeps decoded; beyond it they are read again."""

MAX_CORRUPT_SHARE = 0.01
"""Share of damaged samples above which a run stops ..."""

MIN_CORRUPT_LIMIT = 8
"""... but never before this many: a small start must not end on one bad sample."""

MAX_REPLACEMENTS = 16
"""Substitutes that are tried for one damaged sample."""


class StepLoader(Generic[T]):
    """Iterates over optimiser steps: each item is the list of this rank's micro-batches, in order.

    `steps_per_epoch`, `plan` and `index` are there for reports; `len()` is the number of steps.
    """

    def __init__(
        self, packs: _Packs[T], *, start_step: int, num_steps: int, workers: int, packs_per_rank: int
    ) -> None:
        self._packs = packs
        self.start_step = start_step
        self.num_steps = num_steps
        self._workers = workers
        self._packs_per_rank = packs_per_rank

    @property
    def plan(self) -> Plan:
        return self._packs.plan

    @property
    def index(self) -> Index:
        return self._packs.index

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[T]]:
        items = range(
            self.start_step * self._packs_per_rank, (self.start_step + self.num_steps) * self._packs_per_rank
        )
        if self._workers == 0:
            source: Iterator[T | DataError] = (self._packs[i] for i in items)
        else:
            # batch_size None: an item is a whole pack. Items arrive in the sampler's order, whoever is first.
            # Its own generator: the loader must not advance the global one of a training process.
            source = iter(
                DataLoader(
                    self._packs,
                    batch_size=None,
                    sampler=items,
                    num_workers=self._workers,
                    generator=torch.Generator(),
                    prefetch_factor=4,
                    pin_memory=torch.cuda.is_available(),
                )
            )
        try:
            for _ in range(self.num_steps):
                step: list[T] = []
                for item in islice(source, self._packs_per_rank):
                    if isinstance(item, DataError):
                        raise item
                    step.append(item)
                yield step
        finally:
            # A raised error refers to this frame. Left to the garbage collector, workers take 5 s to stop.
            del source


class _Packs(Dataset["T | DataError"], Generic[T]):
    """Pack number -> finished micro-batch of this rank; pack n belongs to step n // packs_per_rank.

    A `DataError` is returned, not raised: so it reaches the training process as it is, where an exception
    would arrive wrapped in the worker's traceback.
    """

    def __init__(
        self,
        index: Index,
        plan: Plan,
        *,
        grids: np.ndarray,
        patch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        caption_dropout: float,
        null_states: Tensor | None,
        cache_bytes: int,
        finish: Callable[[PackedBatch], T] | None,
    ) -> None:
        self.index = index
        self.plan = plan
        self._grids = grids
        self._patch_size = patch_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._caption_dropout = caption_dropout
        self._null_states = null_states
        self._finish = finish
        self._reader = ShardReader(index)
        self._cache: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._cache_room = cache_bytes
        self._num_read = 0
        self._corrupt: dict[int, str] = {}

    def __getitem__(self, number: int) -> T | DataError:
        step, position = divmod(number, self.plan.packs_per_step // self._world_size)
        planned = self.plan.step(step)
        try:
            batch = self._assemble(
                planned.of_rank(self._rank, self._world_size)[position],
                epoch=planned.epoch,
                step=step,
                images_in_step=planned.num_images,
            )
        except DataError as error:
            return error
        return self._finish(batch) if self._finish is not None else cast(T, batch)

    def _assemble(
        self, sample_ids: tuple[int, ...], *, epoch: int, step: int, images_in_step: int
    ) -> PackedBatch:
        planned_ids = sample_ids
        loaded = [self._load(i, epoch) for i in planned_ids]
        sample_ids = tuple(i for i, _, _ in loaded)
        dropped = tuple(self._drops_caption(i, epoch) for i in sample_ids)
        texts: list[Tensor] | None = None
        labels: Tensor | None = None
        if self.index.has_text:
            texts = [
                cast(Tensor, self._null_states if drop else text)
                for (_, _, text), drop in zip(loaded, dropped, strict=True)
            ]
        else:
            stored = self.index.columns["label"]
            labels = torch.tensor(
                [
                    self.index.num_classes if drop else int(stored[i])
                    for i, drop in zip(sample_ids, dropped, strict=True)
                ]
            )
        return PackedBatch(
            latents_TC=torch.cat([tokens for _, tokens, _ in loaded]),
            grids=tuple((int(h), int(w)) for h, w in self._grids[list(sample_ids)]),
            text_LE=None if texts is None else torch.cat(texts),
            text_lengths=None if texts is None else tuple(text.shape[0] for text in texts),
            labels_S=labels,
            sample_ids=sample_ids,
            keys=tuple(self.index.name(i) for i in sample_ids),
            epoch=epoch,
            step=step,
            images_in_step=images_in_step,
            dropped_S=dropped,
            num_replaced=sum(a != b for a, b in zip(sample_ids, planned_ids, strict=True)),
        )

    def _drops_caption(self, sample_id: int, epoch: int) -> bool:
        if self._caption_dropout == 0.0:
            return False
        return generator(self._seed, "caption_dropout", epoch, sample_id).random() < self._caption_dropout

    def _load(self, sample_id: int, epoch: int) -> tuple[int, Tensor, Tensor | None]:
        """Id, tokens and text of a sample, or of the one that replaces it when it is damaged."""
        first = self._try(sample_id)
        if first is not None:
            return sample_id, *first
        # A substitute of the same grid keeps the pack within its budget and the step as all ranks planned it.
        candidates = same_grid(self._grids, sample_id)
        order = generator(self._seed, "replacement", epoch, sample_id).permutation(candidates)
        for candidate in order[: MAX_REPLACEMENTS + 1].tolist():
            found = None if candidate == sample_id else self._try(candidate)
            if found is not None:
                return candidate, *found
        raise DataError(
            f"{self._corrupt[sample_id]}; no readable sample of its size "
            f"({len(candidates) - 1} others, at most {MAX_REPLACEMENTS} tried) can replace it"
        )

    def _try(self, sample_id: int) -> tuple[Tensor, Tensor | None] | None:
        """Tokens and text of a sample; None when it is damaged, which is counted and logged once."""
        if sample_id in self._cache:
            return self._cache[sample_id]
        if sample_id in self._corrupt:
            return None
        self._num_read += 1
        try:
            sample = self._reader.read(sample_id)
        except DataError as error:
            self._corrupt[sample_id] = str(error)
            logger.warning("damaged sample replaced (%d so far): %s", len(self._corrupt), error)
            self._check_rate(error)
            return None
        tokens = image_tokens(sample.latent, self._patch_size)
        text = None if sample.states is None else sample.states.to(torch.float32)
        size = tokens.nbytes + (0 if text is None else text.nbytes)
        if size <= self._cache_room:
            self._cache_room -= size
            self._cache[sample_id] = (tokens, text)
        return tokens, text

    def _check_rate(self, error: DataError) -> None:
        limit = max(MIN_CORRUPT_LIMIT, MAX_CORRUPT_SHARE * self._num_read)
        if len(self._corrupt) > limit:
            raise DataError(
                f"{len(self._corrupt)} of {self._num_read} samples read by this process are damaged "
                f"(allowed: {MIN_CORRUPT_LIMIT}, or {MAX_CORRUPT_SHARE:.0%}); last: {error}. "
                f"Check the disk, or prepare the shards again"
            ) from error


def check_encoders(config: DataConfig, index: Index) -> None:
    """Compare the encoders of a recipe with what made the shards.

    Raises:
        DataError: naming the key of the recipe that disagrees with the shards or with their manifest.
    """
    where = config.shards
    text, autoencoder = config.text_encoder, config.autoencoder
    if index.has_text == (text is None):
        holds, asks = ("captions", "null") if index.has_text else ("class labels", "an encoder")
        raise DataError(f"data.text_encoder: the shards in {where} hold {holds}, the recipe says {asks}")
    path = Path(where) / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text()) if path.is_file() else {}
        made_by = {"autoencoder": manifest.get("autoencoder"), "text_encoder": manifest.get("text_encoder")}
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a readable manifest ({error!r})") from error
    # The path of the weights is left out: the same model may lie in another place.
    compared: list[tuple[str, str, object]] = [("autoencoder", "kind", autoencoder.kind)]
    if autoencoder.kind == "pixels":
        compared += [
            ("autoencoder", "factor", autoencoder.factor),
            ("autoencoder", "channels", autoencoder.channels),
        ]
    if text is not None:
        compared.append(("text_encoder", "kind", text.kind))
        if text.kind == "words":
            compared.append(("text_encoder", "width", text.width))
    for section, name, asked in compared:
        recorded = made_by[section]
        if isinstance(recorded, dict) and recorded.get(name) != asked:
            raise DataError(
                f"data.{section}.{name}: the shards in {where} were made with {recorded.get(name)!r}, "
                f"the recipe says {asked!r}"
            )
    channels = autoencoder.channels * autoencoder.factor**2
    if autoencoder.kind == "pixels" and index.channels != channels:
        raise DataError(
            f"data.autoencoder: {autoencoder.channels} channels and factor {autoencoder.factor} give latents "
            f"of {channels} channels, the shards in {where} hold {index.channels}"
        )
    if text is not None and text.kind == "words" and text.width != index.text_width:
        raise DataError(
            f"data.text_encoder.width: the shards in {where} hold states of width {index.text_width}, "
            f"the recipe says {text.width}"
        )


def load_null_states(folder: Path | str, width: int) -> Tensor:
    """States of the empty caption, float32 [n, E].

    Raises:
        DataError: if they are missing, damaged or of another width than the captions.
    """
    path = Path(folder) / NULL_NAME
    if not path.is_file():
        raise DataError(
            f"{path}: missing; text data hold the states of the empty caption there. Prepare them again"
        )
    try:
        states = load_file(path)["states"].to(torch.float32)
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path}: expected a tensor 'states' ({error!r}); prepare the data again") from error
    check_states(states, str(path))
    if states.shape[1] != width:
        raise DataError(
            f"{path}: expected states of width {width}, as in the shards, received {states.shape[1]}"
        )
    return states


def build_loader(
    config: DataConfig,
    *,
    patch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    num_steps: int,
    finish: Callable[[PackedBatch], T] | None = None,
) -> StepLoader[T]:
    """Loader of steps `start_step` up to `start_step + num_steps`, for one rank.

    Args:
        config: shards, budget and packs of a step.
        patch_size: latent cells a side of a token.
        rank, world_size: this process takes packs `rank::world_size` of every step.
        seed: of the run; with the index it fixes the order and the dropped captions.
        start_step: first optimiser step: resume is this number.
        num_steps: how many steps follow.
        finish: applied to every batch, in the worker when there are workers; then it must be picklable where
            processes are spawned. Without it the loader yields `PackedBatch`.

    Raises:
        DataError: if shards, index, budget, ranks and patch size do not fit together.
    """
    if not 0 <= rank < world_size:
        raise DataError(f"rank: expected 0 to {world_size - 1}, received {rank}")
    if config.packs_per_step % world_size:
        raise DataError(
            f"data.packs_per_step: {config.packs_per_step} is not divisible by the world size {world_size}"
        )
    if start_step < 0 or num_steps < 0:
        raise DataError(
            f"start_step and num_steps: expected 0 or more, received {start_step} and {num_steps}"
        )
    index = load_index(config.shards)
    if index.has_text == (config.text_encoder is None):
        holds, asks = ("captions", "null") if index.has_text else ("class labels", "an encoder")
        raise DataError(
            f"data.text_encoder: the shards in {config.shards} hold {holds}, the recipe says {asks}"
        )
    check_encoders(config, index)
    grids = index.grids(patch_size)
    plan = Plan(
        grids.prod(axis=1),
        tokens_per_pack=config.tokens_per_pack,
        packs_per_step=config.packs_per_step,
        seed=seed,
    )
    packs: _Packs[Any] = _Packs(
        index,
        plan,
        grids=grids,
        patch_size=patch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        caption_dropout=config.caption_dropout,
        null_states=load_null_states(config.shards, index.text_width) if index.has_text else None,
        cache_bytes=CACHE_BYTES if config.workers == 0 else 0,
        finish=finish,
    )
    return StepLoader(
        packs,
        start_step=start_step,
        num_steps=num_steps,
        workers=config.workers,
        packs_per_rank=config.packs_per_step // world_size,
    )
