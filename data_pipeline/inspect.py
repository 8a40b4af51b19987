"""What a folder of shards holds: counts, sizes, how full packs get, and a contact sheet.

python -m data_pipeline.inspect runs/handwriting --tokens-per-pack 2048 --packs-per-step 2
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from data_pipeline.command import command
from data_pipeline.config import AutoencoderConfig, TextEncoderConfig
from data_pipeline.encoders.autoencoder import Autoencoder, build_autoencoder
from data_pipeline.errors import DataError
from data_pipeline.index import Index, load_index
from data_pipeline.online import decode_picture
from data_pipeline.packing import Plan
from data_pipeline.permutation import derive_key, permute
from data_pipeline.reader import ShardReader
from data_pipeline.schema import MANIFEST_NAME, decode_tensor
from data_pipeline.storage import read_beside

TILE_PX = 128
TEXT_LINES = 3
LINE_PX = 12
LINE_CHARACTERS = 20

ROWS = 1 << 20
RUNS = 256
"""Of a larger index, so many rows in so many runs are looked at: a few megabytes of it."""


@dataclass(frozen=True)
class SizeRow:
    """Samples of one size in latent cells."""

    height: int
    width: int
    count: int


def size_histogram(index: Index) -> list[SizeRow]:
    """How many samples have each size, most frequent first."""
    rows = [SizeRow(h, w, n) for h, w, n in index.shapes.tolist()]
    return sorted(rows, key=lambda row: (-row.count, row.height, row.width))


def some_rows(index: Index) -> np.ndarray:
    """Rows that stand for all: every one of them up to `ROWS`, else runs spread evenly over the index."""
    if len(index) <= ROWS:
        return np.arange(len(index))
    starts = np.linspace(0, len(index) - ROWS // RUNS, RUNS).astype(np.int64)
    return (starts[:, None] + np.arange(ROWS // RUNS)).ravel()


def report(
    index: Index,
    *,
    patch_size: int,
    tokens_per_pack: int,
    packs_per_step: int,
    rows: int = 20,
    kept_in: str | None = None,
) -> str:
    """The text that the command prints. Sizes, fill and balance are exact; shares of bytes, and what is said
    of captions and classes, come from `some_rows`. The manifest may lie beside an index `kept_in` another
    folder than the shards'."""
    looked_at = some_rows(index)
    columns = {name: column[looked_at] for name, column in index.columns.items()}
    groups = index.groups(patch_size)
    tokens = int((groups.lengths * groups.counts).sum())
    stored = columns["size"].sum(dtype=np.int64)
    lines = [
        f"{index.folder}",
        f"samples          {len(index)}",
        f"shards           {len(index.shards)}, {sum(index.shard_bytes) / 2**20:.1f} MiB",
        f"index            {index.hash}",
        f"latents          {index.channels} channels, "
        f"{columns['latent_size'].sum(dtype=np.int64) / stored:.0%} of the bytes",
    ]
    if index.has_text:
        text = columns["text_length"]
        lines.append(
            f"captions         {text.min()} to {text.max()} tokens, mean {text.mean():.1f}, "
            f"width {index.text_width}, {columns['text_size'].sum(dtype=np.int64) / stored:.0%} of the bytes"
        )
    else:
        lines.append(
            f"classes          {index.num_classes}, {len(np.unique(columns['label']))} of them present"
        )
    if index.online:
        lines.append(f"to be encoded    {' and '.join(index.online)}, in the training process")
    if len(looked_at) < len(index):
        lines[-1] += f" (of {len(looked_at)} samples looked at)"
    lines.append(
        f"image tokens     {groups.lengths[0]} to {groups.lengths[-1]}, mean {tokens / len(index):.1f}, "
        f"total {tokens}"
    )
    sizes = size_histogram(index)
    lines.append(f"sizes            {len(sizes)} (height x width in latent cells)")
    for row in sizes[:rows]:
        share = row.count / len(index)
        lines.append(
            f"  {row.height:>5} x {row.width:<5} {row.count:>9}  {share:6.1%}  {'#' * round(40 * share)}"
        )
    if len(sizes) > rows:
        lines.append(f"  and {len(sizes) - rows} more")
    plan = Plan(groups, tokens_per_pack=tokens_per_pack, packs_per_step=packs_per_step, seed=0)
    lines += [
        f"packs            {packs_per_step} of {tokens_per_pack} tokens a step, "
        f"{plan.steps_per_epoch} steps an epoch",
        f"fill             {plan.fill():.2%}",
        f"slowest pack     {plan.balance():.3f} x the mean cost of its step",
        f"left out         {plan.left_out_per_epoch} samples an epoch",
        *_drops(index, _places(index.folder, kept_in)),
        "in a recipe      what these shards decide, with the packs above",
        *_recipe(index, patch_size, tokens_per_pack, packs_per_step, kept_in),
    ]
    return "\n".join(lines)


def _recipe(
    index: Index, patch_size: int, tokens_per_pack: int, packs_per_step: int, kept_in: str | None
) -> list[str]:
    """The settings of a recipe that these shards decide, as its YAML has them."""
    model = [f"  condition: {'text' if index.has_text else 'class'}", f"  in_channels: {index.channels}"]
    if patch_size != 1:
        model.append(f"  patch_size: {patch_size}")
    if index.has_text:
        model.append(f"  text_dim: {index.text_width}")
    else:
        model.append(f"  num_classes: {index.num_classes}")
    data = [f"  shards: {_quoted(str(index.folder))}"]
    if kept_in is not None:
        data.append(f"  index: {_quoted(kept_in)}")
    data += [f"  tokens_per_pack: {tokens_per_pack}", f"  packs_per_step: {packs_per_step}"]
    if index.online:
        data.append("  encode_online: true")
    data += _encoders(_places(index.folder, kept_in))
    return ["model:", *model, "data:", *data]


def _quoted(path: str) -> str:
    # As it is: the halves that JSON makes of a character beyond 16 bits are none to YAML.
    return json.dumps(path, ensure_ascii=False)


def _encoders(places: Sequence[str]) -> list[str]:
    try:
        manifest = json.loads(read_beside(places, MANIFEST_NAME)[1])
        found = {name: manifest[name] for name in ("autoencoder", "text_encoder") if manifest.get(name)}
        kinds = {"autoencoder": AutoencoderConfig, "text_encoder": TextEncoderConfig}
        lines = []
        for name, values in found.items():
            plain = asdict(kinds[name](kind=values["kind"], path=values.get("path")))
            lines.append(f"  {name}:")
            lines += [
                f"    {key}: {_quoted(value) if key == 'path' else value}"
                for key, value in values.items()
                if key == "kind" or value != plain[key] or (key == "path" and value is not None)
            ]
    except (OSError, ValueError, KeyError, TypeError):
        return ["  # autoencoder, text_encoder: not recorded by a manifest"]
    return lines


def _places(folder: Path | str, kept_in: str | None) -> tuple[str, ...]:
    return (str(folder),) if kept_in is None else (kept_in, str(folder))


def _drops(index: Index, places: Sequence[str]) -> list[str]:
    """What preparation dropped, as its manifest says, and what the index leaves out."""
    lines: list[str] = []
    try:
        manifest = json.loads(read_beside(places, MANIFEST_NAME)[1])
        dropped = manifest["report"]["dropped"]
        lines.append(f"dropped          {sum(dropped.values())} of the source when the shards were made")
        lines += [f"  {count:>9}  {reason}" for reason, count in sorted(dropped.items())]
    except (OSError, ValueError, KeyError, TypeError):
        lines.append("dropped          not recorded by a manifest")
    lines.append(f"bad              {index.num_bad} samples of the shards break the schema, and are not used")
    lines += [f"  {name}: {reason}" for name, reason in index.bad[:10]]
    return lines


def contact_sheet(
    index: Index, autoencoder: Autoencoder, *, count: int, seed: int, columns: int = 8
) -> Image.Image:
    """Decoded samples with their captions or labels, drawn by `seed`. A damaged one is an empty tile."""
    count = min(count, len(index))
    chosen = np.sort(permute(np.arange(count), len(index), derive_key(seed, "inspect.sheet", 0))).tolist()
    reader = ShardReader(index)
    step_x, step_y = TILE_PX + 8, TILE_PX + TEXT_LINES * LINE_PX + 12
    sheet = Image.new("RGB", (min(columns, count) * step_x, -(-count // columns) * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for place, sample_id in enumerate(chosen):
        x, y = place % columns * step_x + 4, place // columns * step_y + 4
        try:
            meta = reader.read_meta(sample_id)
            sheet.paste(_tile(_picture(reader, autoencoder, sample_id, meta)), (x, y))
        except DataError:
            text = f"damaged: {index.key(sample_id)}"
        else:
            text = str(meta.get("caption", index.key(sample_id)))
            if not index.has_text:
                text = f"class {int(index.columns['label'][sample_id])}"
        wrapped = textwrap.wrap(text, LINE_CHARACTERS)[:TEXT_LINES]
        draw.multiline_text((x, y + TILE_PX + 2), "\n".join(wrapped), fill="black", spacing=1)
    reader.close()
    return sheet


def _picture(
    reader: ShardReader, autoencoder: Autoencoder, sample_id: int, meta: dict[str, Any]
) -> Image.Image:
    """The stored picture, or the decoded latent; what the caption is stored as does not matter.

    Raises:
        DataError: if the sample is damaged.
    """
    where = reader.index.name(sample_id)
    member = reader.read_member(sample_id, "latent")
    if "picture" in reader.index.online:
        return decode_picture(member, meta, where)
    latent = decode_tensor(member, "latent", where)
    pixels = autoencoder.decode(latent.to(torch.float32)[None])[0]
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _tile(picture: Image.Image) -> Image.Image:
    scale = TILE_PX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Enlarged pixels stay square; large pictures are averaged down.
    tile = picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)
    framed = Image.new("RGB", (TILE_PX, TILE_PX), "lightgrey")
    framed.paste(tile, (0, 0))
    return framed


def manifest_autoencoder(folder: Path | str, *, kept_in: str | None = None) -> AutoencoderConfig:
    """The autoencoder that made the shards, from their manifest.

    Raises:
        DataError: if there is no manifest or it names none.
    """
    path = f"{folder}/{MANIFEST_NAME}"
    try:
        path, content = read_beside(_places(folder, kept_in), MANIFEST_NAME)
        return AutoencoderConfig(**json.loads(content)["autoencoder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: does not say which autoencoder made the latents ({error!r}); use --no-sheet"
        ) from error


@command(DataError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Describe a folder of shards."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.inspect", description=main.__doc__)
    parser.add_argument("folder", help="of shards, or its URL")
    parser.add_argument("--index", metavar="FOLDER", help="of the index, where it is not beside the shards")
    parser.add_argument("--patch-size", type=int, default=1, help="latent cells a side of a token")
    parser.add_argument(
        "--tokens-per-pack", type=int, default=None, help="budget (default: 4 of the largest image)"
    )
    parser.add_argument("--packs-per-step", type=int, default=1)
    parser.add_argument("--samples", type=int, default=32, help="pictures on the contact sheet")
    parser.add_argument("--seed", type=int, default=0, help="chooses the pictures")
    parser.add_argument(
        "--sheet",
        type=Path,
        default=None,
        help="PNG to write (default: FOLDER/contact_sheet.png; needed for a URL)",
    )
    parser.add_argument("--no-sheet", action="store_true")
    options = parser.parse_args(arguments)
    index = load_index(options.folder, kept_in=options.index)
    largest = int(index.groups(options.patch_size).lengths[-1])
    print(
        report(
            index,
            patch_size=options.patch_size,
            tokens_per_pack=options.tokens_per_pack or 4 * largest,
            packs_per_step=options.packs_per_step,
            kept_in=options.index,
        )
    )
    if not options.no_sheet:
        if options.sheet is None and not isinstance(index.folder, Path):
            raise DataError("--sheet: required for shards at a URL, or --no-sheet")
        path = options.sheet or Path(options.folder) / "contact_sheet.png"
        autoencoder = build_autoencoder(manifest_autoencoder(index.folder, kept_in=options.index))
        contact_sheet(index, autoencoder, count=options.samples, seed=options.seed).save(path)
        print(f"contact sheet    {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
