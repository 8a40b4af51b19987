"""Every odd kind of picture file is either shown right or refused with its reason."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline import pictures
from data_pipeline.errors import DataError
from data_pipeline.pictures import Refused, apply_fit, normalise, open_picture, to_pixels, to_png
from data_pipeline.resolution import Fit
from tests.data_pipeline import odd_pictures as odd

HANDLED = odd.handled()
REFUSED = odd.refused()


@pytest.mark.parametrize("name", HANDLED)
def test_handled_files_become_rgb_pictures(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = open_picture(HANDLED[name])
    assert picture.image.mode == "RGB"
    size = (odd.WIDTH, odd.HEIGHT) if name == "exif" else (odd.HEIGHT, odd.WIDTH)
    assert (picture.height, picture.width) == size


@pytest.mark.parametrize("name", ["png", "webp", "bmp", "tiff", "profile", "broken_profile"])
def test_lossless_files_keep_their_values(name):
    assert np.array_equal(np.asarray(open_picture(HANDLED[name]).image), odd.scene())


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # In levels of 255. JPEG's own loss, that of the conversion to CMYK, and that of few colours.
    [("jpeg", 10), ("cmyk", 12), ("palette", 30), ("broken_exif", 24), ("gif", 30), ("animated_webp", 40)],
)
def test_lossy_files_come_close(name, tolerance):
    error = np.abs(np.asarray(open_picture(HANDLED[name]).image).astype(int) - odd.scene()).max()
    assert error <= tolerance


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("palette", "palette"),
        ("palette_transparent", "transparency on white"),
        ("alpha", "transparency on white"),
        ("grey_alpha", "transparency on white"),
        ("cmyk", "CMYK"),
        ("lab", "LAB"),
        ("grey16", "16-bit grey"),
        ("gif", "first of several frames"),
        ("apng", "first of several frames"),
        ("animated_webp", "first of several frames"),
        ("exif", "turned by EXIF"),
        ("broken_profile", "unreadable colour profile"),
    ],
)
def test_what_was_handled_is_noted(name, note):
    assert note in open_picture(HANDLED[name]).notes


def test_ordinary_files_have_no_notes():
    for name in ("jpeg", "png", "webp", "grey", "profile"):
        assert open_picture(HANDLED[name]).notes == ()


def test_transparent_pixels_are_white_and_the_others_as_they_were():
    image = np.asarray(open_picture(HANDLED["alpha"]).image)
    half = odd.WIDTH // 2
    assert (image[:, :half] == 255).all()
    assert np.array_equal(image[:, half:], odd.scene()[:, half:])


def test_sixteen_bits_are_reduced_to_eight_exactly():
    image = np.asarray(open_picture(HANDLED["grey16"]).image)
    y, x = np.mgrid[0 : odd.HEIGHT, 0 : odd.WIDTH]
    assert np.array_equal(image[..., 0], x + y) and np.array_equal(image[..., 0], image[..., 2])


def test_mid_grey_in_lab_is_mid_grey():
    # L* of 50 is 119 in sRGB by the definition of both.
    image = np.asarray(open_picture(HANDLED["lab"]).image).astype(int)
    assert np.abs(image - 119).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(orientation):
    # By the EXIF standard: where the stored picture's row 0 and column 0 are in the upright one.
    a = odd.scene()
    expected = {
        1: a,
        2: a[:, ::-1],
        3: a[::-1, ::-1],
        4: a[::-1],
        5: a.swapaxes(0, 1),
        6: a.swapaxes(0, 1)[:, ::-1],
        7: a.swapaxes(0, 1)[::-1, ::-1],
        8: a.swapaxes(0, 1)[::-1],
    }[orientation]
    picture = open_picture(odd.turned(orientation))
    assert np.array_equal(np.asarray(picture.image), expected)
    assert picture.rotated == (orientation > 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty", pictures.EMPTY),
        ("text", pictures.NOT_A_PICTURE),
        ("html", pictures.NOT_A_PICTURE),
        ("bomb", pictures.BOMB),
        ("cut_jpeg", pictures.TRUNCATED),
        ("cut_png", pictures.TRUNCATED),
        ("only_header", None),
        ("float", pictures.UNSUPPORTED),
    ],
)
def test_unusable_files_are_refused_with_a_reason(name, reason):
    with pytest.raises(Refused) as caught:
        open_picture(REFUSED[name])
    if reason is None:
        # Which of the two depends on the decoder's version.
        assert caught.value.reason in (pictures.TRUNCATED, pictures.DAMAGED, pictures.NOT_A_PICTURE)
    else:
        assert caught.value.reason == reason


def test_any_cut_and_any_flipped_byte_is_a_picture_or_a_refusal():
    rng = np.random.default_rng(3)
    for name in ("jpeg", "png", "gif", "webp", "tiff", "bmp", "palette", "lab"):
        data = HANDLED[name]
        for _ in range(40):
            changed = bytearray(data[: int(rng.integers(1, len(data) + 1))])
            for _ in range(int(rng.integers(0, 4))):
                changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
            try:
                assert open_picture(bytes(changed)).image.mode == "RGB"
            except Refused as refused:
                assert refused.reason and refused.detail


def test_limits_are_rules():
    with pytest.raises(Refused, match=pictures.BOMB):
        open_picture(HANDLED["png"], max_pixels=odd.HEIGHT * odd.WIDTH - 1)
    for name in ("gif", "apng", "animated_webp"):
        with pytest.raises(Refused, match=pictures.ANIMATED):
            open_picture(HANDLED[name], frames="refuse")


def test_the_crop_is_taken_after_the_resize():
    image = odd.plain()
    assert apply_fit(image, Fit(40, 56, 40, 56)) is image
    fitted = Fit(20, 24, 20, 28)
    expected = image.resize((28, 20), Image.Resampling.BICUBIC).crop((2, 0, 26, 20))
    assert np.array_equal(np.asarray(apply_fit(image, fitted)), np.asarray(expected))


def test_pixels_run_from_minus_one_to_one():
    image = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]], dtype=np.uint8))
    pixels = to_pixels(image, 3)
    assert pixels.shape == (3, 1, 2) and pixels.dtype == torch.uint8
    assert torch.equal(normalise(pixels)[0], torch.tensor([[-1.0, 1.0]]))
    assert torch.equal(to_pixels(image, 1), torch.tensor([[[0, 255]]], dtype=torch.uint8))
    with pytest.raises(DataError, match="1 or 3 channels"):
        to_pixels(image, 4)


def test_a_stored_png_is_the_same_picture():
    assert np.array_equal(np.asarray(open_picture(to_png(odd.plain())).image), odd.scene())
