"""The layouts of the authors' own data: their toy set, and their latents of ImageNet."""

from __future__ import annotations

from pathlib import Path

import torch

from data_pipeline import schema
from data_pipeline.errors import DataError
from data_pipeline.pictures import Refused
from data_pipeline.resolution import parse_size
from data_pipeline.sources.item import (
    BAD_BUCKET,
    BAD_LABEL,
    BAD_LATENT,
    Item,
    display,
    label_of,
    read_file,
    row_item,
)
from data_pipeline.sources.listing import hash_of_names, walk_files
from data_pipeline.sources.lists import JsonlSource

TOY_LIST = "data_info.jsonl"


class ToySource:
    """The layout of the authors' toy data set; the bucket's size is carried along for `buckets` mode."""

    kind = "tim_toy"

    def __init__(self, path: Path, root: Path | None, keep: tuple[str, ...] = ()) -> None:
        listed = path / TOY_LIST if path.is_dir() else path
        if not listed.is_file():
            raise DataError(f"{listed}: missing; the toy layout has a {TOY_LIST} beside its pictures")
        self._lines = JsonlSource(listed, root or listed.parent)
        self._root = root or listed.parent
        self._keep = keep

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def fingerprint(self) -> str:
        return self._lines.fingerprint()

    def read(self, number: int) -> Item:
        where, row = self._lines.row(number)
        item = row_item(where, row, self._root, self._keep)
        try:
            bucket = parse_size(str(row.get("bucket", "")))
        except DataError as error:
            raise Refused(BAD_BUCKET, f"{where}: {error}") from error
        return Item(
            item.source,
            item.picture,
            captions=item.captions,
            bucket=bucket,
            extra={"bucket": str(row["bucket"]), **item.extra},
        )


class LatentSource:
    """The authors' latents of ImageNet, one file a picture with its mirror image, one folder a class."""

    kind = "tim_latents"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names = walk_files(root, ("safetensors",))

    def __len__(self) -> int:
        return len(self._names)

    @property
    def classes(self) -> tuple[str, ...]:
        return ()

    def fingerprint(self) -> str:
        return hash_of_names(self._names)

    def read(self, number: int) -> Item:
        name = self._names[number]
        source = display(name)
        data = read_file(self._root / name, source)
        try:
            pair = schema.decode_tensor(data, "latent", source)
            label = schema.decode_tensor(data, "label", source)
        except DataError as error:
            raise Refused(BAD_LATENT, str(error)) from error
        if pair.ndim != 4 or pair.shape[0] != 2 or 0 in pair.shape or not pair.is_floating_point():
            raise Refused(
                BAD_LATENT,
                f"{source}: expected a float latent [2, C, h, w], received {pair.dtype} {list(pair.shape)}",
            )
        if label.numel() != 1 or not bool(torch.isfinite(label.to(torch.float64)).all()):
            raise Refused(BAD_LABEL, f"{source}: expected one number, received {list(label.shape)}")
        number_of_class, _ = label_of({"label": label.item()}, source)
        return Item(source, label=number_of_class, latent=pair[0], flipped=pair[1])
