"""MJHQ-30K: metadata, reference pictures, distances by category, CLIP score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.eval.tiny_scorers import TinyFeatures, save_clip, write_random_picture
from tim_ds.errors import RequestError
from tim_ds.eval import mjhq
from tim_ds.eval.clip import Clip
from tim_ds.eval.distribution import distance, fit
from tim_ds.eval.generate import open_pictures, picture_set

META = {
    f"k{n}": {"category": "people" if n < 9 else "art" if n < 18 else "food", "prompt": f"a photo {n}"}
    for n in range(21)
}


@pytest.fixture
def entries(tmp_path: Path) -> list[mjhq.Entry]:
    (tmp_path / "meta_data.json").write_text(json.dumps(META))
    return mjhq.read_metadata(tmp_path / "meta_data.json")


def test_metadata_name_pictures_and_prompts(entries: list[mjhq.Entry]) -> None:
    assert entries[0] == mjhq.Entry("k0", "people", "a photo 0") and len(entries) == 21
    wanted = mjhq.wanted_pictures(entries, seed=3)
    assert wanted[20].name == "food/k20.png" and wanted[20].seed == 23


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected a mapping of entries"),
        ('{"a": {"category": "x"}}', "'a': expected a category and a prompt"),
        ('{"a": {"category": "../x", "prompt": "p"}}', "'a' of '../x' cannot be a file name"),
        ("{", "cannot be read"),
        (
            '{"a": {"category": "x", "prompt": "p"}, "a": {"category": "y", "prompt": "q"}}',
            "key 'a' is given twice",
        ),
    ],
)
def test_other_metadata_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(RequestError) as caught:
        mjhq.read_metadata(tmp_path / "m.json")
    assert message in str(caught.value)


def test_missing_reference_pictures_are_named(tmp_path: Path, entries: list[mjhq.Entry]) -> None:
    with pytest.raises(RequestError, match="no such folder; expected the unpacked mjhq30k_imgs"):
        mjhq.picture_names(tmp_path / "none", entries)
    for one in entries[1:]:
        write_random_picture(tmp_path / one.category / f"{one.key}.jpg", 0)
    with pytest.raises(RequestError, match=r"1 of 21 pictures are missing \(people/k0\)"):
        mjhq.picture_names(tmp_path, entries)
    write_random_picture(tmp_path / "people" / "k0.png", 0)
    assert mjhq.picture_names(tmp_path, entries)[:2] == ["people/k0.png", "people/k1.jpg"]


def test_distances_are_overall_and_by_category() -> None:
    rng = np.random.default_rng(0)
    made, real = rng.standard_normal((21, 4)), 1 + rng.standard_normal((21, 4))
    categories = [value["category"] for value in META.values()]
    overall, by_category = mjhq.distances(made, real, categories)
    assert overall == distance(fit(made), fit(real))
    assert by_category["people"] == distance(fit(made[:9]), fit(real[:9]))
    assert by_category["art"] == distance(fit(made[9:18]), fit(real[9:18]))
    assert by_category["food"] is None, "three pictures of four features have no distance"


def test_features_are_kept_by_pictures_network_and_resize(tmp_path: Path, entries: list[mjhq.Entry]) -> None:
    for n, one in enumerate(entries):
        write_random_picture(tmp_path / "real" / one.category / f"{one.key}.jpg", n)
    names = mjhq.picture_names(tmp_path / "real", entries)
    pictures = picture_set(tmp_path / "real", names, progress=False)

    def features(network: TinyFeatures, clean: bool) -> np.ndarray:
        return mjhq.features(pictures, network, tmp_path / "cache", clean=clean, batch=4, progress=False)

    network = TinyFeatures()
    plain, clean = features(network, False), features(network, True)
    assert sum(network.seen) == sum(network.resized) == 21
    np.testing.assert_array_equal(features(network, False), plain)
    np.testing.assert_array_equal(features(network, True), clean)
    assert sum(network.seen) == sum(network.resized) == 21
    other = TinyFeatures(seed=1)
    assert not np.array_equal(features(other, False), plain) and sum(other.seen) == 21


def test_clip_score_is_the_mean_cosine_of_pictures_and_their_prompts(
    tmp_path: Path, entries: list[mjhq.Entry]
) -> None:
    wanted = mjhq.wanted_pictures(entries, seed=0)
    for n, one in enumerate(wanted):
        write_random_picture(tmp_path / "made" / one.name, n)
    pictures = open_pictures(tmp_path / "made", wanted, progress=False)
    clip = Clip.from_pretrained(str(save_clip(tmp_path / "clip")))
    found = mjhq.clip_scores(pictures, entries, clip, batch=8, progress=False)
    assert found.shape == (21,)
    for n in (0, 7, 8, 20):
        vector = clip.encode_pictures([Image.open(pictures.path(n))])[0].double()
        text = clip.encode_captions([entries[n].prompt])[0].double()
        # Unit vectors in float32, times 100.
        assert found[n] == pytest.approx(100 * float(vector @ text), abs=1e-4)
    means: dict[str, Any] = mjhq.by_category(found, [one.category for one in entries])
    assert means["food"] == pytest.approx(found[18:].mean())


def test_too_few_entries_are_refused_before_any_work(entries: list[mjhq.Entry]) -> None:
    mjhq.check_counts(entries, TinyFeatures())
    with pytest.raises(RequestError, match="at least 5 entries for an FID of 4 features, received 4"):
        mjhq.check_counts(entries[:4], TinyFeatures())
