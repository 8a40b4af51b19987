"""Scores of sets of pictures by their features: FID, sFID, Inception score, precision, recall.

Letters used in shapes: N pictures, R reference pictures, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tim_ds.errors import RequestError
from tim_ds.eval.frechet import GaussianFit, fit_gaussian, frechet_distance

INCEPTION_SPLIT = 5000
"""Pictures of one part of the Inception score, as ADM's evaluator cuts them, in the order of the pictures."""
NEIGHBOURS = 3
"""Neighbours that set the radius of a picture's ball in precision and recall."""


def distance(a: GaussianFit, b: GaussianFit) -> float:
    """Frechet distance of two fits (FID of pooled, sFID of spatial features)."""
    return frechet_distance(a, b)


def fit_of_statistics(mean: NDArray[Any], covariance: NDArray[Any], *, count: int, where: str) -> GaussianFit:
    """A fit from stored statistics.

    Raises:
        RequestError: if they are no finite mean [D] and covariance [D, D].
    """
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise RequestError(
            f"{where}: expected a mean [D] and a covariance [D, D], received {list(mean.shape)} and "
            f"{list(covariance.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise RequestError(f"{where}: its mean or covariance is not finite; fetch the file again")
    return GaussianFit(mean, (covariance + covariance.T) / 2, count)


def fit(features: NDArray[Any]) -> GaussianFit:
    """Mean and covariance; at least one picture more than features."""
    return fit_gaussian(features)


def inception_score(logits: NDArray[Any] | Tensor, *, split: int = INCEPTION_SPLIT) -> float:
    """exp of the mean divergence of the class probabilities from their mean, averaged over parts.

    Parts are consecutive, `split` pictures each, the last perhaps shorter. torch-fidelity cuts N into ten
    parts after shuffling; for 50,000 pictures the parts are as long, but hold other pictures.

    Shapes:
        logits: [N, K], of the classifier without its bias.
    """
    x = torch.as_tensor(logits, dtype=torch.float64)
    if x.ndim != 2 or not len(x):
        raise RequestError(f"Inception score: expected logits [N, K], received {list(x.shape)}")
    scores = []
    for part in x.split(split):
        log_p = part.log_softmax(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean()
        scores.append(float(divergence.exp()))
    return float(np.mean(scores))


def precision_recall(
    reference: NDArray[Any] | Tensor,
    samples: NDArray[Any] | Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    rows: int = 2048,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """(precision, recall) by balls around pictures, each as wide as its distance to its k-th neighbour.

    Precision: samples inside a ball of the reference; recall: the reference's pictures inside one of samples.
    A picture is not its own neighbour; the edge of a ball belongs to it. Squared distances in float32, from
    |u|^2 - 2 u.v + |v|^2, as in ADM's evaluator where its float16 overflows (README.md has the difference).

    Shapes:
        reference: [R, D]. samples: [N, D].
    Raises:
        RequestError: if a set has no more than `neighbours` pictures, or the widths differ.
    Source: Kynkaanniemi et al., Improved precision and recall metric for assessing generative models (2019).
    """
    real = torch.as_tensor(reference, dtype=torch.float32).to(device)
    made = torch.as_tensor(samples, dtype=torch.float32).to(device)
    if real.ndim != 2 or made.ndim != 2 or real.shape[1] != made.shape[1]:
        raise RequestError(
            f"precision and recall: expected features [R, D] and [N, D], received {list(real.shape)} and "
            f"{list(made.shape)}"
        )
    if min(len(real), len(made)) <= neighbours:
        raise RequestError(
            f"precision and recall: expected more than {neighbours} pictures in both sets, received "
            f"{len(real)} and {len(made)}"
        )
    precision = _share_inside(made, real, _radii(real, neighbours, rows), rows)
    recall = _share_inside(real, made, _radii(made, neighbours, rows), rows)
    return precision, recall


def _radii(x: Tensor, neighbours: int, rows: int) -> Tensor:
    """Squared distance of every row to its k-th neighbour, itself counted as the 0-th."""
    return torch.cat([_squared(part, x).kthvalue(neighbours + 1, dim=1).values for part in x.split(rows)])


def _share_inside(x: Tensor, centres: Tensor, radii: Tensor, rows: int) -> float:
    inside = [(_squared(part, centres) <= radii).any(dim=1) for part in x.split(rows)]
    return float(torch.cat(inside).double().mean())


def _squared(a: Tensor, b: Tensor) -> Tensor:
    norms = (a * a).sum(dim=1)[:, None] + (b * b).sum(dim=1)[None]
    return (norms - 2 * (a @ b.T)).clamp_min(0)


def adm_scores(
    features: Mapping[str, NDArray[Any]],
    reference_fits: tuple[GaussianFit, GaussianFit],
    reference_pool: NDArray[Any] | None,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, float | None]:
    """The five numbers of ADM's evaluator: fid, sfid, inception_score, precision, recall.

    Args:
        features: `pool` [N, D], `spatial` [N, D'], `logits` [N, K].
        reference_fits: of pooled and of spatial features.
        reference_pool: [R, D]; None: the reference holds no pictures, and precision and recall are None.
    """
    pool, spatial = reference_fits
    precision, recall = (
        (None, None)
        if reference_pool is None
        else precision_recall(reference_pool, features["pool"], device=device)
    )
    return {
        "fid": distance(fit(features["pool"]), pool),
        "sfid": distance(fit(features["spatial"]), spatial),
        "inception_score": inception_score(features["logits"]),
        "precision": precision,
        "recall": recall,
    }
