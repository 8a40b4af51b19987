"""Mask2Former: preparation and post-processing against transformers' own, classes, thresholds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.tiny_scorers import save_detector
from tim_ds.errors import RequestError
from tim_ds.eval import detector
from tim_ds.eval.detector import COCO_CLASSES, Detector, class_names, instances


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def test_the_80_classes_are_known_under_the_names_of_other_checkpoints() -> None:
    assert len(set(COCO_CLASSES)) == 80
    renamed = {
        "computer mouse": "mouse",
        "tv remote": "remote",
        "computer keyboard": "keyboard",
        "motorcycle": "motorbike",
        "airplane": "aeroplane",
        "couch": "sofa",
        "potted plant": "pottedplant",
        "dining table": "diningtable",
        "tv": "tvmonitor",
    }
    labels = {str(n): renamed.get(name, name) for n, name in enumerate(COCO_CLASSES)}
    assert class_names(labels) == list(COCO_CLASSES)


def test_a_checkpoint_of_other_classes_is_refused() -> None:
    with pytest.raises(RequestError, match="expected the 80 classes of COCO, received 2, among them wall"):
        class_names({0: "wall", 1: "cat"})


def test_pixels_are_those_of_transformers_where_nothing_is_padded(picture: Image.Image) -> None:
    from transformers import Mask2FormerImageProcessorPil

    theirs = Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 106})
    expected = theirs(images=[picture], return_tensors="pt")["pixel_values"]
    pixels, size = detector.prepare(picture, shorter_px=64)
    assert size == (64, 96)
    # float32 rounding of (x / 255 - mean) / std.
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_odd_sizes_are_padded_with_zeros_on_the_right_and_below() -> None:
    pixels, size = detector.prepare(Image.new("RGB", (100, 50), "white"), shorter_px=40)
    # The longer side may have 40 x 1333 / 800 = 66.65 pixels, hence a factor of 0.6665.
    assert size == (33, 67) and tuple(pixels.shape) == (1, 3, 64, 96)
    assert (pixels[..., 33:, :] == 0).all() and (pixels[..., 67:] == 0).all()
    assert (pixels[..., :33, :67] > 2).all()


def test_instances_are_those_of_transformers_on_its_own_grid() -> None:
    from types import SimpleNamespace

    from transformers import Mask2FormerImageProcessorPil

    generator = torch.Generator().manual_seed(0)
    class_logits = 4 * torch.randn(1, 5, 4, generator=generator)
    mask_logits = 3 * torch.randn(1, 5, 24, 24, generator=generator)
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits),
        threshold=0.2,
        return_binary_maps=True,
    )[0]
    found = instances(
        class_logits[0],
        mask_logits[0],
        ["a", "b", "c"],
        padded=(384, 384),
        resized=(384, 384),
        original=(384, 384),
        threshold=0.2,
    )
    # transformers keeps as many pairs as there are queries, we the 100 best: ours contain theirs.
    assert 2 <= len(theirs["segments_info"]) <= len(found)
    for segment, mask in zip(theirs["segments_info"], theirs["segmentation"], strict=True):
        matching = [
            one
            for one in found
            if one.name == "abc"[segment["label_id"]] and abs(one.score - segment["score"]) < 2e-6
        ]
        assert len(matching) == 1
        np.testing.assert_array_equal(matching[0].mask, mask.bool().numpy())
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_boxes_hold_their_masks_and_padding_is_cut_off() -> None:
    """One sure query whose logits are positive in a known square of the padded picture."""
    mask = torch.full((1, 16, 16), -20.0)
    mask[0, 4:8, 2:10] = 20.0
    classes = torch.tensor([[10.0, 0.0]])
    [one] = instances(
        classes, mask, ["cat"], padded=(64, 64), resized=(48, 64), original=(24, 32), threshold=0.5
    )
    # Four pixels a cell in the padded picture, two in the original one.
    assert one.box == (4, 8, 20, 16) and one.mask is not None and one.mask.shape == (24, 32)
    assert one.mask[8:16, 4:20].all() and one.mask.sum() == 8 * 16
    probability = float(classes.softmax(-1)[0, 0])
    # The mean probability inside lies a little below 1, where the enlarged edge fades.
    assert 0.9 * probability < one.score <= probability


def test_a_model_of_the_released_format_detects_above_the_threshold(
    tmp_path: Path, picture: Image.Image
) -> None:
    whole = Detector.from_pretrained(str(save_detector(tmp_path / "detector")))
    # Pictures of 800 pixels take seconds even in a tiny network.
    model = Detector(whole.model, shorter_px=64)
    found = model(picture, threshold=0.05)
    assert found and all(one.score > 0.05 for one in found)
    surer = model(picture, threshold=found[0].score - 1e-9)
    assert surer[0].box == found[0].box and surer[0].score == found[0].score
    for one in found:
        assert one.name in COCO_CLASSES and one.mask is not None and one.mask.shape == (32, 48)
        left, top, right, bottom = one.box
        assert 0 <= left < right <= 48 and 0 <= top < bottom <= 32


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--detector .*none: no such folder of a model"):
        Detector.from_pretrained(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"--detector .*empty: cannot be loaded"):
        Detector.from_pretrained(str(tmp_path / "empty"))
