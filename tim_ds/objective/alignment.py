"""Feature alignment (REPA): projected features point the way that an image encoder's features do."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor

from tim_ds.errors import ShapeError
from tim_ds.packed import Segments


def alignment_loss(projected_TZ: Tensor, features_TZ: Tensor, segments: Segments) -> Tensor:
    """Mean over each segment's tokens of 1 - cos(projected, features), [S].

    Shapes:
        projected_TZ: [T, Z], from the network.   features_TZ: [T, Z], from the encoder.
    Raises:
        ShapeError: if the two differ in shape.
    """
    if projected_TZ.shape != features_TZ.shape:
        raise ShapeError(
            f"alignment: the network projects to {list(projected_TZ.shape)}, the encoder gives "
            f"{list(features_TZ.shape)}; model.z_dim must be the encoder's width, with one feature a token"
        )
    return segments.mean(1 - nnf.cosine_similarity(projected_TZ, features_TZ.to(projected_TZ.dtype), dim=-1))
