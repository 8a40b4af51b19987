"""Stored sizes: worked examples, and the bounds that hold for every picture."""

import dataclasses
import math
import random

import pytest

from data_pipeline.errors import DataError
from data_pipeline.resolution import (
    REASON_ASPECT,
    REASON_CROP,
    REASON_SMALL,
    Fit,
    SizeRules,
    Unfit,
    bucket_table,
    describe_fit,
    fit,
    fit_given,
    parse_buckets,
    parse_size,
)

DC_AE = SizeRules(multiple=32)

GOLDEN: list[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = [
    # (original) -> (stored), (resized)
    ((1024, 1024), (1024, 1024), (1024, 1024)),
    # Within the stretch of 2 %: 0.992 against 0.981, no crop.
    ((1000, 750), (992, 736), (992, 736)),
    # 12 megapixels of aspect 4:3 come to the only multiples below the area that have it exactly.
    ((3000, 4000), (864, 1152), (864, 1152)),
    ((4000, 3000), (1152, 864), (1152, 864)),
    # 16:9 at that area is 768x1365; 1376 would exceed it: 1.6 % of stretch.
    ((1080, 1920), (768, 1344), (768, 1344)),
    # 540 -> 512 is 0.948, 500 -> 480 is 0.96: within the stretch.
    ((540, 500), (512, 480), (512, 480)),
    # 100 -> 96 and 120 -> 96 differ by 20 %: stretched by 2 %, and 17 of 113 rows go.
    ((120, 100), (96, 96), (113, 96)),
    ((33, 32), (32, 32), (33, 32)),
]


@pytest.mark.parametrize(("original", "stored", "resized"), GOLDEN)
def test_worked_examples(original, stored, resized):
    rules = dataclasses.replace(DC_AE, max_crop=0.2)
    found = fit(original[0], original[1], rules)
    assert isinstance(found, Fit)
    assert (found.height, found.width) == stored
    assert (found.resize_height, found.resize_width) == resized


def test_pictures_that_the_rules_refuse_say_why():
    cases = {
        (100, 500): REASON_ASPECT,
        (31, 40): REASON_SMALL,
        # The one multiple below is 32x32: a third of the picture would be lost.
        (63, 40): REASON_CROP,
    }
    for size, reason in cases.items():
        found = fit(*size, DC_AE)
        assert isinstance(found, Unfit) and found.reason == reason
        assert f"{size[0]}x{size[1]}" in found.detail


def random_sizes(count: int) -> list[tuple[int, int]]:
    rng = random.Random(5)
    # Log-uniform in area from 24 squared to 6000 squared, and in aspect to 5:1.
    sizes = []
    for _ in range(count):
        side = math.exp(rng.uniform(math.log(24), math.log(6000)))
        aspect = math.exp(rng.uniform(-math.log(5), math.log(5)) / 2)
        sizes.append((max(1, round(side * aspect)), max(1, round(side / aspect))))
    return sizes


@pytest.mark.parametrize(
    "rules",
    [
        DC_AE,
        SizeRules(multiple=8, max_area=256 * 256, max_stretch=0.0),
        SizeRules(multiple=64, min_area=512 * 512, max_upscale=2.0, max_stretch=0.05, max_crop=0.1),
        SizeRules(multiple=16, min_area=300 * 300, max_area=320 * 320, max_upscale=1.5, max_aspect=3.0),
    ],
    ids=["dc_ae", "no_stretch", "enlarged", "narrow"],
)
def test_every_fit_keeps_within_the_stated_bounds(rules):
    kept = 0
    reasons = set()
    for height, width in random_sizes(3000):
        found = fit(height, width, rules)
        if isinstance(found, Unfit):
            reasons.add(found.reason)
            continue
        kept += 1
        assert found.height % rules.multiple == 0 and found.width % rules.multiple == 0
        assert rules.min_area <= found.height * found.width <= rules.max_area
        assert found.resize_height >= found.height and found.resize_width >= found.width
        assert found.top >= 0 and found.top + found.height <= found.resize_height
        assert found.left >= 0 and found.left + found.width <= found.resize_width
        # Whole pixels: where no stretch is allowed, the free side still rounds up by less than one.
        slack = 1.0 / (min(found.resize_height, found.resize_width) - 1)
        assert found.stretch(height, width) <= max(rules.max_stretch + 1e-9, slack)
        assert found.crop_share <= rules.max_crop
        assert max(found.scales(height, width)) <= rules.max_upscale
        assert max(height, width) / min(height, width) <= rules.max_aspect
        # One axis at least is used whole: nothing is cropped from both.
        assert found.resize_height == found.height or found.resize_width == found.width
    assert kept > 300 and REASON_ASPECT in reasons


def test_a_turned_picture_gets_the_turned_size():
    for height, width in random_sizes(300):
        found, turned = fit(height, width, DC_AE), fit(width, height, DC_AE)
        if isinstance(found, Fit):
            assert isinstance(turned, Fit)
            assert (found.crop_share, found.height * found.width) == pytest.approx(
                (turned.crop_share, turned.height * turned.width)
            )


def test_most_large_pictures_lose_little():
    # 1 to 36 megapixels reduced to one: multiples of 32 are 3 % of a side.
    rng = random.Random(1)
    lost = []
    for _ in range(2000):
        side, aspect = rng.uniform(1000, 6000), math.exp(rng.uniform(-1, 1) / 2)
        found = fit(round(side * aspect), round(side / aspect), DC_AE)
        assert isinstance(found, Fit)
        lost.append(found.crop_share)
    # Measured: mean 0.15 %, largest 2.3 %.
    assert sum(lost) / len(lost) < 0.005 and max(lost) < 0.03


def test_buckets_take_the_nearest_aspect_without_a_crop():
    rules = SizeRules(multiple=32, mode="buckets", buckets=((512, 512), (512, 768), (768, 512)))
    assert fit(700, 1000, rules) == Fit(512, 768, 512, 768)
    assert fit(1000, 700, rules) == Fit(768, 512, 768, 512)
    # Small pictures are enlarged, as that mode does everywhere.
    assert fit(50, 50, rules) == Fit(512, 512, 512, 512)
    assert fit_given((700, 1030), 32) == Fit(672, 1024, 672, 1024)
    assert fit_given((10, 40), 32) == Fit(32, 32, 32, 32)


def test_the_bucket_table_fills_the_area():
    table = bucket_table(1024 * 1024, 64, 4.0)
    assert (1024, 1024) in table and (512, 2048) in table and (2048, 512) in table
    assert all(h % 64 == 0 and w % 64 == 0 and h * w <= 1024 * 1024 for h, w in table)
    assert {(w, h) for h, w in table} == set(table)
    assert min(h * w for h, w in table) > 0.85 * 1024 * 1024
    with pytest.raises(DataError, match="no bucket"):
        bucket_table(1000, 64, 4.0)


def test_sizes_are_read_with_and_without_a_name():
    assert parse_size("768x1024") == (768, 1024)
    assert parse_size("some-name-768x1024") == (768, 1024)
    assert parse_buckets("512x512, 512x768") == ((512, 512), (512, 768))
    for text in ("", "768", "768x", "axb", "0x5", "768x9999999", "²x3"):
        with pytest.raises(DataError, match="size"):
            parse_size(text)


def test_the_record_says_what_was_done():
    fitted = Fit(96, 96, 113, 96)
    assert describe_fit(120, 100, fitted, rotated=True) == {
        "original_px": [120, 100],
        "resize_px": [113, 96],
        "crop_px": [8, 0, 96, 96],
        "height_px": 96,
        "width_px": 96,
        "scale": [0.941667, 0.96],
        "rotated": True,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_area": 100}, "--max-area: 100 holds no picture"),
        ({"min_area": 10**9}, "--min-area: expected 1 to"),
        ({"max_upscale": 0.5}, "--max-upscale: expected at least 1"),
        ({"max_crop": 1.0}, "--max-crop: expected 0 up to but not 1"),
        ({"buckets": ((16, 64),)}, "--buckets: 16x64 is smaller"),
        ({"multiple": 0}, "multiple: expected at least 1"),
    ],
)
def test_rules_that_contradict_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        SizeRules(**{"multiple": 32, **changes})
