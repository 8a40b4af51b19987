"""The authors' training loss in plain PyTorch, beside `baseline_network.py` and as separate: torch alone.

A batch holds images of one size. Its first `num_diffusion` train r = t; the time derivative of all others is
the published central difference: two further forwards, without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tim_ds.trainer.bench.baseline_network import BaselineNetwork

DIFFERENCE_STEP = 0.005
"""Half-width of the central difference in t."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one size.

    Shapes:
        x, z: [B, C, height, width], clean latents and unit noise.   t, r: [B].
        y: text states [B, M, E] or labels [B].   features: [B, N, Z] of an image encoder.
    """

    x: Tensor
    z: Tensor
    t: Tensor
    r: Tensor
    num_diffusion: int
    y: Tensor
    features: Tensor | None = None


class BatchLoss(NamedTuple):
    total: Tensor
    """Sum over the images; carries the gradient."""
    denoising: Tensor
    """Mean squared error of every image, unweighted, detached: [B]."""


Terms = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


def batch_loss(
    network: BaselineNetwork,
    batch: Batch,
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    alignment_weight: float = 0.0,
    terms: Terms | None = None,
) -> BatchLoss:
    """Loss of a batch on the linear path x_t = (1 - t) x + t z.

    Args:
        autocast: entered around every call of the network; the loss itself is float32 or wider.
        terms: `transition_terms`, or a compiled one.
    """
    x, z, t, r, first = batch.x, batch.z, batch.t, batch.r, batch.num_diffusion

    def predict(x_t: Tensor, t: Tensor, rows: slice, with_features: bool) -> tuple[Tensor, Tensor | None]:
        with autocast():
            out, features = network(x_t, t, r[rows], batch.y[rows], with_features=with_features)
        return _wide(out), None if features is None else _wide(features)

    everything, moving = slice(None), slice(first, None)
    predicted, features = predict(interpolate(x, z, t), t, everything, batch.features is not None)
    derivative = torch.zeros_like(predicted)
    if first < x.shape[0]:
        with torch.no_grad():
            e, sides = DIFFERENCE_STEP, []
            for time in (t[moving] + e, t[moving] - e):
                side, _ = predict(interpolate(x[moving], z[moving], time), time, moving, False)
                sides.append(side)
            derivative[moving] = sides[0] / (2 * e) - sides[1] / (2 * e)
    weighted, denoising = (terms or transition_terms)(predicted, derivative, x, z, t, r, first)
    total = weighted.sum()
    if batch.features is not None:
        assert features is not None, "asked for above"
        cosine = nnf.cosine_similarity(features, batch.features.to(features.dtype), dim=-1)
        total = total + alignment_weight * _finite((1 - cosine).mean(1)).sum()
    return BatchLoss(total, denoising.detach())


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    t = t[:, None, None, None]
    return (1 - t) * x + t * z


def transition_terms(
    predicted: Tensor, derivative: Tensor, x: Tensor, z: Tensor, t: Tensor, r: Tensor, num_diffusion: int
) -> tuple[Tensor, Tensor]:
    """Weighted loss and unweighted squared error of every image: [B] each."""
    interval = (t - r)[:, None, None, None]
    target = z - x - interval * derivative
    denoising = _finite((predicted - target).square().mean(dim=(1, 2, 3)))
    cosine = nnf.cosine_similarity(predicted, target, dim=1, eps=1e-8)
    loss = denoising + _finite((1 - cosine).mean(dim=(1, 2)))
    weight = torch.rsqrt(torch.tan(t) - torch.tan(r) + 1.0)
    weight = torch.where(torch.arange(len(t), device=t.device) < num_diffusion, 1.0, weight)
    adaptive = 1 / (loss.detach() + 1e-5)
    return weight * adaptive * loss, denoising


def _finite(loss: Tensor) -> Tensor:
    # As the authors' step does, hence part of its cost. It hides a NaN in the value, not in the gradient, but
    # nothing is timed before both agree with ours.
    return torch.nan_to_num(loss, nan=0.0, posinf=1e5, neginf=-1e5)


def _wide(out: Tensor) -> Tensor:
    return out.to(torch.promote_types(out.dtype, torch.float32))
