"""Scores of sets of pictures: closed forms, brute force, torch-fidelity's own numbers on small features."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import linalg

from tim_ds.errors import RequestError
from tim_ds.eval.distribution import (
    adm_scores,
    distance,
    fit,
    fit_of_statistics,
    inception_score,
    precision_recall,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class TestInceptionScore:
    def test_sure_and_even_over_k_classes_gives_k_and_no_information_gives_1(self) -> None:
        logits = 200.0 * np.eye(5)[np.arange(40) % 5]
        assert inception_score(logits) == pytest.approx(5.0)
        assert inception_score(np.zeros((40, 5))) == pytest.approx(1.0)

    def test_the_published_parts_are_ten_of_5000(self) -> None:
        """Sure of one class each, and every part of 5,000 even over n classes, n = 1 to 10."""
        logits = 200.0 * np.eye(10)[np.concatenate([np.arange(5000) % n for n in range(1, 11)])]
        # 5,000 does not divide by 3, 6, 7 and 9: shares are off by 1 in 10,000.
        assert inception_score(logits) == pytest.approx(np.mean(range(1, 11)), rel=1e-6)
        # All in one part: class k has the mean of 1 / n over n = k to 10.
        share = np.array([sum(1 / n for n in range(k, 11)) / 10 for k in range(1, 11)])
        in_one = np.exp(-(share * np.log(share)).sum())
        assert inception_score(logits, split=50_000) == pytest.approx(in_one, rel=1e-3)

    def test_parts_are_consecutive_and_the_last_may_be_short(self, rng: np.random.Generator) -> None:
        logits = 3 * rng.standard_normal((25, 6))
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        expected = []
        for part in (p[:10], p[10:20], p[20:]):
            kl = [float((row * np.log(row / part.mean(0))).sum()) for row in part]
            expected.append(np.exp(np.mean(kl)))
        # Float64 throughout.
        assert inception_score(logits, split=10) == pytest.approx(np.mean(expected), rel=1e-12)

    def test_is_torch_fidelitys_without_its_shuffle(
        self, fidelity: ModuleType, rng: np.random.Generator
    ) -> None:
        from torch_fidelity.metric_isc import isc_features_to_metric

        logits = torch.tensor(2 * rng.standard_normal((50, 7)))
        theirs = isc_features_to_metric(logits, splits=5, shuffle=False)["inception_score_mean"]
        assert inception_score(logits, split=10) == pytest.approx(theirs, rel=1e-12)

    def test_something_else_is_refused(self) -> None:
        with pytest.raises(RequestError, match=r"expected logits \[N, K\], received \[3\]"):
            inception_score(np.zeros(3))


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    """In float64, picture by picture."""

    def radius(x: np.ndarray, i: int) -> float:
        return sorted(float(((x[i] - other) ** 2).sum()) for n, other in enumerate(x) if n != i)[k - 1]

    def share(x: np.ndarray, centres: np.ndarray) -> float:
        radii = [radius(centres, i) for i in range(len(centres))]
        inside = [
            any(float(((one - c) ** 2).sum()) <= r for c, r in zip(centres, radii, strict=True)) for one in x
        ]
        return sum(inside) / len(inside)

    return share(samples, reference), share(reference, samples)


class TestPrecisionRecall:
    @pytest.mark.parametrize("k", [1, 3])
    def test_is_what_brute_force_gives(self, rng: np.random.Generator, k: int) -> None:
        reference, samples = rng.standard_normal((40, 5)), 0.5 + 0.7 * rng.standard_normal((55, 5))
        expected = brute_force(reference, samples, k)
        assert all(0 < share < 1 for share in expected)
        # rows=7: pieces that do not divide the sets.
        assert precision_recall(reference, samples, neighbours=k, rows=7) == pytest.approx(expected)

    def test_is_torch_fidelitys(self, fidelity: ModuleType, rng: np.random.Generator) -> None:
        from torch_fidelity.metric_prc import calculate_precision_recall_full

        reference = torch.tensor(rng.standard_normal((60, 8)), dtype=torch.float32)
        samples = torch.tensor(0.8 * rng.standard_normal((50, 8)), dtype=torch.float32)
        theirs = calculate_precision_recall_full(samples, reference, 3)
        assert precision_recall(reference, samples) == pytest.approx(theirs)

    def test_worked_by_hand_with_the_published_three_neighbours(self) -> None:
        """On a line. The third neighbours of the reference are 3, 2, 2 and 3 away: its balls reach from -3 to
        6, their edges counted. Those of the samples are 23, 14, 13.5 and 23 away: they reach everything."""
        reference = np.array([[0.0], [1.0], [2.0], [3.0]])
        samples = np.array([[-3.0], [6.0], [6.5], [20.0]])
        assert precision_recall(reference, samples) == (2 / 4, 4 / 4)
        # With one neighbour: reference balls of 1 reach -1 to 4, those of samples 9, 0.5, 0.5 and 13.5.
        assert precision_recall(reference, samples, neighbours=1) == (0.0, 4 / 4)

    def test_far_apart_is_none_and_repeated_samples_are_precise_but_recall_little(
        self, rng: np.random.Generator
    ) -> None:
        reference = rng.standard_normal((30, 4))
        assert precision_recall(reference, reference + 1000) == (0, 0)
        precision, recall = precision_recall(reference, np.repeat(reference[:1], 20, axis=0))
        # All samples are one reference picture: inside its ball; their own balls have radius 0.
        assert (precision, recall) == (1, 1 / 30)

    def test_too_few_and_other_widths_are_refused(self) -> None:
        with pytest.raises(RequestError, match="more than 3 pictures in both sets, received 3 and 9"):
            precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
        with pytest.raises(RequestError, match=r"received \[9, 2\] and \[9, 3\]"):
            precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))


class TestAdmScores:
    def test_are_those_of_the_published_formulas(self, rng: np.random.Generator) -> None:
        features = {
            "pool": rng.standard_normal((60, 4)),
            "spatial": rng.standard_normal((60, 3)),
            "logits": rng.standard_normal((60, 5)),
        }
        reference = {"pool": 1 + rng.standard_normal((40, 4)), "spatial": 2 * rng.standard_normal((40, 3))}
        found = adm_scores(features, (fit(reference["pool"]), fit(reference["spatial"])), reference["pool"])
        for name, key in (("fid", "pool"), ("sfid", "spatial")):
            a, b = features[key], reference[key]
            root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False))
            expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
                np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * np.real(root)
            )
            # sqrtm of a product that is not symmetric keeps about 12 digits.
            assert found[name] == pytest.approx(expected, rel=1e-9)
        assert found["inception_score"] == inception_score(features["logits"])
        assert (found["precision"], found["recall"]) == brute_force(reference["pool"], features["pool"], 3)

    def test_without_reference_pictures_there_is_no_precision(self, rng: np.random.Generator) -> None:
        x = rng.standard_normal((30, 3))
        found = adm_scores({"pool": x, "spatial": x, "logits": x}, (fit(x), fit(x)), None)
        assert found["precision"] is None and found["recall"] is None
        # Equal sets: 0 but for rounding of eigenvalues of order 1.
        assert found["fid"] == pytest.approx(0, abs=1e-10)

    def test_stored_statistics_give_the_distance_of_their_features(self, rng: np.random.Generator) -> None:
        a, b = rng.standard_normal((30, 3)), rng.standard_normal((30, 3))
        stored = fit_of_statistics(b.mean(0), np.cov(b, rowvar=False), count=30, where="file")
        assert distance(fit(a), stored) == pytest.approx(distance(fit(a), fit(b)), rel=1e-12)
        with pytest.raises(RequestError, match=r"file: expected a mean \[D\] and a covariance"):
            fit_of_statistics(b.mean(0), np.eye(2), count=30, where="file")
