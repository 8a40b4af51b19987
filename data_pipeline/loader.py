"""The public entry: `build_loader` gives, for every optimiser step, the packs of this rank, in order.

What a step holds is decided by `packing.Plan` alone; this file reads, checks, replaces what is damaged, and
assembles. Workers change speed, never content.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_pipeline.batch import Latents, PackedBatch
from data_pipeline.buffers import Buffers
from data_pipeline.config import DataConfig
from data_pipeline.direct import open_direct
from data_pipeline.draws import generator, uniforms
from data_pipeline.encoders.autoencoder import Autoencoder
from data_pipeline.encoders.identity import latent_shape
from data_pipeline.encoders.text import TextEncoder, fill_up
from data_pipeline.errors import DataError
from data_pipeline.index import Index, load_index
from data_pipeline.online import FrozenEncoders, OnlineReader, RawSample
from data_pipeline.packing import PackPlan, Plan
from data_pipeline.parcels import InParcels, Parcel, Parcels
from data_pipeline.reader import ShardReader, StoredSample
from data_pipeline.schema import MANIFEST_NAME, NULL_NAME, check_states
from data_pipeline.storage import read_beside
from data_pipeline.workers import outlive_signals

logger = logging.getLogger(__name__)

T = TypeVar("T")

CACHE_BYTES = 1 << 30
"""Samples that an in-process loader keeps as they were stored; beyond it they are read again."""

PREFETCH = 4
"""Packs that each worker reads ahead."""

DRAWS = ("caption_dropout", "caption_choice", "flip")
"""Streams of what is drawn for each sample."""

FLIP_SHARE = 0.5
"""Share of the epochs in which a sample is mirrored, where it may be."""

MAX_CORRUPT_SHARE = 0.01
"""Share of damaged samples above which a run stops ..."""

MIN_CORRUPT_LIMIT = 8
"""... but never before this many: a small start must not end on one bad sample."""

MAX_REPLACEMENTS = 16
"""Substitutes that are tried for one damaged sample ..."""

REPLACEMENTS_PER_SIZE = 8
"""... and how many of them of one size."""


class _Damage:
    """Distinct damaged samples among those that somebody read, with the limit that ends a run."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._found: dict[int, str] = {}
        self.num_read = 0

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._found

    def __getitem__(self, sample_id: int) -> str:
        return self._found[sample_id]

    def __len__(self) -> int:
        return len(self._found)

    def add(self, sample_id: int, message: str) -> None:
        """Count a damaged sample.

        Raises:
            DataError: if that is one too many.
        """
        self._found[sample_id] = message
        if len(self) > max(MIN_CORRUPT_LIMIT, MAX_CORRUPT_SHARE * self.num_read):
            raise DataError(
                f"{len(self)} of {self.num_read} samples read by {self._who} are damaged (allowed: "
                f"{MIN_CORRUPT_LIMIT}, or {MAX_CORRUPT_SHARE:.0%}); last: {message}. "
                f"Check the disk or the network, or prepare the shards again"
            )


class _Item(NamedTuple):
    """A pack on its way to the training process."""

    value: Any
    """The finished micro-batch; None with an error."""
    num_images: int
    damaged: tuple[tuple[int, str], ...]
    """Samples that were found damaged since the last item, and why."""
    error: DataError | None
    """Returned, not raised: so it arrives as it is, not wrapped in a worker's traceback."""
    retries: int = 0
    """Requests to a URL that were made again since the last item."""

    def pin_memory(self) -> _Item:
        """The same in page-locked memory, where the micro-batch has a method of this name."""
        pin = getattr(self.value, "pin_memory", None)
        return self if pin is None else self._replace(value=pin())


@dataclass(frozen=True, eq=False)
class _Unencoded:
    """A pack as a worker read it, before the frozen encoders of the training process."""

    planned: PackPlan
    chosen: tuple[int, ...]
    samples: list[RawSample]


class _Draws(NamedTuple):
    """What is drawn for each sample of a pack, in its epoch."""

    dropped: np.ndarray
    """Whether the caption or label is replaced by the null one."""
    caption: np.ndarray
    """From [0, 1): which of several captions."""
    mirrored: np.ndarray
    """Whether the mirror image is used where it is stored."""


class StepLoader(Generic[T]):
    """Iterates over optimiser steps: each item is the list of this rank's micro-batches, in order.

    `steps_per_epoch`, `plan` and `index` are there for reports; `len()` is the number of steps. `num_damaged`
    counts the distinct samples that were replaced so far, by all workers of this rank, and `num_retries` the
    requests to a URL that failed or took too long and were made again.
    """

    def __init__(
        self, packs: _Packs[T], *, start_step: int, num_steps: int, workers: int, packs_per_rank: int
    ) -> None:
        self._packs = packs
        # Workers read; encoding is left to this process. Without workers all of it happens here anyway.
        self._read_packs = packs.without_encoders() if workers else packs
        self.start_step = start_step
        self.num_steps = num_steps
        self._workers = workers
        self._packs_per_rank = packs_per_rank
        self._damage = _Damage(f"rank {packs.rank}")
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

    def _read_here(self, items: range) -> Iterator[_Item]:
        for number in items:
            item = self._packs[number]
            yield item.pin_memory() if torch.cuda.is_available() else item

    def _read_by_workers(self, items: range) -> Iterator[_Item]:
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

    def _take(self, item: _Item) -> T:
        """The micro-batch of an item, encoded if a worker left that to do, its damage counted and logged.

        Raises:
            DataError: that of the item, or if this rank has met too much damage.
        """
        self._count_retries(item.retries)
        if isinstance(item.value, _Unencoded):
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


class _Packs(Dataset["_Item"], Generic[T]):
    """Pack number -> finished micro-batch of this rank; pack n belongs to step n // packs_per_rank."""

    def __init__(
        self,
        index: Index,
        plan: Plan,
        *,
        patch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        caption_dropout: float,
        null_states: Tensor | None,
        padding_state: Tensor | None,
        cache_bytes: int,
        finish: Callable[[PackedBatch], T] | None,
        encoders: FrozenEncoders | None = None,
        pixel_channels: int = 3,
        flip_pictures: bool = False,
    ) -> None:
        self.index = index
        self.encoders = encoders
        self.around_encoders: Callable[[], AbstractContextManager[None]] = nullcontext
        self.plan = plan
        self.rank = rank
        self._patch_size = patch_size
        self._seed = seed
        self._caption_dropout = caption_dropout
        self._null_states = null_states
        self._padding_state = padding_state
        self._finish = finish
        self._is_encoded = encoders is None
        self._packs_of_rank = plan.of_rank(rank, world_size)
        self._reader = ShardReader(index) if encoders is None else OnlineReader(index, pixel_channels)
        self._direct = open_direct(self._reader) if encoders is None else None
        self._states = Buffers()
        self._flip_pictures = flip_pictures
        # By id and by whether it was mirrored.
        self._cache: dict[tuple[int, bool], StoredSample] = {}
        # What lies in a folder is kept by the system's page cache, for all processes of a machine.
        self._cache_room = cache_bytes if self._direct is None else 0
        self._damage = _Damage(f"a process of rank {rank}")
        self._news: list[tuple[int, str]] = []
        self._retries = 0

    def without_encoders(self) -> _Packs[T]:
        """What workers are given: it reads everything and encodes nothing. Itself without encoders."""
        if self.encoders is None:
            return self
        reading = copy(self)
        reading.encoders, reading._finish = None, None
        reading._cache, reading._damage, reading._news = {}, _Damage(f"a process of rank {self.rank}"), []
        return reading

    def __getitem__(self, number: int) -> _Item:
        item = self._pack(number)
        retries = self.take_retries()
        return item._replace(retries=retries) if retries else item

    def take_retries(self) -> int:
        """Requests that this process made again since it was last asked."""
        before, self._retries = self._retries, self._reader.storage.num_retries
        return self._retries - before

    def _pack(self, number: int) -> _Item:
        planned = self._packs_of_rank.pack(*divmod(number, self._packs_of_rank.packs_per_step))
        batch = self._read_directly(planned)
        if batch is not None:
            return self._finished(planned, batch)
        sample_ids = tuple(planned.sample_ids.tolist())
        try:
            samples, chosen = self._load(sample_ids, planned.epoch)
        except DataError as error:
            return _Item(None, len(sample_ids), self._take_news(), error)
        if not self._is_encoded and self.encoders is None:
            return self._item(planned, _Unencoded(planned, chosen, samples))
        return self._finished(planned, self._assemble(planned, chosen, samples))

    def encoded(self, pack: _Unencoded) -> _Item:
        """The pack that a worker read, encoded here."""
        raw = dict(zip(pack.chosen, pack.samples, strict=True))
        try:
            samples, chosen = self._load(pack.chosen, pack.planned.epoch, raw)
        except DataError as error:
            return _Item(None, len(pack.chosen), self._take_news(), error)
        item = self._finished(pack.planned, self._assemble(pack.planned, chosen, samples))
        return item.pin_memory() if torch.cuda.is_available() else item

    def _finished(self, planned: PackPlan, batch: PackedBatch) -> _Item:
        return self._item(planned, batch if self._finish is None else self._finish(batch))

    def _item(self, planned: PackPlan, value: Any) -> _Item:
        return _Item(value, len(planned.sample_ids), self._take_news(), None)

    def _take_news(self) -> tuple[tuple[int, str], ...]:
        news, self._news = tuple(self._news), []
        return news

    def _read_directly(self, planned: PackPlan) -> PackedBatch | None:
        """The pack as it is planned; None if anything about it is not as the index says, or if these shards
        have to be read sample by sample."""
        if self._direct is None:
            return None
        ids, draws = planned.sample_ids, self._draws(planned.epoch, planned.sample_ids)
        values = self._direct.latents(ids, draws.mirrored)
        texts = None
        if values is not None and self._null_states is not None:
            texts = self._direct.captions(ids, draws.caption, draws.dropped, self._null_states)
        if values is None or (texts is None and self.index.has_text):
            return None
        self._damage.num_read += len(ids)
        return self._batch(planned, ids, draws, values, texts)

    def _assemble(
        self, planned: PackPlan, sample_ids: tuple[int, ...], samples: list[StoredSample]
    ) -> PackedBatch:
        """The batch of samples that were read one by one; some may stand in for those that were planned."""
        ids = np.array(sample_ids)
        draws = self._draws(planned.epoch, ids)
        texts: list[Tensor] | None = None
        if self._null_states is not None:
            null, drawn = self._null_states, zip(samples, draws.dropped, draws.caption, strict=True)
            texts = [null if drop else _caption(sample, draw) for sample, drop, draw in drawn]
        values, features = _latents(samples, draws.mirrored), _features(samples, draws.mirrored)
        return self._batch(planned, ids, draws, values, texts, features)

    def _batch(
        self,
        planned: PackPlan,
        ids: np.ndarray,
        draws: _Draws,
        values: Tensor,
        texts: list[Tensor] | None,
        features: Tensor | None = None,
    ) -> PackedBatch:
        labels = padding = None
        if texts is not None:
            padding = self._padding()
            if padding is not None:
                texts = fill_up(texts, padding)
        else:
            stored = self.index.columns["label"][ids].astype(np.int64)
            labels = torch.from_numpy(np.where(draws.dropped, self.index.num_classes, stored))
        grids = self.index.grids(ids, self._patch_size)
        return PackedBatch(
            latents=Latents(values, grids, self._patch_size, self.index.channels),
            text_LE=None if texts is None else self._joined(texts),
            text_lengths=None if texts is None else tuple(len(text) for text in texts),
            labels_S=labels,
            sample_ids=tuple(ids.tolist()),
            keys=self.index.names(ids),
            epoch=planned.epoch,
            step=planned.step,
            images_in_step=planned.images_in_step,
            dropped_S=tuple(draws.dropped.tolist()),
            num_replaced=int(np.count_nonzero(ids != planned.sample_ids)),
            features_TZ=features,
            padding_1E=padding,
        )

    def _padding(self) -> Tensor | None:
        """What captions are filled up with: of the encoder that runs, or else of that of the shards."""
        online = None if self.encoders is None else self.encoders.padding_state
        return self._padding_state if online is None else online

    def _joined(self, texts: list[Tensor]) -> Tensor:
        """All states in float32, end to end."""
        rows, width = sum(len(text) for text in texts), self.index.text_width
        return torch.cat(texts, out=self._states.take(4 * rows * width).view(torch.float32).view(rows, width))

    def _draws(self, epoch: int, ids: np.ndarray) -> _Draws:
        dropped, caption, mirrored = uniforms(self._seed, DRAWS, epoch, ids)
        return _Draws(dropped < self._caption_dropout, caption, mirrored < FLIP_SHARE)

    def _load(
        self, sample_ids: tuple[int, ...], epoch: int, raw: Mapping[int, RawSample] | None = None
    ) -> tuple[list[Any], tuple[int, ...]]:
        """The samples, damaged ones replaced, and the ids of what was loaded. `raw` is not read again."""
        found = self._read(sample_ids, epoch, raw or {})
        chosen = tuple(i if i in found else self._replace(i, epoch, found) for i in sample_ids)
        return [found[i] for i in chosen], chosen

    def _replace(self, sample_id: int, epoch: int, found: dict[int, Any]) -> int:
        """A readable sample in place of a damaged one, added to `found`.

        Of the same size where there is one, else of the next smaller: so the pack keeps its budget, and the
        step its number of images, as all ranks planned them.
        """
        rng = generator(self._seed, "replacement", epoch, sample_id)
        shapes = [self.index.same_size(sample_id)]
        shapes += map(self.index.of_shape, self.index.smaller_shapes(sample_id)[:MAX_REPLACEMENTS])
        tried = 0
        for members in shapes:
            order = rng.choice(len(members), size=min(len(members), REPLACEMENTS_PER_SIZE), replace=False)
            for candidate in members[order].tolist():
                if candidate == sample_id or tried == MAX_REPLACEMENTS:
                    continue
                tried += 1
                found.update(self._read((candidate,), epoch, {}))
                if candidate in found:
                    return candidate
        raise DataError(
            f"{self._damage[sample_id]}; none of {tried} samples of its size or smaller could replace it"
        )

    def _mirrored(self, sample_ids: tuple[int, ...], epoch: int) -> set[int]:
        """Those of the samples whose picture is mirrored before it is encoded: where shards hold latents of
        mirror images, these would be used."""
        if not self._flip_pictures:
            return set()
        mirrored = self._draws(epoch, np.array(sample_ids)).mirrored.tolist()
        return {i for i, mirror in zip(sample_ids, mirrored, strict=True) if mirror}

    def _read(self, sample_ids: tuple[int, ...], epoch: int, raw: Mapping[int, RawSample]) -> dict[int, Any]:
        """The samples that are readable; a damaged one is counted, and not tried again.

        Raises:
            DataError: if this process has met too much damage.
        """
        mirrored = self._mirrored(sample_ids, epoch)
        variants = {i: (i, i in mirrored) for i in sample_ids}
        found: dict[int, Any] = {i: self._cache[v] for i, v in variants.items() if v in self._cache}
        wanted = [i for i in sample_ids if i not in found and i not in self._damage]
        self._damage.num_read += len(wanted)
        for sample_id, sample in zip(wanted, self._read_wanted(wanted, mirrored, raw), strict=True):
            if isinstance(sample, DataError):
                self._news.append((sample_id, str(sample)))
                self._damage.add(sample_id, str(sample))
                continue
            found[sample_id] = sample
            if self._cache_room and isinstance(sample, StoredSample) and sample.num_bytes <= self._cache_room:
                self._cache_room -= sample.num_bytes
                # As read, its tensors are views that keep all bytes of the sample in memory.
                self._cache[variants[sample_id]] = sample.copied()
        return found

    def _read_wanted(
        self, wanted: Sequence[int], mirrored: set[int], given: Mapping[int, RawSample]
    ) -> Sequence[StoredSample | RawSample | DataError]:
        if not isinstance(self._reader, OnlineReader):
            return self._reader.read_all(wanted)
        fresh = [i for i in wanted if i not in given]
        read: dict[int, RawSample | DataError] = dict(given)
        read.update(zip(fresh, self._reader.read_raw(fresh), strict=True))
        if self.encoders is None:
            return [read[i] for i in wanted]
        good = {
            i: sample.mirrored() if i in mirrored else sample
            for i in wanted
            if isinstance(sample := read[i], RawSample)
        }
        with self.around_encoders():
            encoded = self.encoders.encode(list(good.values()), [self.index.name(i) for i in good])
        whole = dict(zip(good, encoded, strict=True))
        return [whole[i] if i in whole else cast(DataError, read[i]) for i in wanted]


def _latents(samples: Sequence[StoredSample], mirrored: np.ndarray) -> Tensor:
    """Latents of all samples as they were stored, end to end, that of the mirror image where it is used."""
    chosen = [
        sample.flipped if sample.flipped is not None and mirror else sample.latent
        for sample, mirror in zip(samples, mirrored.tolist(), strict=True)
    ]
    return torch.cat([latent.reshape(-1) for latent in chosen])


def _features(samples: Sequence[StoredSample], mirrored: np.ndarray) -> Tensor | None:
    """Features of all tokens, of the mirror image where that is used; None without an image encoder."""
    chosen = [
        sample.flipped_features if sample.flipped is not None and mirror else sample.features
        for sample, mirror in zip(samples, mirrored.tolist(), strict=True)
    ]
    present = [features for features in chosen if features is not None]
    return torch.cat(present) if present else None


def _caption(sample: StoredSample, draw: float) -> Tensor:
    """States of one of a sample's captions."""
    captions = (cast(Tensor, sample.states), *sample.more_states)
    return captions[int(draw * len(captions))]


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
    path = f"{where}/{MANIFEST_NAME}"
    try:
        path, content = read_beside(config.places, MANIFEST_NAME)
        manifest = json.loads(content)
    except FileNotFoundError:
        manifest = {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable manifest ({error!r})") from error
    try:
        made_by = {"autoencoder": manifest.get("autoencoder"), "text_encoder": manifest.get("text_encoder")}
    except AttributeError as error:
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


def _is_cached(config: DataConfig, encoders: FrozenEncoders | None) -> bool:
    # What this process encodes is kept whoever reads it: encoding costs more than reading.
    return config.workers == 0 or encoders is not None


def _check_what_is_encoded(config: DataConfig, index: Index) -> None:
    """Raises DataError if the recipe does not say what these shards leave to do."""
    if index.online and not config.encode_online:
        raise DataError(
            f"data.encode_online: false, but the shards in {config.shards} leave "
            f"{' and '.join(index.online)} to be encoded while training; set it to true, or prepare latents "
            f"and states"
        )
    if config.encode_online and not index.online:
        raise DataError(
            f"data.encode_online: true, but the shards in {config.shards} hold latents"
            f"{' and states' if index.has_text else ''} already; set it to false"
        )
    if config.flip_online and "picture" not in index.online:
        raise DataError(
            f"data.flip_online: true, but the shards in {config.shards} hold latents; prepare them with "
            f"--flip, or with --pictures png or original"
        )


def load_null_states(config: DataConfig, width: int) -> Tensor:
    """States of the empty caption, float32 [n, E].

    Raises:
        DataError: if they are missing, damaged or of another width than the captions.
    """
    path, tensors = _null_tensors(config)
    if "states" not in tensors:
        raise DataError(
            f"{path}: expected a tensor 'states', received {sorted(tensors)}; prepare the data again"
        )
    return _checked_states(tensors["states"], width, path)


def _stored_padding(config: DataConfig, index: Index) -> Tensor | None:
    """The padding state beside stored states, where the recipe fills captions up.

    Raises:
        DataError: if it is asked for and not there.
    """
    asked = config.text_encoder is not None and config.text_encoder.padding == "constant"
    if not asked or {"ids", "caption"} & {*index.online}:
        return None
    path, tensors = _null_tensors(config)
    if "padding" not in tensors:
        raise DataError(
            f"data.text_encoder.padding: 'constant', but {path} holds no tensor 'padding'; prepare the data "
            f"again, or use 'none'"
        )
    return _checked_states(tensors["padding"], index.text_width, path)


def _null_tensors(config: DataConfig) -> tuple[str, dict[str, Tensor]]:
    path = f"{config.places[0]}/{NULL_NAME}"
    try:
        path, content = read_beside(config.places, NULL_NAME)
        return path, load(content)
    except FileNotFoundError as error:
        raise DataError(
            f"{' or '.join(f'{place}/{NULL_NAME}' for place in config.places)}: missing; text data hold the "
            f"states of the empty caption there. Prepare them again"
        ) from error
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: expected a tensor 'states' ({error!r}); prepare the data again") from error


def _checked_states(states: Tensor, width: int, path: str) -> Tensor:
    states = states.to(torch.float32)
    check_states(states, path)
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
    if index.has_text == (config.text_encoder is None):
        holds, asks = ("captions", "null") if index.has_text else ("class labels", "an encoder")
        raise DataError(
            f"data.text_encoder: the shards in {config.shards} hold {holds}, the recipe says {asks}"
        )
    check_encoders(config, index)
    _check_what_is_encoded(config, index)
    encoders = None
    if index.online or config.image_encoder is not None:
        encoders = FrozenEncoders(index, config, patch_size=patch_size, device=device or torch.device("cpu"))
    plan = Plan(
        index.groups(patch_size),
        tokens_per_pack=config.tokens_per_pack,
        packs_per_step=config.packs_per_step,
        seed=seed,
    )
    packs: _Packs[Any] = _Packs(
        index,
        plan,
        patch_size=patch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        caption_dropout=config.caption_dropout,
        null_states=load_null_states(config, index.text_width) if index.has_text else None,
        padding_state=_stored_padding(config, index),
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
