"""Class-conditional ImageNet as ADM's evaluator scores it, without TensorFlow.

FID, sFID, Inception score, precision and recall on the features of torch-fidelity's Inception network,
against a reference batch of ADM's evaluator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.permutation import derive_key, permute
from tim_ds.errors import RequestError
from tim_ds.eval.adm_npz import Reference, read_pictures
from tim_ds.eval.distribution import adm_scores, fit, fit_of_statistics
from tim_ds.eval.frechet import GaussianFit
from tim_ds.eval.generate import PictureSet, Wanted
from tim_ds.eval.inception import FeatureNetwork, extract, picture_batches
from tim_ds.eval.results import kept_arrays
from tim_ds.model.weights import sha256

TITLE = "ImageNet, metrics of ADM's evaluator on torch-fidelity's Inception"
PROTOCOL = 1
"""Raised whenever the meaning of a score changes."""
PUBLISHED_COUNT = 50_000


def wanted_pictures(count: int, num_classes: int, *, seed: int) -> list[Wanted]:
    """`count` pictures, as many of every class, the classes in an order that looks random and never changes.

    The Inception score takes consecutive pictures together: with the classes in turn every part would hold
    all of them alike, which raises the score.

    Raises:
        RequestError: if the count is not a multiple of the number of classes.
    """
    if count < 1 or count % num_classes:
        raise RequestError(
            f"--count: expected a multiple of the number of classes, {num_classes}, for as many pictures of "
            f"each, received {count}"
        )
    places = permute(np.arange(count), count, derive_key(0, "imagenet.labels", 0))
    return [Wanted(f"{i:06d}.png", int(place) % num_classes, seed + i) for i, place in enumerate(places)]


def check_counts(count: int, reference: Reference, network: FeatureNetwork) -> None:
    """Raises RequestError if the scores could not be computed, before any work is done."""
    needed = max(network.pool_width, network.spatial_width) + 1
    if count < needed:
        raise RequestError(
            f"--count: expected at least {needed} pictures for {needed - 1} features, received {count}"
        )
    if reference.statistics is None and reference.num_pictures < needed:
        raise RequestError(
            f"--reference {reference.path}: holds {reference.num_pictures} pictures and no statistics; "
            f"expected at least {needed} pictures"
        )
    if reference.statistics is not None:
        # Here, not after hours of pictures.
        _fits_of(reference)
        widths = (reference.statistics["mu"].size, reference.statistics["mu_s"].size)
        if widths != (network.pool_width, network.spatial_width):
            raise RequestError(
                f"--reference {reference.path}: expected statistics of {network.pool_width} and "
                f"{network.spatial_width} features, received {widths[0]} and {widths[1]}"
            )


def score(
    pictures: PictureSet,
    reference: Reference,
    network: FeatureNetwork,
    cache: Path,
    *,
    references: Path | None = None,
    batch: int,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """(scores, details). Features are kept in `cache`, those of the reference in `references`, and made once.

    Raises:
        RequestError: if a picture is of another size than the first, or features are not finite.
    """
    tag = f"{network.identity['weights_sha256'][:12]}_{PROTOCOL}"
    features = kept_arrays(
        cache / f"features_{pictures.sha256[:12]}_{tag}.npz",
        lambda: dict(
            extract(
                network,
                _of_one_size(pictures.paths, batch),
                total=len(pictures.names),
                progress=progress,
            )
        ),
    )
    fits, pool = _reference(reference, network, references or cache, tag, batch, progress)
    scores = adm_scores(features, fits, pool, device=device)
    return scores, {
        "reference_pictures": reference.num_pictures,
        "reference_statistics": "stored" if reference.statistics is not None else "of its pictures",
        "reference_size": None if reference.size is None else f"{reference.size[0]}x{reference.size[1]}",
    }


def _reference(
    reference: Reference, network: FeatureNetwork, cache: Path, tag: str, batch: int, progress: bool
) -> tuple[tuple[GaussianFit, GaussianFit], NDArray[Any] | None]:
    """Fits of pooled and spatial features, and the pooled ones; stored statistics come first, as in ADM."""
    features: dict[str, NDArray[Any]] = {}
    if reference.num_pictures:
        features = kept_arrays(
            cache / f"reference_{sha256(reference.path)[:12]}_{tag}.npz",
            lambda: dict(
                extract(
                    network,
                    read_pictures(reference.path, batch),
                    names=("pool", "spatial"),
                    total=reference.num_pictures,
                    progress=progress,
                )
            ),
        )
    if reference.statistics is None:
        return (fit(features["pool"]), fit(features["spatial"])), features["pool"]
    return _fits_of(reference), features.get("pool")


def _fits_of(reference: Reference) -> tuple[GaussianFit, GaussianFit]:
    """The stored statistics of pooled and of spatial features."""
    stored, where, count = reference.statistics, f"--reference {reference.path}", reference.num_pictures
    assert stored is not None
    return (
        fit_of_statistics(stored["mu"], stored["sigma"], count=count, where=where),
        fit_of_statistics(stored["mu_s"], stored["sigma_s"], count=count, where=where),
    )


def _of_one_size(paths: Sequence[Path], size: int) -> Iterator[NDArray[np.uint8]]:
    shape = None
    for batch in picture_batches(paths, size):
        shape = shape or batch.shape[1:]
        if batch.shape[1:] != shape:
            raise RequestError(
                f"pictures: expected {shape[0]}x{shape[1]} throughout, received "
                f"{batch.shape[1]}x{batch.shape[2]}"
            )
        yield batch
