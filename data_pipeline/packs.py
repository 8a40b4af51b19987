"""One pack after the other: samples read, damaged ones replaced, all of it assembled into a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_pipeline.batch import Latents, PackedBatch
from data_pipeline.buffers import Buffers
from data_pipeline.direct import open_direct
from data_pipeline.draws import generator, uniforms
from data_pipeline.encoders.text import fill_up
from data_pipeline.errors import DataError
from data_pipeline.index import Index
from data_pipeline.online import FrozenEncoders, OnlineReader, RawSample
from data_pipeline.packing import PackPlan, Plan
from data_pipeline.reader import ShardReader, StoredSample

T = TypeVar("T")

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


class Damage:
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


class PackItem(NamedTuple):
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

    def pin_memory(self) -> PackItem:
        """The same in page-locked memory, where the micro-batch has a method of this name."""
        pin = getattr(self.value, "pin_memory", None)
        return self if pin is None else self._replace(value=pin())


@dataclass(frozen=True, eq=False)
class Unencoded:
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


class Packs(Dataset["PackItem"], Generic[T]):
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
        self._damage = Damage(f"a process of rank {rank}")
        self._news: list[tuple[int, str]] = []
        self._retries = 0

    def without_encoders(self) -> Packs[T]:
        """What workers are given: it reads everything and encodes nothing. Itself without encoders."""
        if self.encoders is None:
            return self
        reading = copy(self)
        reading.encoders, reading._finish = None, None
        reading._cache, reading._damage, reading._news = {}, Damage(f"a process of rank {self.rank}"), []
        return reading

    def __getitem__(self, number: int) -> PackItem:
        item = self._pack(number)
        retries = self.take_retries()
        return item._replace(retries=retries) if retries else item

    def take_retries(self) -> int:
        """Requests that this process made again since it was last asked."""
        before, self._retries = self._retries, self._reader.storage.num_retries
        return self._retries - before

    def _pack(self, number: int) -> PackItem:
        planned = self._packs_of_rank.pack(*divmod(number, self._packs_of_rank.packs_per_step))
        batch = self._read_directly(planned)
        if batch is not None:
            return self._finished(planned, batch)
        sample_ids = tuple(planned.sample_ids.tolist())
        try:
            samples, chosen = self._load(sample_ids, planned.epoch)
        except DataError as error:
            return PackItem(None, len(sample_ids), self._take_news(), error)
        if not self._is_encoded and self.encoders is None:
            return self._item(planned, Unencoded(planned, chosen, samples))
        return self._finished(planned, self._assemble(planned, chosen, samples))

    def encoded(self, pack: Unencoded) -> PackItem:
        """The pack that a worker read, encoded here."""
        raw = dict(zip(pack.chosen, pack.samples, strict=True))
        try:
            samples, chosen = self._load(pack.chosen, pack.planned.epoch, raw)
        except DataError as error:
            return PackItem(None, len(pack.chosen), self._take_news(), error)
        item = self._finished(pack.planned, self._assemble(pack.planned, chosen, samples))
        return item.pin_memory() if torch.cuda.is_available() else item

    def _finished(self, planned: PackPlan, batch: PackedBatch) -> PackItem:
        return self._item(planned, batch if self._finish is None else self._finish(batch))

    def _item(self, planned: PackPlan, value: Any) -> PackItem:
        return PackItem(value, len(planned.sample_ids), self._take_news(), None)

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
