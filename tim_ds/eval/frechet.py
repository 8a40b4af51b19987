"""Frechet distance between Gaussian fits of two sets of features, in float64.

Letters used in shapes: N rows (pictures, cells), D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tim_ds.errors import RequestError

FloatArray = NDArray[np.float64]

# Rounding leaves eigenvalues of a positive semi-definite matrix as low as about -D * 1e-16 of the largest.
# Anything beyond this share is a matrix that no data can have, and is refused instead of being clipped.
_NEGATIVE_SHARE = 1e-9


@dataclass(frozen=True, eq=False)
class GaussianFit:
    """Mean and covariance of a set of features.

    Shapes:
        mean: [D]. covariance: [D, D], symmetric, unbiased.
    """

    mean: FloatArray
    covariance: FloatArray
    count: int
    """Rows that the fit saw."""


def fit_gaussian(
    features: NDArray[Any], weights: NDArray[Any] | None = None, *, minimum_count: int | None = None
) -> GaussianFit:
    """Mean and unbiased covariance of `features`, each row weighted by `weights`.

    A weight says how much of the distribution a row stands for, so that a stored set can be matched to
    another mix of classes. Only their ratios count; the covariance is divided by 1 - sum(w^2), which is
    (N - 1) / N for equal weights.

    Shapes:
        features: [N, D], converted to float64. weights: [N], not negative.
    Args:
        minimum_count: fewest rows with a positive weight; None: D + 1, below which the covariance cannot have
            full rank and the distance mostly measures the number of rows.
    Raises:
        RequestError: if there are too few rows, or a value is not finite, or the weights do not fit.
    """
    x = np.asarray(features, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] == 0:
        raise RequestError(f"Frechet distance: expected features [N, D], received {list(x.shape)}")
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (len(x),) or not np.isfinite(w).all() or (w < 0).any():
        raise RequestError(
            f"Frechet distance: expected {len(x)} finite weights of at least 0, received {list(w.shape)}"
        )
    count = int((w > 0).sum())
    needed = max(2, x.shape[1] + 1 if minimum_count is None else minimum_count)
    if count < needed:
        raise RequestError(
            f"Frechet distance: expected at least {needed} rows for {x.shape[1]} features, received {count}; "
            f"sample more pictures"
        )
    if not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
        raise RequestError(
            f"Frechet distance: rows {bad[:8].tolist()} of {len(x)} are not finite ({len(bad)} in all)"
        )
    w = w / w.sum()
    mean = w @ x
    centred = x - mean
    covariance = (centred * w[:, None]).T @ centred / (1.0 - float(w @ w))
    return GaussianFit(mean, (covariance + covariance.T) / 2, count)


def symmetric_sqrt(matrix: NDArray[Any]) -> FloatArray:
    """The symmetric square root of a positive semi-definite matrix [D, D], by its eigenvalues.

    Raises:
        RequestError: if the matrix is not symmetric or has an eigenvalue below 0 by more than rounding.
    """
    values, vectors = _eigenvalues(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


def frechet_distance(a: GaussianFit, b: GaussianFit) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): squared 2-Wasserstein distance.

    The trace of the root of C_a C_b (not symmetric) is that of the root of C_a^(1/2) C_b C_a^(1/2)
    (symmetric), hence only eigenvalues of symmetric matrices are needed and singular covariances (constant
    pixels) need no special care. Regularisation: none is added; eigenvalues below 0 by rounding count as 0.
    Where covariances are singular, rounding of 1e-16 in an eigenvalue is 1e-8 in its root, which bounds the
    digits of the distance.

    Units: the square of the features' unit.
    Raises:
        RequestError: if the fits have different numbers of features, or a covariance is none.
    Source: Dowson and Landau, The Frechet distance between multivariate normal distributions (1982).
    """
    if a.mean.shape != b.mean.shape:
        raise RequestError(
            f"Frechet distance: expected fits of as many features, received {a.mean.size} and {b.mean.size}"
        )
    root = symmetric_sqrt(a.covariance)
    inner = root @ _checked(b.covariance) @ root
    cross, _ = _eigenvalues((inner + inner.T) / 2)
    difference = a.mean - b.mean
    distance = (
        difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross).sum()
    )
    # Equal fits may give -1e-14 of their trace.
    return max(0.0, float(distance))


def _checked(covariance: NDArray[Any]) -> FloatArray:
    _eigenvalues(covariance)
    return np.asarray(covariance, dtype=np.float64)


def _eigenvalues(matrix: NDArray[Any]) -> tuple[FloatArray, FloatArray]:
    """Eigenvalues [D], those below 0 by rounding set to 0, and eigenvectors [D, D]."""
    m = np.asarray(matrix, dtype=np.float64)
    if m.ndim != 2 or m.shape[0] != m.shape[1] or not np.allclose(m, m.T, rtol=1e-9, atol=1e-12):
        raise RequestError(f"Frechet distance: expected a symmetric matrix, received {list(m.shape)}")
    values, vectors = np.linalg.eigh(m)
    largest = float(np.abs(values).max())
    if values[0] < -_NEGATIVE_SHARE * largest:
        raise RequestError(
            f"Frechet distance: a covariance has the eigenvalue {values[0]:.3g} (largest {largest:.3g}); "
            f"expected none below 0"
        )
    return np.clip(values, 0.0, None), vectors
