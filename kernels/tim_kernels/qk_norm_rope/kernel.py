"""Triton kernels: a program, of one warp, takes some heads of one part of a run of tokens, token by token.

A head of 72 is held as 64 + 8 columns (`column_blocks`), no lane of which is idle, and as the even and the
odd members of its pairs, which the rotation mixes. One warp, so that every sum stays within it.

T tokens, N heads, H head width, S segments, P parts of a packed row, K programs along the tokens.
"""

# Triton compiles the concatenation of tuples, not their unpacking; its loops and arguments have no types.
# A test for None must stand alone, to be decided at compile time.
# ruff: noqa: RUF005, SIM102
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAssignmentType=false, reportUnboundVariable=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tim_kernels.chunks import ChunkPlan
from tim_kernels.columns import column_blocks
from tim_kernels.on_device import on_own_device
from tim_kernels.qk_norm_rope.table import RotaryTable
from tim_kernels.schedule import RUN, schedule_of
from tim_kernels.segment_sum import segment_sum

MAX_REGISTERS = 168
"""Of a thread, for three warps a scheduler; without a limit the compiler takes up to 221. No spills."""
FEW_ELEMENTS, FEW_REGISTERS = 256, 80
"""Of a backward's program, such as four heads of 64: eight a thread leave room for six warps a scheduler,
which it needs to have enough bytes under way, and for the shift beside the sums."""
FEW: tl.constexpr = tl.constexpr(FEW_ELEMENTS)
MIN_ROWS_PER_PROGRAM = 4
MIN_PROGRAMS = 2048
"""Sixteen warps for each multiprocessor of a large GPU."""


@triton.jit
def load_heads(ptr, head, N: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr):
    """Adjacent heads as even and odd columns, float32 [HEADS, size / 2] a block; what lies beyond is 0."""
    even = ()
    odd = ()
    for b in tl.static_range(len(BLOCKS)):
        column = BLOCKS[b][0] + tl.arange(0, BLOCKS[b][1])
        at = ptr + head[:, None] * H + column[None, :]
        if N % HEADS == 0 and BLOCKS[b][0] + BLOCKS[b][1] <= H:
            value = tl.load(at)
        else:
            value = tl.load(at, mask=(head < N)[:, None] & (column < H)[None, :], other=0.0)
        pair = tl.split(tl.reshape(value.to(tl.float32), (HEADS, BLOCKS[b][1] // 2, 2)))
        even = even + (pair[0],)
        odd = odd + (pair[1],)
    return even, odd


@triton.jit
def store_heads(
    ptr, even, odd, head, N: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, BLOCKS: tl.constexpr
):
    """Store adjacent heads in the dtype of the pointer."""
    for b in tl.static_range(len(BLOCKS)):
        column = BLOCKS[b][0] + tl.arange(0, BLOCKS[b][1])
        at = ptr + head[:, None] * H + column[None, :]
        value = tl.reshape(tl.join(even[b], odd[b]), (HEADS, BLOCKS[b][1])).to(ptr.dtype.element_ty)
        if N % HEADS == 0 and BLOCKS[b][0] + BLOCKS[b][1] <= H:
            tl.store(at, value)
        else:
            tl.store(at, value, mask=(head < N)[:, None] & (column < H)[None, :])


@triton.jit
def zero_heads(HEADS: tl.constexpr, BLOCKS: tl.constexpr):
    parts = ()
    for b in tl.static_range(len(BLOCKS)):
        parts = parts + (tl.zeros((HEADS, BLOCKS[b][1] // 2), tl.float32),)
    return parts


@triton.jit
def load_vector(ptr, H: tl.constexpr, BLOCKS: tl.constexpr):
    """A vector of H as even and odd elements, float32 [size / 2] a block."""
    even = ()
    odd = ()
    for b in tl.static_range(len(BLOCKS)):
        column = BLOCKS[b][0] + 2 * tl.arange(0, BLOCKS[b][1] // 2)
        even = even + (tl.load(ptr + column, mask=column < H, other=0.0).to(tl.float32),)
        odd = odd + (tl.load(ptr + column + 1, mask=column < H, other=0.0).to(tl.float32),)
    return even, odd


@triton.jit
def store_sum_of_heads(ptr, even, odd, H: tl.constexpr, BLOCKS: tl.constexpr):
    """Sums over the heads, stored as a vector of H."""
    for b in tl.static_range(len(BLOCKS)):
        column = BLOCKS[b][0] + 2 * tl.arange(0, BLOCKS[b][1] // 2)
        tl.store(ptr + column, tl.sum(even[b], 0), mask=column < H)
        tl.store(ptr + column + 1, tl.sum(odd[b], 0), mask=column < H)


@triton.jit
def load_angles(ptr, a, b, H: tl.constexpr, BLOCKS: tl.constexpr):
    """Row a of a table [positions, H / 4] for the first half of the pairs, row b for the second."""
    QUARTER: tl.constexpr = H // 4
    parts = ()
    for i in tl.static_range(len(BLOCKS)):
        pair = BLOCKS[i][0] // 2 + tl.arange(0, BLOCKS[i][1] // 2)
        at = tl.where(pair < QUARTER, a * QUARTER + pair, b * QUARTER + pair - QUARTER)
        parts = parts + (tl.load(ptr + at, mask=pair < 2 * QUARTER, other=0.0),)
    return parts


@triton.jit
def rotate(even, odd, cos, sin, BLOCKS: tl.constexpr, BACK: tl.constexpr):
    even_out = ()
    odd_out = ()
    for b in tl.static_range(len(BLOCKS)):
        c = cos[b][None, :]
        s = -sin[b][None, :] if BACK else sin[b][None, :]
        even_out = even_out + (even[b] * c - odd[b] * s,)
        odd_out = odd_out + (odd[b] * c + even[b] * s,)
    return even_out, odd_out


@triton.jit
def mean_of_heads(even, odd, H: tl.constexpr, BLOCKS: tl.constexpr):
    """[HEADS]; columns beyond H must hold 0."""
    total = tl.sum(even[0] + odd[0], 1)
    for b in tl.static_range(1, len(BLOCKS)):
        total += tl.sum(even[b] + odd[b], 1)
    return total * (1.0 / H)


@triton.jit
def centre(parts, mean, H: tl.constexpr, BLOCKS: tl.constexpr):
    """parts - mean, with 0 kept in the columns beyond H."""
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        value = parts[b] - mean[:, None]
        if BLOCKS[b][0] + BLOCKS[b][1] > H:
            column = BLOCKS[b][0] + 2 * tl.arange(0, BLOCKS[b][1] // 2)
            value = tl.where((column < H)[None, :], value, 0.0)
        out = out + (value,)
    return out


@triton.jit
def normalise(even, odd, eps, H: tl.constexpr, BLOCKS: tl.constexpr):
    """Heads of mean 0 and variance 1, and the factor [HEADS] that made it 1."""
    mean = mean_of_heads(even, odd, H, BLOCKS)
    even = centre(even, mean, H, BLOCKS)
    odd = centre(odd, mean, H, BLOCKS)
    variance = mean_of_heads(multiply(even, even, BLOCKS), multiply(odd, odd, BLOCKS), H, BLOCKS)
    rstd = tl.rsqrt(variance + eps)
    return scale_heads(even, rstd, BLOCKS), scale_heads(odd, rstd, BLOCKS), rstd


@triton.jit
def normalise_backward(d, normal, mean, projection, rstd, BLOCKS: tl.constexpr):
    """(d - mean - normal * projection) * rstd."""
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        along = normal[b] * (projection * rstd)[:, None]
        out = out + (d[b] * rstd[:, None] - (mean * rstd)[:, None] - along,)
    return out


@triton.jit
def add(a, b, BLOCKS: tl.constexpr):
    out = ()
    for i in tl.static_range(len(BLOCKS)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def multiply(a, b, BLOCKS: tl.constexpr):
    out = ()
    for i in tl.static_range(len(BLOCKS)):
        out = out + (a[i] * b[i],)
    return out


@triton.jit
def scale_heads(parts, factor, BLOCKS: tl.constexpr):
    """parts * factor[head]."""
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        out = out + (parts[b] * factor[:, None],)
    return out


@triton.jit
def scale_columns(parts, weight, BLOCKS: tl.constexpr):
    """parts * weight[column]."""
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        out = out + (parts[b] * weight[b][None, :],)
    return out


@triton.jit
def shift_columns(parts, bias, BLOCKS: tl.constexpr):
    """parts + bias[column]."""
    out = ()
    for b in tl.static_range(len(BLOCKS)):
        out = out + (parts[b] + bias[b][None, :],)
    return out


@triton.jit
def forward_part(
    x_ptr,
    shift_ptr,
    out_ptr,
    norm,
    table,
    run,
    x_stride,
    eps,
    N: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One part of a run (first token, count); norm: weight and bias; table: cos, sin and the positions."""
    weight_ptr = norm[0]
    bias_ptr = norm[1]
    cos_ptr = table[0]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    if weight_ptr is not None:
        weight_even, weight_odd = load_vector(weight_ptr, H, BLOCKS)
    if bias_ptr is not None:
        bias_even, bias_odd = load_vector(bias_ptr, H, BLOCKS)
    for i in tl.range(0, run[1], num_stages=STAGES):
        token = run[0] + i
        even, odd = load_heads(x_ptr + token * x_stride, head, N, H, HEADS, BLOCKS)
        if cos_ptr is not None:
            a = tl.load(table[2] + token)
            b = tl.load(table[3] + token)
            cos = load_angles(cos_ptr, a, b, H, BLOCKS)
            sin = load_angles(table[1], a, b, H, BLOCKS)
        if shift_ptr is not None:
            # Read anew for each token, from the cache: kept, it would cost half of the registers.
            shift_even, shift_odd = load_heads(shift_ptr, head, N, H, HEADS, BLOCKS)
            even = add(even, shift_even, BLOCKS)
            odd = add(odd, shift_odd, BLOCKS)
        if weight_ptr is not None:
            even, odd, _ = normalise(even, odd, eps, H, BLOCKS)
            even = scale_columns(even, weight_even, BLOCKS)
            odd = scale_columns(odd, weight_odd, BLOCKS)
        if bias_ptr is not None:
            even = shift_columns(even, bias_even, BLOCKS)
            odd = shift_columns(odd, bias_odd, BLOCKS)
        if cos_ptr is not None:
            even, odd = rotate(even, odd, cos, sin, BLOCKS, False)
        store_heads(out_ptr + token * (N * H), even, odd, head, N, H, HEADS, BLOCKS)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def forward_kernel(
    x_ptr,
    shift_ptr,
    first_ptr,
    second_ptr,
    plain_ptr,
    first_weight_ptr,
    first_bias_ptr,
    second_weight_ptr,
    second_bias_ptr,
    cos_ptr,
    sin_ptr,
    position_a_ptr,
    position_b_ptr,
    chunks_ptr,
    num_rows,
    rows_per_program,
    x_stride,
    shift_stride,
    eps,
    N: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (runs of tokens, groups of heads, parts). Parts lie side by side in a row of x.

    The first and the second part are normalised and rotated, the plain one only shifted; a part that is not
    there has None for its output. Chunks say whose shift a run of tokens takes; without them there is none.
    """
    if chunks_ptr is not None:
        chunk_ptr = chunks_ptr + tl.program_id(0) * 3
        start = tl.load(chunk_ptr).to(tl.int64)
        count = tl.load(chunk_ptr + 1).to(tl.int64)
        shift_ptr += tl.load(chunk_ptr + 2).to(tl.int64) * shift_stride
    else:
        start = tl.program_id(0).to(tl.int64) * rows_per_program
        count = tl.minimum(num_rows - start, rows_per_program)
    part = tl.program_id(2)
    x_ptr += part * (N * H)
    if shift_ptr is not None:
        shift_ptr += part * (N * H)
    first_norm = (first_weight_ptr, first_bias_ptr)
    table = (cos_ptr, sin_ptr, position_a_ptr, position_b_ptr)
    run = (start, count)
    if part == 0:
        forward_part(
            x_ptr, shift_ptr, first_ptr, first_norm, table, run, x_stride, eps, N, H, HEADS, BLOCKS, STAGES,
        )  # fmt: skip
    if second_ptr is not None:
        norm = (second_weight_ptr, second_bias_ptr)
        if part == 1:
            forward_part(
                x_ptr, shift_ptr, second_ptr, norm, table, run, x_stride, eps, N, H, HEADS, BLOCKS, STAGES,
            )  # fmt: skip
    if plain_ptr is not None:
        PLAIN: tl.constexpr = 1 if second_ptr is None else 2
        none = (None, None, None, None)
        if part == PLAIN:
            forward_part(
                x_ptr, shift_ptr, plain_ptr, none, none, run, x_stride, eps, N, H, HEADS, BLOCKS, STAGES,
            )  # fmt: skip


@triton.jit
def backward_part(
    d_out_ptr,
    x_ptr,
    shift_ptr,
    d_x_ptr,
    weight_ptr,
    table,
    partials,
    run,
    x_stride,
    d_x_stride,
    eps,
    N: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One part of a run; partials: where the sums for the affine weights and for the shift go."""
    cos_ptr = table[0]
    affine_partial_ptr = partials[0]
    shift_partial_ptr = partials[1]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    if weight_ptr is not None:
        weight_even, weight_odd = load_vector(weight_ptr, H, BLOCKS)
        d_weight_even = zero_heads(HEADS, BLOCKS)
        d_weight_odd = zero_heads(HEADS, BLOCKS)
        d_bias_even = zero_heads(HEADS, BLOCKS)
        d_bias_odd = zero_heads(HEADS, BLOCKS)
    if shift_partial_ptr is not None:
        d_shift_even = zero_heads(HEADS, BLOCKS)
        d_shift_odd = zero_heads(HEADS, BLOCKS)
    KEEPS_SHIFT: tl.constexpr = HEADS * H <= FEW
    if shift_ptr is not None:
        if KEEPS_SHIFT:
            shift_even, shift_odd = load_heads(shift_ptr, head, N, H, HEADS, BLOCKS)
    for i in tl.range(0, run[1], num_stages=STAGES):
        token = run[0] + i
        d_even, d_odd = load_heads(d_out_ptr + token * (N * H), head, N, H, HEADS, BLOCKS)
        if weight_ptr is not None:
            even, odd = load_heads(x_ptr + token * x_stride, head, N, H, HEADS, BLOCKS)
        if cos_ptr is not None:
            a = tl.load(table[2] + token)
            b = tl.load(table[3] + token)
            cos = load_angles(cos_ptr, a, b, H, BLOCKS)
            sin = load_angles(table[1], a, b, H, BLOCKS)
            d_even, d_odd = rotate(d_even, d_odd, cos, sin, BLOCKS, True)
        if weight_ptr is not None:
            if shift_ptr is not None:
                if not KEEPS_SHIFT:
                    shift_even, shift_odd = load_heads(shift_ptr, head, N, H, HEADS, BLOCKS)
                even = add(even, shift_even, BLOCKS)
                odd = add(odd, shift_odd, BLOCKS)
            # Taken again from x: reading back a stored mean and deviation saves no instructions at H = 72.
            even, odd, rstd = normalise(even, odd, eps, H, BLOCKS)
            d_bias_even = add(d_bias_even, d_even, BLOCKS)
            d_bias_odd = add(d_bias_odd, d_odd, BLOCKS)
            # Products are taken anew where a sum wants them: one multiply-add does both.
            d_weight_even = add(d_weight_even, multiply(d_even, even, BLOCKS), BLOCKS)
            d_weight_odd = add(d_weight_odd, multiply(d_odd, odd, BLOCKS), BLOCKS)
            d_even = scale_columns(d_even, weight_even, BLOCKS)
            d_odd = scale_columns(d_odd, weight_odd, BLOCKS)
            mean = mean_of_heads(d_even, d_odd, H, BLOCKS)
            along_even = multiply(d_even, even, BLOCKS)
            along_odd = multiply(d_odd, odd, BLOCKS)
            projection = mean_of_heads(along_even, along_odd, H, BLOCKS)
            d_even = normalise_backward(d_even, even, mean, projection, rstd, BLOCKS)
            d_odd = normalise_backward(d_odd, odd, mean, projection, rstd, BLOCKS)
        if shift_partial_ptr is not None:
            d_shift_even = add(d_shift_even, d_even, BLOCKS)
            d_shift_odd = add(d_shift_odd, d_odd, BLOCKS)
        store_heads(d_x_ptr + token * d_x_stride, d_even, d_odd, head, N, H, HEADS, BLOCKS)
    if shift_partial_ptr is not None:
        store_heads(shift_partial_ptr, d_shift_even, d_shift_odd, head, N, H, HEADS, BLOCKS)
    if weight_ptr is not None:
        store_sum_of_heads(affine_partial_ptr, d_weight_even, d_weight_odd, H, BLOCKS)
        store_sum_of_heads(affine_partial_ptr + H, d_bias_even, d_bias_odd, H, BLOCKS)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def backward_kernel(
    d_first_ptr,
    d_second_ptr,
    d_plain_ptr,
    x_ptr,
    shift_ptr,
    d_x_ptr,
    first_weight_ptr,
    second_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_a_ptr,
    position_b_ptr,
    chunks_ptr,
    affine_partial_ptr,
    shift_partial_ptr,
    num_rows,
    rows_per_program,
    x_stride,
    shift_stride,
    d_x_stride,
    eps,
    N: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid and parts as in the forward; the plain part's gradient is copied into its place in d_x.

    affine_partial [1 or 2, K, groups of heads, 2, H]: each program's sums for the weight and the bias of the
    normalised parts. shift_partial [K, P N H].
    """
    run = tl.program_id(0).to(tl.int64)
    if chunks_ptr is not None:
        start = tl.load(chunks_ptr + run * 3).to(tl.int64)
        count = tl.load(chunks_ptr + run * 3 + 1).to(tl.int64)
        shift_ptr += tl.load(chunks_ptr + run * 3 + 2).to(tl.int64) * shift_stride
    else:
        start = run * rows_per_program
        count = tl.minimum(num_rows - start, rows_per_program)
    part = tl.program_id(2)
    d_x_ptr += part * (N * H)
    if x_ptr is not None:
        x_ptr += part * (N * H)
    if shift_ptr is not None:
        shift_ptr += part * (N * H)
        shift_partial_ptr += run * d_x_stride + part * (N * H)
    if affine_partial_ptr is not None:
        program = (part * tl.num_programs(0) + run) * tl.num_programs(1) + tl.program_id(1)
        affine_partial_ptr += program * (2 * H)
    table = (cos_ptr, sin_ptr, position_a_ptr, position_b_ptr)
    partials = (affine_partial_ptr, shift_partial_ptr)
    span = (start, count)
    if part == 0:
        backward_part(
            d_first_ptr, x_ptr, shift_ptr, d_x_ptr, first_weight_ptr, table, partials, span,
            x_stride, d_x_stride, eps, N, H, HEADS, BLOCKS, STAGES,
        )  # fmt: skip
    if d_second_ptr is not None:
        if part == 1:
            backward_part(
                d_second_ptr, x_ptr, shift_ptr, d_x_ptr, second_weight_ptr, table, partials, span,
                x_stride, d_x_stride, eps, N, H, HEADS, BLOCKS, STAGES,
            )  # fmt: skip
    if d_plain_ptr is not None:
        PLAIN: tl.constexpr = 1 if d_second_ptr is None else 2
        none = (None, None, None, None)
        shift_alone = (None, shift_partial_ptr)
        if part == PLAIN:
            backward_part(
                d_plain_ptr, None, None, d_x_ptr, None, none, shift_alone, span,
                x_stride, d_x_stride, eps, N, H, HEADS, BLOCKS, STAGES,
            )  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What lies in a row of x: parts of N heads each, the normalised ones first."""

    num_heads: int
    head_dim: int
    num_normed: int
    has_plain: bool

    @property
    def part_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def num_parts(self) -> int:
        return self.num_normed + self.has_plain

    def first_parts(self, x: Tensor, count: int) -> Tensor:
        """The first parts of every row: what a kernel reads of it."""
        return x if x.ndim == 3 else x[:, : count * self.part_size]


def forward_options(num_heads: int, head_dim: int) -> dict[str, Any]:
    return {**head_options(num_heads, head_dim, "qk_norm_rope forward"), "maxnreg": MAX_REGISTERS}


def backward_options(num_heads: int, head_dim: int, *, has_shift: bool) -> dict[str, Any]:
    options = head_options(num_heads, head_dim, "qk_norm_rope backward")
    # Without a shift the compiler needs 128 registers, and spreads to the limit if one is set.
    limit = MAX_REGISTERS if has_shift else None
    if options["HEADS"] * head_dim <= FEW_ELEMENTS and len(options["BLOCKS"]) == 1:
        limit = FEW_REGISTERS
    return {**options, "maxnreg": limit}


@on_own_device
def launch_forward(
    x: Tensor,
    shift_SE: Tensor | None,
    norms: Sequence[tuple[Tensor, Tensor | None]],
    table: RotaryTable | None,
    plan: ChunkPlan | None,
    layout: Layout,
    eps: float,
) -> list[Tensor]:
    """The parts of x [T, ...], each [T, N, H]; a plain part only where there is a shift to add to it."""
    num_rows = x.shape[0]
    with_plain = layout.has_plain and shift_SE is not None
    shape = (num_rows, layout.num_heads, layout.head_dim)
    outputs = [
        torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(layout.num_normed + with_plain)
    ]
    plain = outputs[-1] if with_plain else None
    second = outputs[1] if layout.num_normed == 2 else None
    options = forward_options(layout.num_heads, layout.head_dim)
    grid, rows = _grid(num_rows, len(outputs), options, plan if shift_SE is not None else None)
    if num_rows:
        forward_kernel[grid](
            layout.first_parts(x, len(outputs)),
            shift_SE,
            outputs[0],
            second,
            plain,
            *_weights_and_biases(norms),
            *table_tensors(table),
            None if plan is None or shift_SE is None else plan.chunks,
            num_rows,
            rows,
            x.stride(0),
            0 if shift_SE is None else shift_SE.stride(0),
            eps,
            **options,
        )
    return outputs


def launch_backward(
    gradients: Sequence[Tensor],
    x: Tensor | None,
    shift_SE: Tensor | None,
    norms: Sequence[tuple[Tensor, Tensor | None]],
    table: RotaryTable | None,
    plan: ChunkPlan | None,
    layout: Layout,
    dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """d_x [T, P N H]; float32 sums [1 or 2, 2, H] for weight and bias; d_shift float32 [S, P N H].

    Args:
        gradients: of every part, contiguous [T, N, H].
        x: needed where there is a norm.
    """
    num_rows, device = gradients[0].shape[0], gradients[0].device
    width = layout.num_parts * layout.part_size
    d_x = torch.empty((num_rows, width), dtype=dtype, device=device)
    options = backward_options(layout.num_heads, layout.head_dim, has_shift=shift_SE is not None)
    if shift_SE is None:
        plan = None
    grid, rows = _grid(num_rows, layout.num_parts, options, plan)
    affine_partial = shift_partial = None
    if norms:
        shape = (layout.num_normed, grid[0], grid[1], 2, layout.head_dim)
        affine_partial = torch.empty(shape, dtype=torch.float32, device=device)
    if shift_SE is not None:
        shift_partial = torch.empty((grid[0], width), dtype=torch.float32, device=device)
    if num_rows:
        weights = _weights_and_biases(norms)
        backward_kernel[grid](
            gradients[0],
            gradients[1] if layout.num_normed == 2 else None,
            gradients[-1] if layout.has_plain else None,
            None if x is None else layout.first_parts(x, layout.num_normed),
            shift_SE,
            d_x,
            weights[0],
            weights[2],
            *table_tensors(table),
            None if plan is None else plan.chunks,
            affine_partial,
            shift_partial,
            num_rows,
            rows,
            0 if x is None else x.stride(0),
            0 if shift_SE is None else shift_SE.stride(0),
            width,
            eps,
            **options,
        )
    # The second reduction: in a fixed order, as the first.
    sums = None if affine_partial is None else affine_partial.sum((1, 2))
    d_shift = None if shift_partial is None or plan is None else segment_sum(shift_partial, plan)
    return d_x, sums, d_shift


def head_options(num_heads: int, head_dim: int, kernel: str) -> dict[str, Any]:
    """Compile-time arguments and warps of a kernel that works on some heads at a time.

    Heads are taken by a power of two: the largest that fits, or half of it where that idles fewer lanes.
    """
    schedule = schedule_of(kernel)
    most = 1
    while most * 2 * head_dim <= schedule.elements and most < num_heads:
        most *= 2
    half = max(most // 2, 1)
    heads = half if -(-num_heads // half) * half < -(-num_heads // most) * most else most
    blocks = {"HEADS": heads, "BLOCKS": column_blocks(head_dim), "STAGES": schedule.stages}
    return {"N": num_heads, "H": head_dim, **blocks, "num_warps": schedule.num_warps}


def _grid(
    num_rows: int, num_parts: int, options: dict[str, Any], plan: ChunkPlan | None
) -> tuple[tuple[int, int, int], int]:
    """The grid, and the tokens of a program where no plan says them."""
    groups = -(-options["N"] // options["HEADS"])
    rows = schedule_of(RUN).rows
    while rows > MIN_ROWS_PER_PROGRAM and num_rows * groups * num_parts < rows * MIN_PROGRAMS:
        rows //= 2
    return (-(-num_rows // rows) if plan is None else plan.num_chunks, groups, num_parts), rows


def _weights_and_biases(norms: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor | None]:
    """Weight and bias of the first and of the second part."""
    found: list[Tensor | None] = [None] * 4
    for i, (weight, bias) in enumerate(norms):
        found[2 * i] = weight.contiguous()
        found[2 * i + 1] = None if bias is None else bias.contiguous()
    return found


def table_tensors(table: RotaryTable | None) -> tuple[Tensor | None, ...]:
    return (None,) * 4 if table is None else (table.cos, table.sin, table.positions_a, table.positions_b)
