"""Writing webdataset tars. The only file that imports webdataset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from data_pipeline.errors import DataError
from data_pipeline.schema import LABEL, LATENT, Sample


def write_shard(path: Path, samples: Iterable[Sample]) -> int:
    """Write `samples` to the tar `path`; the same samples give the same bytes. Returns how many.

    The tar is written aside, flushed to the disk and renamed, so a file under its final name is complete.

    Raises:
        DataError: if a sample breaks the schema or a key appears twice.
    """
    aside = path.with_name(f".{path.name}.partial")
    keys: set[str] = set()
    try:
        with open(aside, "wb") as stream:
            # Fixed time and owner: identical content gives identical files, whose hashes can be compared. An
            # integer: a time with a fraction would cost every member an extended header of 1 KiB.
            with TarWriter(stream, user="", group="", encoder=False, mtime=0) as writer:
                for sample in samples:
                    if sample.key in keys:
                        raise DataError(f"{path.name}:{sample.key}: key given twice in one shard")
                    keys.add(sample.key)
                    writer.write({"__key__": sample.key, **sample.to_members()})
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return len(keys)


def write_shards(folder: Path, prefix: str, samples: Iterable[Sample], *, per_shard: int) -> list[Path]:
    """Write `samples` to `folder`/`prefix`-NNNNNN.tar, `per_shard` in each. Returns the paths in order."""
    if per_shard < 1:
        raise DataError(f"per_shard: expected at least 1, received {per_shard}")
    source: Iterator[Sample] = iter(samples)
    paths: list[Path] = []
    for first in source:
        path = folder / f"{prefix}-{len(paths):06d}.tar"
        write_shard(path, _prepend(first, islice(source, per_shard - 1)))
        paths.append(path)
    return paths


def _prepend(first: Sample, rest: Iterable[Sample]) -> Iterator[Sample]:
    yield first
    yield from rest


def stream_latents(paths: Iterable[Path], *, shuffle: int) -> Iterator[tuple[Tensor, int]]:
    """Latents and labels as a plain webdataset pipeline gives them, for comparison in `bench.py`.

    Args:
        paths: shards of class data.
        shuffle: samples of the shuffle buffer.
    """
    # Its steps are declared to return an interface that lacks __iter__.
    dataset: Any = WebDataset([str(path) for path in paths], shardshuffle=False).shuffle(shuffle)
    for latent, label in dataset.to_tuple(LATENT, LABEL):
        yield load(latent)["latent"], int(label)
