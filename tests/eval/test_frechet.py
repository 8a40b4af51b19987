"""Frechet distance against closed forms and against scipy's general matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from tim_ds.errors import RequestError
from tim_ds.eval.frechet import GaussianFit, fit_gaussian, frechet_distance, symmetric_sqrt


def random_covariance(rng: np.random.Generator, size: int, rank: int | None = None) -> np.ndarray:
    factor = rng.standard_normal((size, rank or size))
    return factor @ factor.T


def test_one_dimension_is_the_textbook_formula() -> None:
    a = GaussianFit(np.array([1.0]), np.array([[4.0]]), 10)
    b = GaussianFit(np.array([-2.0]), np.array([[9.0]]), 10)
    # (1 + 2)^2 + (2 - 3)^2; one square root and a few sums in float64.
    assert frechet_distance(a, b) == pytest.approx(10.0, rel=1e-14)


def test_commuting_covariances_are_the_distance_of_their_roots() -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    values_a, values_b = rng.uniform(0.1, 3.0, 12), rng.uniform(0.1, 3.0, 12)
    mean_a, mean_b = rng.standard_normal(12), rng.standard_normal(12)
    a = GaussianFit(mean_a, (basis * values_a) @ basis.T, 99)
    b = GaussianFit(mean_b, (basis * values_b) @ basis.T, 99)
    expected = ((mean_a - mean_b) ** 2).sum() + ((np.sqrt(values_a) - np.sqrt(values_b)) ** 2).sum()
    # Eigenvalues of order 1 in 12 dimensions: some 1e-15 each, and a difference of sums of order 10.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [2, 17, 64])
def test_general_covariances_agree_with_scipy(size: int) -> None:
    rng = np.random.default_rng(size)
    a = GaussianFit(rng.standard_normal(size), random_covariance(rng, size), 999)
    b = GaussianFit(rng.standard_normal(size), random_covariance(rng, size), 999)
    cross = np.trace(np.real(sqrtm(a.covariance @ b.covariance)))
    expected = (
        ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * float(cross)
    )
    # scipy's Schur method on the non-symmetric product loses more digits than ours: 1e-9 of the result.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances_need_no_regularisation() -> None:
    """Constant pixels beside those that vary must not change the distance."""
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((50, 5)), rng.standard_normal((60, 5)) * 2 + 1
    padded_x, padded_y = np.pad(x, ((0, 0), (0, 4))), np.pad(y, ((0, 0), (0, 4)))
    expected = frechet_distance(fit_gaussian(x), fit_gaussian(y))
    # The same numbers with exact zeros beside them; only the order of sums differs.
    assert frechet_distance(fit_gaussian(padded_x), fit_gaussian(padded_y)) == pytest.approx(
        expected, rel=1e-9
    )


def test_is_symmetric_and_zero_for_equal_fits() -> None:
    rng = np.random.default_rng(2)
    a = fit_gaussian(rng.standard_normal((200, 8)))
    b = fit_gaussian(rng.standard_normal((200, 8)) + 0.3)
    assert frechet_distance(a, b) > 0.1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-11)
    # Roots turn rounding of 1e-16 in eigenvalues near 0 into at most 1e-8; these are of order 1.
    assert frechet_distance(a, a) < 1e-12


def test_square_root_squares_back() -> None:
    rng = np.random.default_rng(3)
    matrix = random_covariance(rng, 9, rank=4)
    root = symmetric_sqrt(matrix)
    np.testing.assert_allclose(root, root.T, atol=1e-13)
    np.testing.assert_allclose(root @ root, matrix, rtol=1e-10, atol=1e-12)


def test_fit_is_numpys_mean_and_covariance() -> None:
    x = np.random.default_rng(4).standard_normal((40, 6))
    fit = fit_gaussian(x)
    np.testing.assert_allclose(fit.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(fit.covariance, np.cov(x.T), rtol=1e-12, atol=1e-15)
    assert fit.count == 40


def test_weights_match_a_set_to_another_mix_of_classes() -> None:
    """Two classes stored 30 : 10, wanted 1 : 1. The mean becomes the mean of the class means."""
    rng = np.random.default_rng(5)
    first, second = rng.standard_normal((30, 3)), rng.standard_normal((10, 3)) + 5
    x = np.concatenate([first, second])
    weights = np.concatenate([np.full(30, 0.5 / 30), np.full(10, 0.5 / 10)])
    fit = fit_gaussian(x, weights)
    mean = (first.mean(axis=0) + second.mean(axis=0)) / 2
    np.testing.assert_allclose(fit.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(
        fit.covariance, np.cov(x.T, aweights=weights), rtol=1e-12
    )  # numpy divides by sum(w) - sum(w^2) / sum(w), the same correction
    np.testing.assert_allclose(fit_gaussian(x, 7 * weights).covariance, fit.covariance, rtol=1e-12)


def test_samples_of_one_gaussian_approach_zero() -> None:
    rng = np.random.default_rng(6)
    a, b = (fit_gaussian(rng.standard_normal((200_000, 4))) for _ in range(2))
    # Expected about D (D + 3) / (4 N) = 4 * 7 / 8e5 = 3.5e-5 for two independent fits.
    assert 0 <= frechet_distance(a, b) < 3e-4


def test_too_few_rows_are_refused() -> None:
    x = np.zeros((64, 64))
    with pytest.raises(RequestError, match="expected at least 65 rows for 64 features, received 64"):
        fit_gaussian(x)
    with pytest.raises(RequestError, match="expected at least 65 rows for 64 features, received 60"):
        fit_gaussian(np.zeros((100, 64)), np.arange(100) < 60)
    assert fit_gaussian(x, minimum_count=10).count == 64


def test_values_that_are_not_finite_are_named() -> None:
    x = np.zeros((10, 2))
    x[3, 1] = np.nan
    with pytest.raises(RequestError, match=r"rows \[3\] of 10 are not finite"):
        fit_gaussian(x)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0] * 9, "expected 10 finite weights"), ([-1.0] + [1.0] * 9, "expected 10 finite weights")],
)
def test_weights_that_do_not_fit_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fit_gaussian(np.zeros((10, 2)), np.array(weights))


def test_a_matrix_that_is_no_covariance_is_refused() -> None:
    with pytest.raises(RequestError, match="eigenvalue -1"):
        symmetric_sqrt(np.diag([1.0, -1.0]))
    with pytest.raises(RequestError, match="symmetric"):
        symmetric_sqrt(np.array([[1.0, 2.0], [0.0, 1.0]]))
    good = GaussianFit(np.zeros(2), np.eye(2), 9)
    with pytest.raises(RequestError, match="eigenvalue"):
        frechet_distance(good, GaussianFit(np.zeros(2), np.diag([1.0, -1.0]), 9))
    with pytest.raises(RequestError, match="received 2 and 3"):
        frechet_distance(good, GaussianFit(np.zeros(3), np.eye(3), 9))
