"""The REPA term."""

from __future__ import annotations

import pytest
import torch

from tim_ds.errors import ShapeError
from tim_ds.objective.alignment import alignment_loss
from tim_ds.packed import Segments


def test_each_image_averages_one_minus_cosine_over_its_own_tokens() -> None:
    segments = Segments.from_grids([(1, 2), (2, 2)])
    target = torch.zeros(6, 3, dtype=torch.float64)
    target[:, 0] = 2.0
    projected = target.clone()
    projected[1] = torch.tensor([0.0, 5.0, 0.0])
    projected[2:] = torch.tensor([-0.1, 0.0, 0.0])
    received = alignment_loss(projected, target, segments)
    torch.testing.assert_close(received, torch.tensor([0.5, 2.0]).double(), rtol=1e-14, atol=0)


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"model\.z_dim"):
        alignment_loss(torch.zeros(4, 3), torch.zeros(4, 5), Segments.from_grids([(2, 2)]))
