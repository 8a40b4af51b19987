"""Latents of a pack travel as they were stored; tokens are made of them exactly."""

import pytest
import torch

from data_pipeline.batch import Latents
from tim_ds.packed import patchify


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_tokens_are_those_of_each_image_alone(dtype, patch_size):
    rng = torch.Generator().manual_seed(0)
    # Neighbours of one size, of transposed sizes, and a size that comes back later.
    grids = ((2, 3), (2, 3), (3, 2), (1, 6), (2, 3))
    images = [torch.randn(5, h * patch_size, w * patch_size, generator=rng).to(dtype) for h, w in grids]
    latents = Latents(torch.cat([image.reshape(-1) for image in images]), grids, patch_size, 5)
    expected = torch.cat([patchify(image.float(), patch_size) for image in images])
    # Both are copies of the same numbers; 16 bits fit into 32 without rounding.
    assert latents.tokens().dtype == torch.float32 and torch.equal(latents.tokens(), expected)
    assert latents.num_tokens == len(expected) and latents.token_channels == expected.shape[1]


def test_values_that_do_not_fit_the_grids_are_refused():
    with pytest.raises(ValueError, match=r"grids hold 24 values, received \[23\]"):
        Latents(torch.zeros(23), ((2, 3),), 1, 4)
