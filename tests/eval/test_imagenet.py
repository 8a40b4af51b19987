"""ImageNet: balanced labels, ADM's npz files, scores against independent arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.eval.tiny_scorers import TinyFeatures, write_random_picture
from tim_ds.errors import RequestError
from tim_ds.eval import adm_npz, imagenet
from tim_ds.eval.distribution import distance, fit, inception_score, precision_recall
from tim_ds.eval.generate import PictureSet, open_pictures
from tim_ds.eval.inception import extract

COUNT = 30


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> PictureSet:
    folder = tmp_path_factory.mktemp("imagenet")
    wanted = imagenet.wanted_pictures(COUNT, 5, seed=0)
    for n, one in enumerate(wanted):
        write_random_picture(folder / one.name, n)
    return open_pictures(folder, wanted, progress=False)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """An npz file of pictures alone, and the pictures."""
    rng = np.random.default_rng(7)
    arrays = rng.integers(0, 256, (24, 2, 2, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    path = tmp_path_factory.mktemp("reference") / "batch.npz"
    np.savez(path, arr_0=arrays)
    return path, arrays


def test_every_class_has_as_many_pictures_and_its_own_seeds() -> None:
    wanted = imagenet.wanted_pictures(3000, 1000, seed=4)
    labels = [int(one.prompt) for one in wanted]
    assert sorted(labels) == sorted([*range(1000)] * 3)
    # No part of the Inception score holds every class alike: 1000 draws of 3000 leave out about a quarter.
    assert 500 < len(set(labels[:1000])) < 900
    assert [one.seed for one in wanted] == list(range(4, 3004))
    assert wanted[0].name == "000000.png" and len({one.name for one in wanted}) == 3000
    with pytest.raises(RequestError, match="--count: expected a multiple of the number of classes, 1000"):
        imagenet.wanted_pictures(1500, 1000, seed=0)


def test_samples_are_written_as_adms_evaluator_reads_them(pictures: PictureSet, tmp_path: Path) -> None:
    adm_npz.write_samples(tmp_path / "samples.npz", pictures.paths)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        stored = file["arr_0"]
    assert stored.dtype == np.uint8 and stored.shape == (COUNT, 8, 8, 3)
    for n, path in enumerate(pictures.paths):
        np.testing.assert_array_equal(stored[n], np.asarray(Image.open(path)))


def test_pictures_of_two_sizes_are_not_written(pictures: PictureSet, tmp_path: Path) -> None:
    write_random_picture(tmp_path / "other.png", 0, side=9)
    with pytest.raises(RequestError, match=r"other.png: expected 8x8 pixels"):
        adm_npz.write_samples(tmp_path / "samples.npz", [pictures.paths[0], tmp_path / "other.png"])
    assert not (tmp_path / "samples.npz").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_reference_pictures_are_read_in_pieces(
    reference: tuple[Path, np.ndarray], tmp_path: Path, compressed: bool
) -> None:
    path, arrays = reference
    if compressed:
        path = tmp_path / "compressed.npz"
        np.savez_compressed(path, arr_0=arrays)
    pieces = list(adm_npz.read_pictures(path, 7))
    assert [len(piece) for piece in pieces] == [7, 7, 7, 3]
    np.testing.assert_array_equal(np.concatenate(pieces), arrays)
    assert adm_npz.read_reference(path).num_pictures == 24


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(2)}, "holds neither arr_0 nor mu"),
        (
            {"arr_0": np.zeros((2, 4, 4), dtype=np.uint8)},
            r"expected arr_0 uint8 \[N, H, W, 3\], received uint8",
        ),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "received float64"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, arrays: Any, message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(RequestError, match=message):
        adm_npz.read_reference(tmp_path / "x.npz")


def test_missing_and_damaged_references_say_what_is_expected(
    reference: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"none.npz: cannot be read .*VIRTUAL_imagenet256_labeled.npz"):
        adm_npz.read_reference(tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes(reference[0].read_bytes()[:500])
    with pytest.raises(RequestError, match=r"cut.npz: cannot be read"):
        adm_npz.read_reference(tmp_path / "cut.npz")


def test_scores_are_those_of_the_features(
    pictures: PictureSet, reference: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    network = TinyFeatures()
    found, details = imagenet.score(
        pictures, adm_npz.read_reference(reference[0]), network, tmp_path, batch=8, progress=False
    )
    made = extract(
        TinyFeatures(), [np.stack([np.asarray(Image.open(p)) for p in pictures.paths])], progress=False
    )
    real = extract(TinyFeatures(), [reference[1]], progress=False)
    # Float32 features in batches of another size.
    assert found["fid"] == pytest.approx(distance(fit(made["pool"]), fit(real["pool"])), rel=1e-4)
    assert found["sfid"] == pytest.approx(distance(fit(made["spatial"]), fit(real["spatial"])), rel=1e-4)
    assert found["inception_score"] == pytest.approx(inception_score(made["logits"]), rel=1e-5)
    assert (found["precision"], found["recall"]) == precision_recall(real["pool"], made["pool"])
    assert details == {
        "reference_pictures": 24,
        "reference_statistics": "of its pictures",
        "reference_size": "8x8",
    }
    # A second run reads what the first one kept.
    calls = len(network.seen)
    again, _ = imagenet.score(
        pictures, adm_npz.read_reference(reference[0]), network, tmp_path, batch=8, progress=False
    )
    assert again == found and len(network.seen) == calls


def test_stored_statistics_come_before_those_of_the_pictures(
    pictures: PictureSet, reference: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    stored = {"mu": rng.random(4), "sigma": np.eye(4), "mu_s": rng.random(3), "sigma_s": 2 * np.eye(3)}
    np.savez(tmp_path / "both.npz", arr_0=reference[1], **stored)
    np.savez(tmp_path / "statistics.npz", **stored)
    both, statistics = (
        imagenet.score(
            pictures,
            adm_npz.read_reference(tmp_path / f"{name}.npz"),
            TinyFeatures(),
            tmp_path / name,
            batch=8,
            progress=False,
        )[0]
        for name in ("both", "statistics")
    )
    assert both["fid"] == statistics["fid"] and both["sfid"] == statistics["sfid"]
    assert both["precision"] is not None and statistics["precision"] is None
    made = extract(
        TinyFeatures(), [np.stack([np.asarray(Image.open(p)) for p in pictures.paths])], progress=False
    )
    mean = made["spatial"].astype(np.float64).mean(0) - stored["mu_s"]
    covariance = np.cov(made["spatial"].astype(np.float64), rowvar=False)
    # With a multiple of the identity the root is that of one matrix.
    roots = np.sqrt(2 * np.linalg.eigvalsh(covariance).clip(0))
    expected = mean @ mean + np.trace(covariance) + 6 - 2 * roots.sum()
    assert both["sfid"] == pytest.approx(expected, rel=1e-4)


def test_too_few_pictures_are_refused_before_any_work(
    reference: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    whole = adm_npz.read_reference(reference[0])
    imagenet.check_counts(5, whole, TinyFeatures())
    with pytest.raises(
        RequestError, match="--count: expected at least 5 pictures for 4 features, received 4"
    ):
        imagenet.check_counts(4, whole, TinyFeatures())
    np.savez(tmp_path / "few.npz", arr_0=reference[1][:3])
    with pytest.raises(RequestError, match=r"holds 3 pictures and no statistics; expected at least 5"):
        imagenet.check_counts(5, adm_npz.read_reference(tmp_path / "few.npz"), TinyFeatures())
    np.savez(tmp_path / "wide.npz", mu=np.zeros(9), sigma=np.eye(9), mu_s=np.zeros(3), sigma_s=np.eye(3))
    with pytest.raises(RequestError, match="expected statistics of 4 and 3 features, received 9 and 3"):
        imagenet.check_counts(5, adm_npz.read_reference(tmp_path / "wide.npz"), TinyFeatures())
    for wrong, message in (
        ({"sigma": np.eye(3)}, r"expected a mean \[D\] and a covariance"),
        ({"mu_s": np.full(3, np.nan)}, "mean or covariance is not finite"),
    ):
        good = {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
        np.savez(tmp_path / "wrong.npz", **{**good, **wrong})
        with pytest.raises(RequestError, match=message):
            imagenet.check_counts(5, adm_npz.read_reference(tmp_path / "wrong.npz"), TinyFeatures())
