"""CLIP: preparation and vectors against transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.tiny_scorers import save_clip
from tim_ds.eval import clip as clip_module
from tim_ds.eval.clip import Clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (16, 16), (7, 5)])
def test_pixels_are_those_of_transformers(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = theirs(images=[picture], return_tensors="pt")["pixel_values"][0]
    found = clip_module.prepare(picture, 16)
    if (size[0] - size[1]) * 16 // min(size) % 2 == 0:
        # float32 rounding of (x / 255 - mean) / std.
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.shape == (3, 16, 16)


def test_cosines_are_those_of_the_whole_model(folder: Path) -> None:
    from transformers import CLIPModel

    ours = Clip.from_pretrained(str(folder))
    captions = ["a photo of a dog", "yes", "a red car and a blue dog with a green object"]
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(2)]
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = ours.tokenizer(captions, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        whole = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=torch.stack([clip_module.prepare(one, 16) for one in pictures]),
        )
    expected = whole.logits_per_image / model.logit_scale.exp()
    found = ours.encode_pictures(pictures) @ ours.encode_captions(captions).T
    # Sums of 12 products of unit vectors in float32.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found.std() > 1e-3


def test_a_caption_does_not_depend_on_those_beside_it(folder: Path) -> None:
    ours = Clip.from_pretrained(str(folder))
    alone = ours.encode_captions(["yes"])
    beside = ours.encode_captions(["a photo of a dog", "yes"])[1:]
    # Padding changes the order of float32 sums.
    torch.testing.assert_close(alone, beside, atol=1e-6, rtol=0)


def test_a_class_vector_is_the_normalised_mean_over_templates(folder: Path) -> None:
    ours = Clip.from_pretrained(str(folder))
    [found] = ours.class_vectors(["red"], ["a {} car", "{}"])
    mean = ours.encode_captions(["a red car", "red"]).double().mean(dim=0)
    torch.testing.assert_close(found.double(), mean / mean.norm(), atol=1e-6, rtol=0)
