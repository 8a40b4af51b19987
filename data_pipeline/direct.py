"""Packs read straight into place: one read, one checksum and no parsing for a latent.

The index says where a latent's values lie, and their type, size and checksum; they were found finite when it
was built. So a read that gives the same checksum gives the same values, and nothing else has to be looked at.
A pack in which anything is not as the index says is given up: `reader.py` then reads whole samples, finds out
what is wrong, and names it.
"""

from __future__ import annotations

import os

import numpy as np
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from data_pipeline import schema
from data_pipeline.buffers import Buffers
from data_pipeline.errors import DataError
from data_pipeline.reader import ShardReader
from data_pipeline.storage import Folder

ALIGNMENT = 64
"""Text members begin at multiples of so many bytes, so that their tensors can be views."""


class DirectReader:
    """Reads what a pack needs of its samples and no more: neither the other of latent and mirror image, nor a
    caption that is dropped.
    """

    def __init__(self, reader: ShardReader, folder: Folder) -> None:
        self._reader = reader
        self._index = reader.index
        self._folder = folder
        self._dtype = schema.FLOATS[reader.index.latent_dtype]
        self._latents, self._members = Buffers(), Buffers()

    def latents(self, ids: np.ndarray, mirrored: np.ndarray) -> Tensor | None:
        """Latents of the samples as stored, end to end; of the mirror image where it is wanted and stored.

        Returns:
            [n] in the dtype of the shards; None if one cannot be read or is not what the index says.
        """
        columns = self._index.columns
        mirrored = mirrored & (columns["flipped_at"][ids] > 0)
        places = np.where(mirrored, columns["flipped_at"][ids], columns["latent_at"][ids])
        checksums = np.where(mirrored, columns["flipped_crc32"][ids], columns["latent_crc32"][ids])
        heights, widths = (columns[name][ids].astype(np.int64) for name in ("height", "width"))
        sizes = heights * widths * (self._index.channels * self._dtype.itemsize)
        ends = np.cumsum(sizes)
        values = self._latents.take(int(ends[-1]))
        # A checksum starts from the size: `shard_rows.latent_checksum`.
        seeds = heights << 16 | widths
        begins = ends - sizes
        if not self._read(
            ids, values, places=places, begins=begins, ends=ends, checksums=checksums, seeds=seeds
        ):
            return None
        return values.view(self._dtype)

    def captions(
        self, ids: np.ndarray, draws: np.ndarray, dropped: np.ndarray, null_states: Tensor
    ) -> list[Tensor] | None:
        """States of one caption a sample, [n, E] each as stored.

        Args:
            draws: from [0, 1): which of several captions.
            dropped: whose states are `null_states` instead; these are not read.

        Returns:
            None if one cannot be read or is not what the index says.
        """
        columns, wanted = self._index.columns, ids[~dropped]
        sizes = columns["text_size"][wanted].astype(np.int64)
        steps = -(-sizes // ALIGNMENT) * ALIGNMENT
        begins = np.cumsum(steps) - steps
        members = self._members.take(int(steps.sum()))
        if not self._read(
            wanted,
            members,
            places=columns["text_start"][wanted],
            begins=begins,
            ends=begins + sizes,
            checksums=columns["text_crc32"][wanted],
            seeds=np.zeros_like(sizes),
        ):
            return None
        texts = [null_states] * len(ids)
        stored, memory = np.flatnonzero(~dropped).tolist(), members.numpy().data
        try:
            rows = self._index.rows(wanted.tolist())
            for place, row, begin in zip(stored, rows, begins.tolist(), strict=True):
                captions = self._reader.captions(memory[begin : begin + row.text_size], row)
                texts[place] = captions[int(draws[place] * len(captions))]
        except DataError:
            return None
        return texts

    def _read(
        self,
        ids: np.ndarray,
        into: Tensor,
        *,
        places: np.ndarray,
        begins: np.ndarray,
        ends: np.ndarray,
        checksums: np.ndarray,
        seeds: np.ndarray,
    ) -> bool:
        """Read one stretch of each sample, from byte `places` of it on to bytes `begins` to `ends` of `into`.

        Returns:
            Whether all could be read, and have these checksums, started from `seeds`.
        """
        index, memory, descriptor = self._index, into.numpy().data, self._folder.descriptor
        shards = index.columns["shard"][ids].tolist()
        offsets = index.columns["offset"][ids] + places
        numbers = (array.tolist() for array in (offsets, begins, ends, checksums, seeds))
        try:
            for shard, offset, begin, end, checksum, seed in zip(shards, *numbers, strict=True):
                part = memory[begin:end]
                size = os.preadv(descriptor(index.shards[shard]), (part,), offset)
                if size != end - begin or crc32(part, seed) != checksum:
                    return False
        except OSError:
            return False
        return True


def open_direct(reader: ShardReader) -> DirectReader | None:
    """The direct reader of the same samples; None where they lie at a URL, leave something to encode, or have
    latents of several types."""
    folder = reader.storage
    if not isinstance(folder, Folder) or reader.index.online or not reader.index.latent_dtype:
        return None
    return DirectReader(reader, folder)
