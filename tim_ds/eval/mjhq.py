"""MJHQ-30K: FID against the data set's pictures, overall and by category, and CLIP score.

FID is torch-fidelity's: pictures at their own size into the network, which resizes as TensorFlow 1 did
(bilinear, no filter). The second number resizes as clean-fid does (bicubic, with a filter).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tim_ds.errors import RequestError
from tim_ds.eval.clip import Clip
from tim_ds.eval.distribution import distance, fit
from tim_ds.eval.generate import PictureSet, Wanted, load_picture
from tim_ds.eval.inception import FeatureNetwork, extract, picture_batches
from tim_ds.eval.results import kept_arrays

TITLE = "MJHQ-30K"
PROTOCOL = 1
"""Raised whenever the meaning of a score changes."""
PUBLISHED_COUNT = 30_000
WHERE = "meta_data.json of https://huggingface.co/datasets/playgroundai/MJHQ-30K"
_LAYOUTS = {
    "--reference": "the unpacked mjhq30k_imgs",
    "--pictures": "one picture an entry, CATEGORY/KEY.png (or jpg, webp)",
}
REFERENCE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture of the data set."""

    key: str
    category: str
    prompt: str


def read_metadata(path: Path) -> list[Entry]:
    """The entries of the published metadata: {key: {"category": ..., "prompt": ...}}.

    Raises:
        RequestError: naming the entry that does not fit.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repeats)
    except (OSError, ValueError) as error:
        raise RequestError(f"--metadata {path}: cannot be read ({error}); it is {WHERE}") from error
    if not isinstance(raw, dict) or not raw:
        raise RequestError(f"--metadata {path}: expected a mapping of entries, the format of {WHERE}")
    entries = []
    for key, value in raw.items():
        category = value.get("category") if isinstance(value, dict) else None
        prompt = value.get("prompt") if isinstance(value, dict) else None
        if not isinstance(category, str) or not isinstance(prompt, str):
            raise RequestError(f"--metadata {path}: {key!r}: expected a category and a prompt, as in {WHERE}")
        if any(not part or "/" in part or part.startswith(".") for part in (key, category)):
            raise RequestError(f"--metadata {path}: {key!r} of {category!r} cannot be a file name")
        entries.append(Entry(key, category, prompt))
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key given twice would lose an entry in silence."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def wanted_pictures(entries: Sequence[Entry], *, seed: int) -> list[Wanted]:
    """One picture an entry: CATEGORY/KEY.png."""
    return [Wanted(f"{one.category}/{one.key}.png", one.prompt, seed + n) for n, one in enumerate(entries)]


def picture_names(folder: Path, entries: Sequence[Entry], *, option: str = "--reference") -> list[str]:
    """The file of every entry, the data set's or another program's: CATEGORY/KEY with whatever ending.

    Args:
        option: of the command line, for messages.
    Raises:
        RequestError: naming entries without a picture.
    """
    if not folder.is_dir():
        raise RequestError(f"{option} {folder}: no such folder; expected {_LAYOUTS[option]}")
    names, missing = [], []
    for one in entries:
        stem = f"{one.category}/{one.key}"
        found = next((stem + s for s in REFERENCE_SUFFIXES if (folder / (stem + s)).is_file()), None)
        if found is None:
            missing.append(stem)
        else:
            names.append(found)
    if missing:
        raise RequestError(
            f"{option} {folder}: {len(missing)} of {len(entries)} pictures are missing "
            f"({', '.join(missing[:3])}); expected {_LAYOUTS[option]}"
        )
    return names


def check_counts(entries: Sequence[Entry], network: FeatureNetwork) -> None:
    """Raises RequestError if there are too few pictures for a distance, before any work is done."""
    needed = network.pool_width + 1
    if len(entries) < needed:
        raise RequestError(
            f"--metadata: expected at least {needed} entries for an FID of {network.pool_width} features, "
            f"received {len(entries)}"
        )


def features(
    pictures: PictureSet,
    network: FeatureNetwork,
    cache: Path,
    *,
    clean: bool,
    batch: int,
    progress: bool = True,
) -> NDArray[Any]:
    """Pooled features [N, D] of a set, kept in `cache` and made once."""
    tag = f"{network.identity['weights_sha256'][:12]}_{PROTOCOL}"
    kind = "clean" if clean else "fidelity"
    return kept_arrays(
        cache / f"{kind}_{pictures.sha256[:12]}_{tag}.npz",
        lambda: dict(
            extract(
                network,
                picture_batches(pictures.paths, batch),
                names=("pool",),
                total=len(pictures.names),
                clean=clean,
                progress=progress,
            )
        ),
    )["pool"]


def distances(
    samples: NDArray[Any], reference: NDArray[Any], categories: Sequence[str]
) -> tuple[float, dict[str, float | None]]:
    """(FID of all pictures, FID by category); None for a category with too few pictures."""
    by_category: dict[str, float | None] = {}
    of = np.array(categories)
    for name in sorted(set(categories)):
        chosen = of == name
        enough = int(chosen.sum()) > samples.shape[1]
        by_category[name] = distance(fit(samples[chosen]), fit(reference[chosen])) if enough else None
    return distance(fit(samples), fit(reference)), by_category


def clip_scores(
    pictures: PictureSet, entries: Sequence[Entry], clip: Clip, *, batch: int, progress: bool = True
) -> NDArray[np.float64]:
    """100 times the cosine of every picture and its prompt [N]; negative ones stay negative."""
    found = []
    with tqdm(total=len(entries), unit="picture", desc="clip", disable=not progress) as bar:
        for start in range(0, len(entries), batch):
            part = entries[start : start + batch]
            shown = [load_picture(pictures.path(start + i)) for i in range(len(part))]
            cosines = clip.encode_pictures(shown) * clip.encode_captions([one.prompt for one in part])
            found.append(100 * cosines.sum(dim=1).double().numpy())
            bar.update(len(part))
    return np.concatenate(found)


def by_category(values: NDArray[np.float64], categories: Sequence[str]) -> dict[str, float]:
    """The mean of each category."""
    of = np.array(categories)
    return {name: float(values[of == name].mean()) for name in sorted(set(categories))}
