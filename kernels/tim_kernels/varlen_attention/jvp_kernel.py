"""Triton kernel of attention's tangent: one pass over the keys, from the output that some forward has left.

With P the softmax, dS = scale (dq k + q dk) and mu the row sums of P dS:

    d_out = (P dS) v - mu out + P dv

which are five matrix products a tile, three where keys and values stand still. P comes from the logsumexp of
the forward, or, where its backend kept none, from running maxima and sums in the same pass: no more products.

A head of 72 is held as 64 + 16 columns, of which 8 are masked, and not as 128: 1.6 times fewer products.

T queries and L keys of the pack, T' and L' of what moves, N heads, H head width, M tiles.
"""

# Triton compiles the concatenation of tuples, not their unpacking; its loops and arguments have no types.
# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tim_kernels.dispatch import is_interpreting
from tim_kernels.on_device import on_own_device
from tim_kernels.schedule import WIDE_TILE, Tile, schedule_of
from tim_kernels.varlen_attention.tangent_plan import ROWS_PER_TILE, AttentionTangentPlan

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
INTERPRETED: tl.constexpr = tl.constexpr(is_interpreting())
"""The interpreter has no products of bfloat16; there, operands are widened."""
SMALLEST_PRODUCT = 16
"""Fewest columns over which a matrix instruction sums."""


def head_blocks(head_dim: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of at most two blocks that cover a head; only the last may reach beyond it."""
    whole = max(SMALLEST_PRODUCT, 1 << (head_dim - 1).bit_length())
    first = whole // 2
    rest = max(SMALLEST_PRODUCT, 1 << max(0, head_dim - first - 1).bit_length())
    return ((0, whole),) if first < SMALLEST_PRODUCT or first + rest >= whole else ((0, first), (first, rest))


@triton.jit
def load_tokens(ptr, row, stride, head, row_mask, H: tl.constexpr, BLOCKS: tl.constexpr):
    """One head of some tokens as a tuple of blocks, 0 where there is none; row is int64 [rows]."""
    parts = ()
    for b in tl.static_range(len(BLOCKS)):
        column = BLOCKS[b][0] + tl.arange(0, BLOCKS[b][1])
        mask = row_mask[:, None]
        if BLOCKS[b][0] + BLOCKS[b][1] > H:
            mask = mask & (column < H)[None, :]
        value = tl.load(ptr + row[:, None] * stride + (head * H + column)[None, :], mask=mask, other=0.0)
        if INTERPRETED:
            value = value.to(tl.float32)
        parts = parts + (value,)
    return parts


@triton.jit
def store_tokens(ptr, parts, row, stride, head, row_mask, H: tl.constexpr, BLOCKS: tl.constexpr):
    for b in tl.static_range(len(BLOCKS)):
        column = BLOCKS[b][0] + tl.arange(0, BLOCKS[b][1])
        mask = row_mask[:, None]
        if BLOCKS[b][0] + BLOCKS[b][1] > H:
            mask = mask & (column < H)[None, :]
        at = ptr + row[:, None] * stride + (head * H + column)[None, :]
        tl.store(at, parts[b].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_tokens(ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    parts = ()
    for b in tl.static_range(len(BLOCKS)):
        parts = parts + (tl.full((ROWS, BLOCKS[b][1]), 0.0, tl.float32),)
    return parts


@triton.jit
def add_products(total, queries, keys, BLOCKS: tl.constexpr, PRECISION: tl.constexpr):
    """total + queries keys^T, [queries, keys]."""
    for b in tl.static_range(len(BLOCKS)):
        total = tl.dot(queries[b], tl.trans(keys[b]), total, input_precision=PRECISION)
    return total


@triton.jit
def add_mixture(total, weights, values, BLOCKS: tl.constexpr, PRECISION: tl.constexpr):
    """total + weights values, a block each; the weights are rounded to the precision of the values."""
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        rounded = weights.to(values[b].dtype)
        out = out + (tl.dot(rounded, values[b], total[b], input_precision=PRECISION),)
    return out


@triton.jit
def scale_tokens(parts, factor, BLOCKS: tl.constexpr):
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        out = out + (parts[b] * factor[:, None],)
    return out


@triton.jit
def subtract(parts, factor, others, BLOCKS: tl.constexpr):
    """parts - factor others, a factor a row."""
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        out = out + (parts[b] - factor[:, None] * others[b].to(tl.float32),)
    return out


@triton.jit
def jvp_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    out_ptr,
    lse_ptr,
    d_out_ptr,
    tiles_ptr,
    q_stride,
    k_stride,
    v_stride,
    d_q_stride,
    d_k_stride,
    d_v_stride,
    out_stride,
    scale,
    N: tl.constexpr,
    H: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (pieces of ROWS queries of the tiles, heads). d_k_ptr and d_v_ptr are None where keys and values
    stand still, lse_ptr where there is no logsumexp [T, N]."""
    tile_ptr = tiles_ptr + tl.program_id(0) // PIECES * 6
    head = tl.program_id(1)
    first_local = tl.program_id(0) % PIECES * ROWS
    if first_local >= tl.load(tile_ptr + 1):
        return
    local = first_local + tl.arange(0, ROWS)
    is_query = local < tl.load(tile_ptr + 1)
    moving = tl.load(tile_ptr).to(tl.int64) + local
    row = tl.load(tile_ptr + 2).to(tl.int64) + local
    first_moving_key = tl.load(tile_ptr + 3).to(tl.int64)
    first_key = tl.load(tile_ptr + 4).to(tl.int64)
    num_keys = tl.load(tile_ptr + 5)

    q = load_tokens(q_ptr, row, q_stride, head, is_query, H, BLOCKS)
    d_q = load_tokens(d_q_ptr, moving, d_q_stride, head, is_query, H, BLOCKS)
    if lse_ptr is not None:
        # In units of log 2, as all that follows.
        top = tl.load(lse_ptr + row * N + head, mask=is_query, other=0.0) * LOG2_E
    else:
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        weight = tl.zeros((ROWS,), tl.float32)
    mu = tl.zeros((ROWS,), tl.float32)
    total = zero_tokens(ROWS, BLOCKS)
    for start in tl.range(0, num_keys, KEYS, num_stages=STAGES):
        key = start + tl.arange(0, KEYS)
        is_key = key < num_keys
        k = load_tokens(k_ptr, first_key + key, k_stride, head, is_key, H, BLOCKS)
        nothing = tl.zeros((ROWS, KEYS), tl.float32)
        logits = add_products(nothing, q, k, BLOCKS, PRECISION) * (scale * LOG2_E)
        d_logits = add_products(nothing, d_q, k, BLOCKS, PRECISION)
        if d_k_ptr is not None:
            d_k = load_tokens(d_k_ptr, first_moving_key + key, d_k_stride, head, is_key, H, BLOCKS)
            d_logits = add_products(d_logits, q, d_k, BLOCKS, PRECISION)
        if lse_ptr is None:
            logits = tl.where(is_key[None, :], logits, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            shrink = tl.exp2(top - higher)
            top = higher
            p = tl.exp2(logits - top[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            mu = mu * shrink
            total = scale_tokens(total, shrink, BLOCKS)
        else:
            p = tl.where(is_key[None, :], tl.exp2(logits - top[:, None]), 0.0)
        moved = p * (d_logits * scale)
        mu += tl.sum(moved, 1)
        v = load_tokens(v_ptr, first_key + key, v_stride, head, is_key, H, BLOCKS)
        total = add_mixture(total, moved, v, BLOCKS, PRECISION)
        if d_v_ptr is not None:
            d_v = load_tokens(d_v_ptr, first_moving_key + key, d_v_stride, head, is_key, H, BLOCKS)
            total = add_mixture(total, p, d_v, BLOCKS, PRECISION)
    if lse_ptr is None:
        # A segment without keys has the tangent 0.
        inverse = 1.0 / tl.where(weight > 0.0, weight, 1.0)
        mu = mu * inverse
        total = scale_tokens(total, inverse, BLOCKS)
    out = load_tokens(out_ptr, row, out_stride, head, is_query, H, BLOCKS)
    store_tokens(d_out_ptr, subtract(total, mu, out, BLOCKS), moving, N * H, head, is_query, H, BLOCKS)


def tile_of(head_dim: int, dtype: torch.dtype) -> Tile:
    is_wide = head_dim > 96 or dtype == torch.float32
    return schedule_of(WIDE_TILE if is_wide else "varlen_attention_jvp")


def jvp_options(num_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments and warps. float32 is for accuracy: three products of TF32 for each."""
    tile = tile_of(head_dim, dtype)
    return {
        "N": num_heads,
        "H": head_dim,
        "BLOCKS": head_blocks(head_dim),
        "ROWS": tile.rows,
        "PIECES": ROWS_PER_TILE // tile.rows,
        "KEYS": tile.keys,
        "STAGES": tile.stages,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "num_warps": tile.num_warps,
    }


@on_own_device
def launch_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_q: Tensor,
    d_k: Tensor | None,
    d_v: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    plan: AttentionTangentPlan,
    scale: float,
) -> Tensor:
    """Rows of all arguments hold adjacent heads; lse is float32 [T, N], contiguous."""
    _, num_heads, head_dim = q.shape
    d_out = torch.empty(d_q.shape, dtype=q.dtype, device=q.device)
    options = jvp_options(num_heads, head_dim, q.dtype)
    if plan.num_tiles:
        jvp_kernel[(plan.num_tiles * options["PIECES"], num_heads)](
            q,
            k,
            v,
            d_q,
            d_k,
            d_v,
            out,
            lse,
            d_out,
            plan.tiles,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            d_q.stride(0),
            0 if d_k is None else d_k.stride(0),
            0 if d_v is None else d_v.stride(0),
            out.stride(0),
            scale,
            **options,
        )
    return d_out
