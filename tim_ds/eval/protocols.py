"""How far our numbers are from those of other code on the same pictures, measured on yours.

python -m tim_ds.eval.protocols imagenet runs/imagenet
python -m tim_ds.eval.protocols mjhq --metadata meta_data.json --reference mjhq30k_imgs --pictures PICTURES

The first reads the features that `launch/evaluate.py imagenet` left and computes every score by ADM's
formulas and by torch-fidelity too. The second feeds pictures to Inception in the ways in use and prints the
distance of each.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import linalg
from torch import Tensor
from torch.nn import functional as nnf
from tqdm import tqdm

from data_pipeline.command import command
from tim_ds.errors import RequestError, TimError
from tim_ds.eval import mjhq
from tim_ds.eval.distribution import (
    INCEPTION_SPLIT,
    NEIGHBOURS,
    distance,
    fit,
    inception_score,
    precision_recall,
)
from tim_ds.eval.generate import load_picture
from tim_ds.eval.inception import INPUT_PX, FeatureNetwork, Inception, clean_resizer, need
from tim_ds.eval.report import markdown_table

Features = NDArray[np.float32]
Scores = dict[str, float]
_NAMES = ("FID", "sFID", "Inception score", "precision", "recall")
_JPEG_QUALITY = 75
"""Pillow's default, with which the authors of the paper store pictures."""


def our_scores(samples: Mapping[str, Features], reference: Mapping[str, Features]) -> Scores:
    """As `launch/evaluate.py imagenet` computes them."""
    pair = precision_recall(reference["pool"], samples["pool"])
    values = (
        *(distance(fit(samples[name]), fit(reference[name])) for name in ("pool", "spatial")),
        inception_score(samples["logits"]),
        *pair,
    )
    return dict(zip(_NAMES, values, strict=True))


def adm_scores(samples: Mapping[str, Features], reference: Mapping[str, Features]) -> Scores:
    """By the formulas of ADM's evaluator: root of a product of matrices, means and probabilities in the
    precision of the features, distances in float16 unless one of them overflows."""

    def frechet(name: str) -> float:
        a, b = samples[name], reference[name]
        mean = a.mean(axis=0) - b.mean(axis=0)
        first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = np.real(linalg.sqrtm(first @ second))
        return float(mean @ mean + np.trace(first) + np.trace(second) - 2 * np.trace(root))

    scores = []
    for part in np.split(samples["logits"], range(INCEPTION_SPLIT, len(samples["logits"]), INCEPTION_SPLIT)):
        p = torch.from_numpy(part).softmax(dim=1).numpy()
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    real, made = reference["pool"], samples["pool"]
    radii = {id(x): np.sort(_squared(x, x), axis=1)[:, NEIGHBOURS] for x in (real, made)}
    between = _squared(made, real)
    values = (
        frechet("pool"),
        frechet("spatial"),
        float(np.mean(scores)),
        float((between <= radii[id(real)][None]).any(axis=1).mean()),
        float((between <= radii[id(made)][:, None]).any(axis=0).mean()),
    )
    return dict(zip(_NAMES, values, strict=True))


def _squared(a: Features, b: Features) -> NDArray[Any]:
    def of(u: Tensor, v: Tensor) -> Tensor:
        norms = (u * u).sum(dim=1)[:, None] + (v * v).sum(dim=1)[None]
        return (norms - 2 * (u @ v.T)).clamp_min(0)

    x, y = torch.from_numpy(a), torch.from_numpy(b)
    half = of(x.half(), y.half())
    return (half.float() if bool(half.isfinite().all()) else of(x, y)).numpy()


def fidelity_scores(samples: Mapping[str, Features], reference: Mapping[str, Features]) -> Scores:
    """By torch-fidelity's own functions; its Inception score takes ten parts, shuffled."""
    fid, isc, prc = (
        need(f"torch_fidelity.metric_{name}", "torch-fidelity") for name in ("fid", "isc", "prc")
    )

    def frechet(name: str) -> float:
        stored = (fid.fid_features_to_statistics(torch.from_numpy(x[name])) for x in (samples, reference))
        return float(fid.fid_statistics_to_metric(*stored, False)["frechet_inception_distance"])

    both = prc.prc_features_to_metric(
        torch.from_numpy(samples["pool"]),
        torch.from_numpy(reference["pool"]),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=10_000,
        save_cpu_ram=False,
        verbose=False,
    )
    values = (
        frechet("pool"),
        frechet("spatial"),
        float(isc.isc_features_to_metric(torch.from_numpy(samples["logits"]))["inception_score_mean"]),
        float(both["precision"]),
        float(both["recall"]),
    )
    return dict(zip(_NAMES, values, strict=True))


def compare_scores(samples: Mapping[str, Features], reference: Mapping[str, Features]) -> str:
    """A table: every score by the three."""
    columns = [of(samples, reference) for of in (our_scores, adm_scores, fidelity_scores)]
    body = [
        (
            name,
            *(f"{column[name]:.8g}" for column in columns),
            *(f"{other[name] - columns[0][name]:+.2g}" for other in columns[1:]),
        )
        for name in _NAMES
    ]
    header = ("score", "ours", "ADM's formulas", "torch-fidelity", "ADM - ours", "torch-fidelity - ours")
    return markdown_table(header, body)


def _features_of(out: Path, prefix: str, names: Sequence[str]) -> dict[str, Features]:
    found = sorted((out / "cache").glob(f"{prefix}_*.npz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RequestError(
            f"{out}: holds no features of {prefix}; expected the --out of a finished "
            f"`launch/evaluate.py imagenet` whose reference holds pictures"
        )
    with np.load(found[-1], allow_pickle=False) as file:
        return {name: np.ascontiguousarray(file[name], np.float32) for name in names}


Feed = Callable[[Image.Image], Tensor]
"""A picture to values of 0 to 255 [3, 299, 299] that enter the network."""


def _squashed(picture: Image.Image) -> Tensor:
    """To 299 x 299 with a filter, as torchvision resizes tensors."""
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1)[None]
    size = (INPUT_PX, INPUT_PX)
    return nnf.interpolate(values, size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def _as_pytorch_fid(values: Tensor) -> Tensor:
    """Scaled to [-1, 1] by 2 v / 255 - 1, where the network itself takes (v - 128) / 128."""
    return values * (256 / 255)


def _stored_as_jpeg(picture: Image.Image) -> Image.Image:
    content = io.BytesIO()
    picture.save(content, format="JPEG", quality=_JPEG_QUALITY)
    return Image.open(content).convert("RGB")


def _clean(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(clean_resizer()(np.asarray(picture)))).permute(2, 0, 1)


FEEDS: dict[str, tuple[Feed | None, Feed | None]] = {
    "ours: torch-fidelity, no filter": (None, None),
    "ours: clean-fid": (_clean, _clean),
    "squashed with a filter": (_squashed, _squashed),
    "... scaled as pytorch-fid does": (
        lambda picture: _as_pytorch_fid(_squashed(picture)),
        lambda picture: _as_pytorch_fid(_squashed(picture)),
    ),
    "... pictures as JPEG of quality 75: the authors' feed": (
        lambda picture: _as_pytorch_fid(_squashed(_stored_as_jpeg(picture))),
        lambda picture: _as_pytorch_fid(_squashed(picture)),
    ),
}
"""Ways of feeding (the pictures, the reference), from the third on with one change more than the one before.
None: by the network's own resize."""


def compare_feeds(
    network: FeatureNetwork, pictures: Sequence[Path], reference: Sequence[Path], *, progress: bool = True
) -> str:
    """A table: the distance under each feed.

    With no more pictures than features, the distance is of features projected on a quarter as many random
    directions as there are pictures: its size says nothing, the shares between the feeds do.
    """
    width, count = network.pool_width, min(len(pictures), len(reference))
    directions = np.eye(width)
    if count <= width:
        rng = np.random.default_rng(0)
        directions = np.linalg.qr(rng.standard_normal((width, max(2, count // 4))))[0]
    distances: list[float] = []
    total = len(FEEDS) * (len(pictures) + len(reference))
    with tqdm(total=total, unit="picture", desc="features", disable=not progress) as bar:
        for of_pictures, of_reference in FEEDS.values():
            fits = []
            for feed, paths in ((of_pictures, pictures), (of_reference, reference)):
                found = [_pooled(network, feed, path, bar) for path in paths]
                fits.append(fit(np.stack(found).astype(np.float64) @ directions))
            distances.append(distance(*fits))
    body = [
        (name, f"{value:.5g}", f"{100 * (value / distances[0] - 1):+.1f} %")
        for name, value in zip(FEEDS, distances, strict=True)
    ]
    return markdown_table(("feed", "distance", "against the first"), body)


def _pooled(network: FeatureNetwork, feed: Feed | None, path: Path, bar: tqdm) -> Features:
    picture = load_picture(path)
    if feed is None:
        found = network(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None])
    else:
        found = network.of_resized(feed(picture)[None].contiguous())
    bar.update(1)
    return found["pool"][0].cpu().numpy()


@command(TimError, OSError)
def main(arguments: Sequence[str] | None = None) -> int:
    """Print one comparison; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tim_ds.eval.protocols", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("imagenet", help="the five scores by ADM's formulas and by torch-fidelity")
    one.add_argument("out", type=Path, help="--out of a finished evaluation imagenet")
    two = commands.add_parser("mjhq", help="the distance under the feeds in use")
    two.add_argument("--metadata", type=Path, required=True, help=mjhq.WHERE)
    two.add_argument("--reference", type=Path, required=True, help="the data set's pictures")
    two.add_argument("--pictures", type=Path, required=True, help="CATEGORY/KEY.png or other endings")
    two.add_argument("--inception", type=Path, help="torch-fidelity's weights (default: torch's cache)")
    two.add_argument("--limit", type=int, help="so many of the entries, the first ones (default: all)")
    two.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.what == "imagenet":
        samples = _features_of(options.out, "features", ("pool", "spatial", "logits"))
        print(compare_scores(samples, _features_of(options.out, "reference", ("pool", "spatial"))))
        return 0
    entries = mjhq.read_metadata(options.metadata)[: options.limit]
    sets = [
        [folder / name for name in mjhq.picture_names(folder, entries, option=option)]
        for folder, option in ((options.pictures, "--pictures"), (options.reference, "--reference"))
    ]
    network = Inception.load(options.inception).to(options.device)
    print(compare_feeds(network, sets[0], sets[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
