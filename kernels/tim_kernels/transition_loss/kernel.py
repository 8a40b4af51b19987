"""Triton kernels: one program a chunk of tokens, in tiles of whole latent cells.

T tokens, S segments, K chunks, C channels of a token, L channels of a cell.
"""

# What a jitted function returns has no type.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tim_kernels.chunks import ChunkPlan
from tim_kernels.on_device import on_own_device
from tim_kernels.transition_loss.reference import COSINE_FLOOR, TargetCoefficients

TILE = 1024
"""Elements of a tile: two vectors of float32 for each thread of four warps."""
Fields = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""x, z, dF/dt and the diffusion target, [T, C] each."""
FINISH_OPTIONS: dict[str, Any] = {"CHUNKS_AT_ONCE": 128, "num_warps": 4}


def cell_options(width: int, latent_channels: int) -> dict[str, Any]:
    """Compile-time arguments and warps for tokens of `width` channels, `latent_channels` of them a cell."""
    lanes = triton.next_power_of_2(latent_channels)
    return {
        "C": width,
        "L": latent_channels,
        "LANES": lanes,
        "CELLS": max(1, TILE // lanes),
        "FLOOR": COSINE_FLOOR,
        "num_warps": 4,
    }


@triton.jit
def target_tile(
    x_ptr,
    z_ptr,
    dF_dt_ptr,
    diffusion_target_ptr,
    alpha_hat,
    sigma_hat,
    b_over_db,
    d_alpha_hat,
    d_sigma_hat,
    offset,
    mask,
):
    """Eq. 9 on one tile; 0 outside the mask."""
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    slope = d_alpha_hat * x + d_sigma_hat * z
    if dF_dt_ptr is not None:
        slope -= tl.load(dF_dt_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if diffusion_target_ptr is not None:
        target = tl.load(diffusion_target_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        target = alpha_hat * x + sigma_hat * z
    return target + b_over_db * slope


@triton.jit
def forward_kernel(
    F_ptr,
    x_ptr,
    z_ptr,
    dF_dt_ptr,
    diffusion_target_ptr,
    alpha_hat_ptr,
    sigma_hat_ptr,
    b_over_db_ptr,
    d_alpha_hat_ptr,
    d_sigma_hat_ptr,
    partial_ptr,
    chunks_ptr,
    C: tl.constexpr,
    L: tl.constexpr,
    LANES: tl.constexpr,
    CELLS: tl.constexpr,
    FLOOR: tl.constexpr,
    DIRECTIONAL: tl.constexpr,
):
    """partial [K, 2]: this chunk's sum of squared errors, and of 1 - cos over its cells."""
    chunk = tl.program_id(0).to(tl.int64)
    first_cell = tl.load(chunks_ptr + chunk * 3).to(tl.int64) * (C // L)
    num_cells = tl.load(chunks_ptr + chunk * 3 + 1) * (C // L)
    segment = tl.load(chunks_ptr + chunk * 3 + 2)
    alpha_hat = tl.load(alpha_hat_ptr + segment)
    sigma_hat = tl.load(sigma_hat_ptr + segment)
    b_over_db = tl.load(b_over_db_ptr + segment)
    d_alpha_hat = tl.load(d_alpha_hat_ptr + segment)
    d_sigma_hat = tl.load(d_sigma_hat_ptr + segment)
    lane = tl.arange(0, LANES)[None, :]
    squares = tl.zeros((CELLS,), tl.float32)
    misalignment = tl.zeros((CELLS,), tl.float32)
    for start in range(0, num_cells, CELLS):
        cell = start + tl.arange(0, CELLS)
        offset = (first_cell + cell[:, None]) * L + lane
        mask = (cell < num_cells)[:, None] & (lane < L)
        target = target_tile(
            x_ptr,
            z_ptr,
            dF_dt_ptr,
            diffusion_target_ptr,
            alpha_hat,
            sigma_hat,
            b_over_db,
            d_alpha_hat,
            d_sigma_hat,
            offset,
            mask,
        )
        F = tl.load(F_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        error = F - target
        squares += tl.sum(error * error, 1)
        if DIRECTIONAL:
            norm_F = tl.maximum(tl.sqrt(tl.sum(F * F, 1)), FLOOR)
            norm_target = tl.maximum(tl.sqrt(tl.sum(target * target, 1)), FLOOR)
            cosine = tl.sum(F * target, 1) / (norm_F * norm_target)
            misalignment += tl.where(cell < num_cells, 1.0 - cosine, 0.0)
    tl.store(partial_ptr + chunk * 2, tl.sum(squares, 0))
    tl.store(partial_ptr + chunk * 2 + 1, tl.sum(misalignment, 0))


@triton.jit
def finish_kernel(
    partial_ptr,
    chunks_ptr,
    first_chunk_ptr,
    denoising_ptr,
    directional_ptr,
    count_ptr,
    C: tl.constexpr,
    L: tl.constexpr,
    CHUNKS_AT_ONCE: tl.constexpr,
):
    """Means of each segment from the sums of its chunks, in order; one program a segment."""
    segment = tl.program_id(0)
    begin = tl.load(first_chunk_ptr + segment)
    end = tl.load(first_chunk_ptr + segment + 1)
    squares = tl.zeros((CHUNKS_AT_ONCE,), tl.float32)
    misalignment = tl.zeros((CHUNKS_AT_ONCE,), tl.float32)
    count = tl.zeros((CHUNKS_AT_ONCE,), tl.int32)
    for start in range(begin, end, CHUNKS_AT_ONCE):
        chunk = (start + tl.arange(0, CHUNKS_AT_ONCE)).to(tl.int64)
        mask = chunk < end
        squares += tl.load(partial_ptr + chunk * 2, mask=mask, other=0.0)
        misalignment += tl.load(partial_ptr + chunk * 2 + 1, mask=mask, other=0.0)
        count += tl.load(chunks_ptr + chunk * 3 + 1, mask=mask, other=0)
    # A segment without tokens has no loss.
    tokens = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(denoising_ptr + segment, tl.sum(squares, 0) / (tokens * C))
    tl.store(directional_ptr + segment, tl.sum(misalignment, 0) / (tokens * (C // L)))
    tl.store(count_ptr + segment, tokens)


@triton.jit
def backward_kernel(
    d_denoising_ptr,
    d_directional_ptr,
    F_ptr,
    x_ptr,
    z_ptr,
    dF_dt_ptr,
    diffusion_target_ptr,
    alpha_hat_ptr,
    sigma_hat_ptr,
    b_over_db_ptr,
    d_alpha_hat_ptr,
    d_sigma_hat_ptr,
    count_ptr,
    d_F_ptr,
    chunks_ptr,
    C: tl.constexpr,
    L: tl.constexpr,
    LANES: tl.constexpr,
    CELLS: tl.constexpr,
    FLOOR: tl.constexpr,
    DIRECTIONAL: tl.constexpr,
):
    """d_directional_ptr is None unless DIRECTIONAL."""
    chunk = tl.program_id(0).to(tl.int64)
    first_cell = tl.load(chunks_ptr + chunk * 3).to(tl.int64) * (C // L)
    num_cells = tl.load(chunks_ptr + chunk * 3 + 1) * (C // L)
    segment = tl.load(chunks_ptr + chunk * 3 + 2)
    alpha_hat = tl.load(alpha_hat_ptr + segment)
    sigma_hat = tl.load(sigma_hat_ptr + segment)
    b_over_db = tl.load(b_over_db_ptr + segment)
    d_alpha_hat = tl.load(d_alpha_hat_ptr + segment)
    d_sigma_hat = tl.load(d_sigma_hat_ptr + segment)
    tokens = tl.load(count_ptr + segment)
    of_square = tl.load(d_denoising_ptr + segment) * 2.0 / (tokens * C)
    if DIRECTIONAL:
        of_cosine = -tl.load(d_directional_ptr + segment) / (tokens * (C // L))
    lane = tl.arange(0, LANES)[None, :]
    for start in range(0, num_cells, CELLS):
        cell = start + tl.arange(0, CELLS)
        offset = (first_cell + cell[:, None]) * L + lane
        mask = (cell < num_cells)[:, None] & (lane < L)
        target = target_tile(
            x_ptr,
            z_ptr,
            dF_dt_ptr,
            diffusion_target_ptr,
            alpha_hat,
            sigma_hat,
            b_over_db,
            d_alpha_hat,
            d_sigma_hat,
            offset,
            mask,
        )
        F = tl.load(F_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        d_F = of_square * (F - target)
        if DIRECTIONAL:
            length = tl.sqrt(tl.sum(F * F, 1))
            norm_F = tl.maximum(length, FLOOR)
            norm_target = tl.maximum(tl.sqrt(tl.sum(target * target, 1)), FLOOR)
            product = tl.sum(F * target, 1)
            # d norm / d F = F / length, also below the floor, and 0 at 0: as in torch's cosine_similarity.
            shrink = product / (norm_F * norm_F * norm_target * tl.where(length > 0, length, 1.0))
            straight = 1.0 / (norm_F * norm_target)
            d_F += of_cosine * (target * straight[:, None] - F * shrink[:, None])
        tl.store(d_F_ptr + offset, d_F.to(d_F_ptr.dtype.element_ty), mask=mask)


@on_own_device
def launch_forward(
    F_TC: Tensor,
    fields: Fields,
    coefficients: TargetCoefficients,
    plan: ChunkPlan,
    latent_channels: int,
    directional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both terms and the number of tokens (at least 1), float32 [S] each. Arguments are contiguous."""
    device, num_segments = F_TC.device, plan.num_segments
    partial = torch.empty((plan.num_chunks, 2), dtype=torch.float32, device=device)
    denoising, directional_S, count = (
        torch.empty(num_segments, dtype=torch.float32, device=device) for _ in range(3)
    )
    options = cell_options(F_TC.shape[1], latent_channels)
    if plan.num_chunks:
        forward_kernel[(plan.num_chunks,)](
            F_TC,
            *fields,
            *coefficients,
            partial,
            plan.chunks,
            DIRECTIONAL=directional,
            **options,
        )
    if num_segments:
        finish_kernel[(num_segments,)](
            partial,
            plan.chunks,
            plan.first_chunk,
            denoising,
            directional_S,
            count,
            C=options["C"],
            L=options["L"],
            **FINISH_OPTIONS,
        )
    return denoising, directional_S, count


def launch_backward(
    d_denoising_S: Tensor,
    d_directional_S: Tensor | None,
    F_TC: Tensor,
    fields: Fields,
    coefficients: TargetCoefficients,
    count_S: Tensor,
    plan: ChunkPlan,
    latent_channels: int,
) -> Tensor:
    """Gradient of F, in its dtype. All arguments are contiguous."""
    d_F = torch.empty(F_TC.shape, dtype=F_TC.dtype, device=F_TC.device)
    if plan.num_chunks:
        backward_kernel[(plan.num_chunks,)](
            d_denoising_S,
            d_directional_S,
            F_TC,
            *fields,
            *coefficients,
            count_S,
            d_F,
            plan.chunks,
            DIRECTIONAL=d_directional_S is not None,
            **cell_options(F_TC.shape[1], latent_channels),
        )
    return d_F
