"""The public entry: `build_loader` gives, for every optimiser step, the packs of this rank, in order.

What a step holds is decided by `packing.Plan` alone; this file reads, checks, replaces what is damaged, and
assembles. Workers change speed, never content.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Generic, TypeVar, cast

import torch
from torch.utils.data import DataLoader

from data_pipeline.batch import PackedBatch
from data_pipeline.config import DataConfig
from data_pipeline.encoders.autoencoder import Autoencoder
from data_pipeline.encoders.identity import latent_shape
from data_pipeline.encoders.text import TextEncoder
from data_pipeline.errors import DataError
from data_pipeline.index import Index, load_index
from data_pipeline.online import FrozenEncoders
from data_pipeline.packing import Plan
from data_pipeline.packs import Damage, PackItem, Packs, Unencoded
from data_pipeline.parcels import InParcels, Parcel, Parcels
from data_pipeline.shard_encoders import (
    check_encoders,
    check_what_is_encoded,
    load_null_states,
    stored_padding,
)
from data_pipeline.workers import outlive_signals

logger = logging.getLogger(__name__)

T = TypeVar("T")

CACHE_BYTES = 1 << 30
"""Samples that an in-process loader keeps as they were stored; beyond it they are read again."""

PREFETCH = 4
"""Packs that each worker reads ahead."""


class StepLoader(Generic[T]):
    """Iterates over optimiser steps: each item is the list of this rank's micro-batches, in order.

    `steps_per_epoch`, `plan` and `index` are there for reports; `len()` is the number of steps. `num_damaged`
    counts the distinct samples that were replaced so far, by all workers of this rank, and `num_retries` the
    requests to a URL that failed or took too long and were made again.
    """

    def __init__(
        self, packs: Packs[T], *, start_step: int, num_steps: int, workers: int, packs_per_rank: int
    ) -> None:
        self._packs = packs
        # Workers read; encoding is left to this process. Without workers all of it happens here anyway.
        self._read_packs = packs.without_encoders() if workers else packs
        self.start_step = start_step
        self.num_steps = num_steps
        self._workers = workers
        self._packs_per_rank = packs_per_rank
        self._damage = Damage(f"rank {packs.rank}")
        self.num_retries = 0

    @property
    def plan(self) -> Plan:
        return self._packs.plan

    @property
    def index(self) -> Index:
        return self._packs.index

    @property
    def encoders(self) -> dict[str, dict[str, Any]]:
        """Kind, path and revision of the frozen encoders that run while training; empty without any."""
        return self._packs.encoders.describe() if self._packs.encoders is not None else {}

    @property
    def autoencoder(self) -> Autoencoder | None:
        """The one that encodes while training, loaded if it is not yet, for use between steps; None without.

        Raises:
            DataError: if it cannot be loaded.
        """
        return None if self._packs.encoders is None else self._packs.encoders.autoencoder

    @property
    def text_encoder(self) -> TextEncoder | None:
        """Likewise."""
        return None if self._packs.encoders is None else self._packs.encoders.text_encoder

    def watch_encoders(self, around: Callable[[], AbstractContextManager[None]]) -> None:
        """Enter `around()` whenever the frozen encoders of this process run, to measure them. Call it before
        the first step."""
        if self._packs.encoders is not None:
            self._packs.around_encoders = around

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch

    @property
    def num_damaged(self) -> int:
        return len(self._damage)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[T]]:
        items = range(
            self.start_step * self._packs_per_rank, (self.start_step + self.num_steps) * self._packs_per_rank
        )
        source = self._read_by_workers(items) if self._workers else self._read_here(items)
        try:
            for _ in range(self.num_steps):
                yield [self._take(item) for item in islice(source, self._packs_per_rank)]
        finally:
            # A raised error refers to this frame. Left to the garbage collector, workers take 5 s to stop.
            del source

    def _read_here(self, items: range) -> Iterator[PackItem]:
        for number in items:
            item = self._packs[number]
            yield item.pin_memory() if torch.cuda.is_available() else item

    def _read_by_workers(self, items: range) -> Iterator[PackItem]:
        # batch_size None: an item is a whole pack. Items arrive in the sampler's order, whoever is first.
        # Its own generator: the loader must not advance the global one of a training process.
        # Of each worker: packs that are read ahead, the one that is being read, and its share of the two
        # steps that the training process may hold.
        held = -(-2 * self._packs_per_rank // self._workers)
        parcels = Parcels(self._workers, PREFETCH + 1 + held)
        loader = DataLoader(
            InParcels(self._read_packs, parcels),
            batch_size=None,
            sampler=items,
            num_workers=self._workers,
            worker_init_fn=outlive_signals,
            generator=torch.Generator(),
            prefetch_factor=PREFETCH,
            pin_memory=torch.cuda.is_available(),
        )
        source = iter(loader)
        try:
            for item in source:
                yield item.open() if isinstance(item, Parcel) else item
        finally:
            # Its workers stop with it.
            del source

    def _take(self, item: PackItem) -> T:
        """The micro-batch of an item, encoded if a worker left that to do, its damage counted and logged.

        Raises:
            DataError: that of the item, or if this rank has met too much damage.
        """
        self._count_retries(item.retries)
        if isinstance(item.value, Unencoded):
            encoded = self._packs.encoded(item.value)
            self._count_retries(self._packs.take_retries())
            item = encoded._replace(damaged=(*item.damaged, *encoded.damaged))
        self._damage.num_read += item.num_images
        for sample_id, message in item.damaged:
            if sample_id not in self._damage:
                logger.warning("damaged sample replaced (%d so far): %s", len(self._damage) + 1, message)
                self._damage.add(sample_id, message)
        if item.error is not None:
            raise item.error
        return cast(T, item.value)

    def _count_retries(self, retries: int) -> None:
        before, self.num_retries = self.num_retries, self.num_retries + retries
        # The first, and whenever they have doubled: a slow server must not fill the log.
        if self.num_retries.bit_length() > before.bit_length():
            logger.warning(
                "%s: %d requests failed or took too long so far, and were made again",
                self.index.folder,
                self.num_retries,
            )


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
    device: torch.device | None = None,
    cache_bytes: int = CACHE_BYTES,
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
            processes are spawned. Without it the loader yields `PackedBatch`. Where encoders run while
            training, it is applied in this process.
        device: where encoders run, for shards that leave something to encode; the CPU by default.
        cache_bytes: samples of up to so many bytes in all are kept in memory, where keeping them is of use.

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
    index = load_index(config.shards, kept_in=config.index)
    check_encoders(config, index)
    check_what_is_encoded(config, index)
    encoders = None
    if index.online or config.image_encoder is not None:
        encoders = FrozenEncoders(index, config, patch_size=patch_size, device=device or torch.device("cpu"))
    plan = Plan(
        index.groups(patch_size),
        tokens_per_pack=config.tokens_per_pack,
        packs_per_step=config.packs_per_step,
        seed=seed,
    )
    packs: Packs[Any] = Packs(
        index,
        plan,
        patch_size=patch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        caption_dropout=config.caption_dropout,
        null_states=load_null_states(config, index.text_width) if index.has_text else None,
        padding_state=stored_padding(config, index),
        cache_bytes=cache_bytes if _is_cached(config, encoders) else 0,
        finish=finish,
        encoders=encoders,
        pixel_channels=latent_shape(config.autoencoder).pixel_channels if encoders is not None else 3,
        flip_pictures=config.flip_online,
    )
    return StepLoader(
        packs,
        start_step=start_step,
        num_steps=num_steps,
        workers=config.workers,
        packs_per_rank=config.packs_per_step // world_size,
    )


def _is_cached(config: DataConfig, encoders: FrozenEncoders | None) -> bool:
    # What this process encodes is kept whoever reads it: encoding costs more than reading.
    return config.workers == 0 or encoders is not None
