"""Our scores beside other code on the same features and pictures, whose differences are known here."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.tiny_scorers import TinyFeatures, write_random_picture
from tim_ds.eval import protocols
from tim_ds.eval.inception import Inception
from tim_ds.eval.protocols import FEEDS, adm_scores, compare_feeds, fidelity_scores, our_scores


@pytest.fixture
def sets() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)

    def features(shift: float) -> dict[str, np.ndarray]:
        widths = {"pool": 6, "spatial": 4, "logits": 5}
        return {n: (shift + rng.standard_normal((80, w))).astype(np.float32) for n, w in widths.items()}

    return features(0.0), features(0.5)


def test_the_three_codes_agree_but_where_they_are_known_to_differ(
    fidelity: ModuleType, sets: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
) -> None:
    ours, adm, theirs = (of(*sets) for of in (our_scores, adm_scores, fidelity_scores))
    for name in ("FID", "sFID"):
        # Means in float32, and a matrix root instead of eigenvalues of symmetric matrices.
        assert adm[name] == pytest.approx(ours[name], rel=1e-5) == theirs[name]
    # One part of 80 pictures, probabilities in float32; torch-fidelity makes ten parts, shuffled.
    assert adm["Inception score"] == pytest.approx(ours["Inception score"], rel=1e-6)
    assert theirs["Inception score"] != pytest.approx(ours["Inception score"], rel=1e-4)
    for name in ("precision", "recall"):
        assert theirs[name] == pytest.approx(ours[name], abs=1e-6)
        # float16 moves edges of balls: a picture of 80 or two.
        assert adm[name] == pytest.approx(ours[name], abs=0.03)
    assert ours["precision"] != ours["recall"], "the order of the sets shows"


def test_distances_in_float16_are_float32_where_one_overflows() -> None:
    x = np.full((2, 4), 300.0, np.float32)
    x[1] = -300.0
    np.testing.assert_allclose(protocols._squared(x, x), [[0, 4 * 600**2], [4 * 600**2, 0]])


def test_finished_evaluations_are_compared_from_the_command_line(
    fidelity: ModuleType,
    sets: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert protocols.main(["imagenet", str(tmp_path)]) == 2
    assert "holds no features" in capsys.readouterr().err
    (tmp_path / "cache").mkdir()
    np.savez(tmp_path / "cache" / "features_a_b_1.npz", allow_pickle=False, **sets[0])
    np.savez(tmp_path / "cache" / "reference_a_b_1.npz", allow_pickle=False, **sets[1])
    assert protocols.main(["imagenet", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in ("FID", "sFID", "Inception score", "precision", "recall"))


class TestFeeds:
    def test_each_changes_what_it_says(self) -> None:
        rng = np.random.default_rng(0)
        picture = Image.fromarray(rng.integers(0, 256, (598, 598, 3), dtype=np.uint8))
        whole = torch.from_numpy(np.asarray(picture).astype(np.float32))
        _, clean, squashed, scaled, stored = (of_pictures for of_pictures, _ in FEEDS.values())
        assert clean is not None and squashed is not None and scaled is not None and stored is not None
        found = squashed(picture)
        # Halved with a triangle filter over four pixels: 1, 3, 3, 1 eighths.
        eighths = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        expected = torch.einsum("y,x,yxc->c", eighths, eighths, whole[1:5, 1:5])
        torch.testing.assert_close(found[:, 1, 1], expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close((scaled(picture) - 128) / 128, 2 * found / 255 - 1, rtol=1e-5, atol=1e-5)
        assert (stored(picture) - scaled(picture)).std() > 1 and clean(picture).shape == found.shape

    def test_the_distance_under_every_feed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entries = {f"k{n}": {"category": "art", "prompt": "a"} for n in range(8)}
        (tmp_path / "meta_data.json").write_text(json.dumps(entries))
        for n in range(8):
            write_random_picture(tmp_path / "made" / "art" / f"k{n}.png", n, side=40)
            write_random_picture(tmp_path / "real" / "art" / f"k{n}.jpg", 10 + n, side=40)
        network = TinyFeatures()
        monkeypatch.setattr(TinyFeatures, "to", lambda self, device: self, raising=False)
        monkeypatch.setattr(Inception, "load", lambda weights: network)
        words = ["mjhq", "--metadata", str(tmp_path / "meta_data.json"), "--limit", "6"]
        words += ["--pictures", str(tmp_path / "made"), "--reference", str(tmp_path / "real")]
        assert protocols.main(words) == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in FEEDS) and "+0.0 %" in printed
        assert len(network.seen) == 12 and len(network.resized) == 4 * 12

    def test_fewer_pictures_than_features_are_projected(self, tmp_path: Path) -> None:
        for n in range(8):
            write_random_picture(tmp_path / f"{n}.png", n, side=16)
        paths = [tmp_path / f"{n}.png" for n in range(8)]
        network = TinyFeatures()
        network.pool_width = 8
        network._features = (
            lambda x: {  # type: ignore[method-assign]  # as wide as the test needs
                "pool": x.flatten(1)[:, :: x[0].numel() // 7][:, :8] / 100
            }
        )
        table = compare_feeds(network, paths[:4], paths[4:], progress=False)
        assert "nan" not in table and len(table.splitlines()) == 2 + len(FEEDS)
