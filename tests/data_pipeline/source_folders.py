"""Small sources of every kind, with pictures of many sizes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.data_pipeline.odd_pictures import encode, scene


def sizes(count: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(11)
    return [(int(h), int(w)) for h, w in rng.integers(24, 72, (count, 2))]


def pictures(count: int) -> list[bytes]:
    """PNG files of different sizes and content."""
    return [encode(Image.fromarray(scene(h, w)), "PNG") for h, w in sizes(count)]


def captions(number: int) -> list[str]:
    """One caption, or two, which no other number has."""
    return [f"a three above {'a ' * (number % 4)}gap {number}", f"a seven {number}"][: 1 + number % 2]


def folder(root: Path, count: int) -> Path:
    """Pictures with .txt and .json beside them, by turns, in two folders."""
    for number, data in enumerate(pictures(count)):
        path = root / f"class_{number % 2}" / f"p{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if number % 2:
            row = {"captions": captions(number), "license": "cc0"}
            path.with_suffix(".json").write_text(json.dumps(row))
        else:
            path.with_suffix(".txt").write_text(captions(number)[0] + "\n")
    return root


def rows(root: Path, count: int) -> list[dict[str, object]]:
    """Rows of a list whose pictures lie in `root`/images."""
    found: list[dict[str, object]] = []
    (root / "images").mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(pictures(count)):
        (root / "images" / f"{number}.png").write_bytes(data)
        found.append(
            {
                "path": f"images/{number}.png",
                "captions": captions(number),
                "label": number % 3,
                "license": "cc0",
            }
        )
    return found


def jsonl(root: Path, count: int) -> Path:
    path = root / "list.jsonl"
    lines = [json.dumps(row) for row in rows(root, count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def parquet(root: Path, count: int) -> Path:
    import pyarrow
    from pyarrow import parquet as writer

    path = root / "list.parquet"
    # Several row groups, so that reading crosses their borders.
    writer.write_table(pyarrow.Table.from_pylist(rows(root, count)), path, row_group_size=4)
    return path


def metadata(root: Path, count: int) -> Path:
    """Hugging Face's image folder: a list beside the pictures, a level below."""
    inner = root / "train"
    inner.mkdir()
    found = [{**row, "file_name": row.pop("path"), "text": row.pop("captions")} for row in rows(inner, count)]
    (inner / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return root


def embedded(root: Path, count: int) -> Path:
    """Hugging Face's data set of images: parquet files of one split with the pictures in them."""
    import pyarrow
    from pyarrow import parquet as writer

    found = [
        {"image": {"bytes": data, "path": f"{number}.png"}, "text": captions(number)}
        for number, data in enumerate(pictures(count))
    ]
    (root / "data").mkdir()
    half = count // 2
    for n, part in enumerate((found[:half], found[half:])):
        table = pyarrow.Table.from_pylist(part)
        writer.write_table(table, root / "data" / f"train-0000{n}-of-00002.parquet", row_group_size=3)
    return root


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def webdataset(root: Path, count: int, *, per_shard: int = 5) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    data = pictures(count)
    for shard in range(0, count, per_shard):
        with tarfile.open(root / f"{shard // per_shard:05d}.tar", "w") as tar:
            for number in range(shard, min(count, shard + per_shard)):
                # The long name takes an extended header, which belongs to the sample.
                key = f"{'long/' * (25 * (number % 2))}sample{number:03d}"
                add_member(tar, f"{key}.png", data[number])
                if number % 2:
                    add_member(tar, f"{key}.json", json.dumps({"captions": captions(number)}).encode())
                else:
                    add_member(tar, f"{key}.txt", captions(number)[0].encode())
                add_member(tar, f"{key}.cls", str(number % 3).encode())
    return root


def toy(root: Path, count: int) -> Path:
    """The toy layout: a bucket for each picture."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, data in enumerate(pictures(count)):
        (root / "images" / f"{number}.png").write_bytes(data)
        row = {
            "image_file": f"images/{number}.png",
            "bucket": f"toy-{number % 3}-{40 + 8 * (number % 3)}x37",
            "captions": captions(number),
        }
        lines.append(json.dumps(row))
    (root / "data_info.jsonl").write_text("\n".join(lines) + "\n")
    return root


def latents(root: Path, count: int, channels: int = 4) -> Path:
    """Stored latents with their mirror images, one folder a class."""
    for number in range(count):
        path = root / f"n{number % 3:08d}" / f"picture_{number}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(number)
        latent = torch.randn(channels, 4, 6)
        pair = torch.stack([latent, latent.flip(-1)])
        save_file({"latent": pair, "label": torch.tensor(float(number % 3))}, path)
    return root
