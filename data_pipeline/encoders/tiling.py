"""Large latents to pictures in tiles, so that memory follows the tile and not the picture.

Two ways, chosen by what the decoder is:

* DC-AE: **exact**. All its layers but one kind look at a few neighbours only, so a tile with a margin as
  wide as the layers' reach gives the very pixels of the whole picture once the margin is cut off. The
  exception is linear attention, which sees the whole picture through one small sum: it is taken in two passes
  over the tiles, first the sum, then what each cell reads from it. Tiled and untiled differ by the order of
  float sums.
* anything else (SD-VAE): **approximate**. Group norms and softmax attention see the whole picture, so every
  tile is decoded as a picture of its own. Tiles overlap and fade into each other, which hides seams; means
  may still drift from tile to tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from data_pipeline.errors import DataError

OVERLAP_SHARE = 0.25
"""Of a tile's side, for tiles that fade into each other."""
TENSORS_ALIVE = 8
"""Tensors of a layer's width that exist at once while it works: its input, its branch before and after each
convolution and norm, and what the libraries below take for themselves."""
SLACK_BYTES = 64 * 2**20
"""What allocators hold beyond that."""


def decode_exactly(decoder: Any, latents: Tensor, tile_px: int, stride: int) -> Tensor:
    """What diffusers' DC-AE `decoder(latents)` gives, with at most about `tile_px` x `tile_px` pixels at a
    time.

    Shapes:
        latents: [B, channels, h, w]. Returns [B, 3, h * stride, w * stride].
    Raises:
        DataError: if the decoder holds a layer whose reach is not known (`reaches_known`).
    """
    x = decoder.conv_in(latents)
    if decoder.in_shortcut:
        x = x + latents.repeat_interleave(decoder.in_shortcut_repeats, dim=1)
    layers, first_local = _split(decoder)
    for layer in layers[:first_local]:
        tile = _cells(tile_px, stride)
        if _is_global(layer):
            x = _attend(layer.attn, x, tile)
            x = _in_tiles(layer.conv_out, x, tile, *_reach(layer.conv_out))
        else:
            margin, scale = _reach(layer)
            x = _in_tiles(layer, x, tile, margin, scale)
            stride //= scale
    tail = [*layers[first_local:], decoder.conv_out]

    def finish(part: Tensor) -> Tensor:
        for layer in tail[:-1]:
            part = layer(part)
        part = decoder.norm_out(part.movedim(1, -1)).movedim(-1, 1)
        return decoder.conv_out(decoder.conv_act(part))

    return _in_tiles(finish, x, _cells(tile_px, stride), *_reach_of(tail))


def decode_blended(decode: Callable[[Tensor], Tensor], latents: Tensor, tile_px: int, stride: int) -> Tensor:
    """Tiles of `tile_px` decoded one by one, overlapping by a quarter, faded linearly into each other.

    All tiles are of full size: the last of a row moves back instead of becoming a sliver.

    Shapes:
        latents: [B, channels, h, w]. Returns [B, C, h * stride, w * stride].
    """
    height, width = latents.shape[2:]
    tile = max(1, tile_px // stride)
    overlap = max(1, round(tile * OVERLAP_SHARE)) if tile > 1 else 0
    total = weight = None
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            part = decode(latents[:, :, top : top + tile, left : left + tile])
            if total is None or weight is None:
                total = part.new_zeros(*part.shape[:2], height * stride, width * stride)
                weight = part.new_zeros(height * stride, width * stride)
            y, x = top * stride, left * stride
            h, w = part.shape[2:]
            fade = _ramp(h, y, height * stride, overlap * stride, part)[:, None]
            fade = fade * _ramp(w, x, width * stride, overlap * stride, part)
            total[:, :, y : y + h, x : x + w] += part * fade
            weight[y : y + h, x : x + w] += fade
    assert total is not None and weight is not None, "a latent has at least one cell"
    return total.div_(weight)


def reaches_known(decoder: Any) -> bool:
    """Whether `decode_exactly` knows every layer of this decoder."""
    try:
        layers = [layer for stage in decoder.up_blocks for layer in stage]
        _reach_of([layer for layer in layers if not _is_global(layer)] + [decoder.conv_out])
        return isinstance(decoder.conv_in, nn.Conv2d)
    except (AttributeError, TypeError, DataError):
        return False


def exact_bytes(decoder: Any, height: int, width: int, tile_area: int, stride: int) -> int:
    """Estimate of the peak of `decode_exactly` in bytes, besides weights and the picture itself.

    Whole at one time are the input and the output of one coarse layer; the rest is the work on one tile,
    whose margin counts.
    """
    layers, first_local = _split(decoder)
    channels, side = decoder.conv_in.out_channels, math.isqrt(tile_area)
    margin = margin_px(decoder, stride)
    whole = work = 0
    for layer in layers[:first_local]:
        cells = height * width // stride**2
        if _is_global(layer):
            # The inverted bottleneck, before and after its activation and its convolution.
            wide = layer.conv_out.conv_inverted.out_channels
            whole = max(whole, 2 * channels * cells)
            work = max(work, 3 * wide * (side // stride + 2) ** 2)
        else:
            coarse, scale = channels, _reach(layer)[1]
            channels, stride = _width(layer, channels), stride // scale
            whole = max(whole, coarse * cells + channels * cells * scale**2)
    whole = max(whole, channels * height * width // stride**2)
    for layer in layers[first_local:]:
        channels, stride = _width(layer, channels), stride // _reach(layer)[1]
        work = max(work, TENSORS_ALIVE * channels * ((side + 2 * margin) // stride) ** 2)
    return 4 * (whole + work) + SLACK_BYTES


def margin_px(decoder: Any, stride: int) -> int:
    """Pixels on each side of a tile that `decode_exactly` computes besides it in the finest layers."""
    layers, first_local = _split(decoder)
    for layer in layers[:first_local]:
        stride //= 1 if _is_global(layer) else _reach(layer)[1]
    return _reach_of([*layers[first_local:], decoder.conv_out])[0] * stride


def _split(decoder: Any) -> tuple[list[Any], int]:
    """The layers in order, and the number of those up to the last that sees the whole picture."""
    layers = [layer for stage in reversed(decoder.up_blocks) for layer in stage]
    return layers, 1 + max((i for i, layer in enumerate(layers) if _is_global(layer)), default=-1)


def _width(layer: Any, channels: int) -> int:
    """Channels that a layer gives."""
    if type(layer).__name__ != "DCUpBlock2d":
        return channels
    return layer.conv.out_channels // (1 if layer.interpolate else layer.factor**2)


def _is_global(layer: Any) -> bool:
    return type(layer).__name__ == "EfficientViTBlock"


def _reach(layer: Any) -> tuple[int, int]:
    """(cells of the input that an output depends on beyond its own, output cells a side of an input cell)."""
    match type(layer).__name__:
        case "Conv2d":
            return layer.kernel_size[0] // 2, 1
        case "ResBlock" if layer.norm_type in ("rms_norm", "batch_norm"):
            return layer.conv1.kernel_size[0] // 2 + layer.conv2.kernel_size[0] // 2, 1
        case "GLUMBConv":
            return layer.conv_depth.kernel_size[0] // 2, 1
        case "DCUpBlock2d":
            return layer.conv.kernel_size[0] // 2, layer.factor
    raise DataError(f"decoder: the reach of a {type(layer).__name__} is not known")


def _reach_of(layers: list[Any]) -> tuple[int, int]:
    """The same for layers in a row."""
    cells, scale = 0.0, 1
    for layer in layers:
        margin, factor = _reach(layer)
        cells += margin / scale
        scale *= factor
    return math.ceil(cells), scale


def _cells(tile_px: int, stride: int) -> int:
    return max(1, tile_px // stride)


def _in_tiles(run: Callable[[Tensor], Tensor], x: Tensor, tile: int, margin: int, scale: int) -> Tensor:
    """`run(x)`, tile by tile with a margin that is cut off; the picture's own borders stay borders."""
    out = None
    for top, bottom, left, right in _tiles(x, tile):
        y, z = max(0, top - margin), max(0, left - margin)
        part = run(x[:, :, y : bottom + margin, z : right + margin])
        part = part[:, :, (top - y) * scale : (bottom - y) * scale, (left - z) * scale : (right - z) * scale]
        if out is None:
            out = part.new_empty(*part.shape[:2], x.shape[2] * scale, x.shape[3] * scale)
        out[:, :, top * scale : bottom * scale, left * scale : right * scale] = part
    assert out is not None, "a latent has at least one cell"
    return out


def _attend(attn: Any, x: Tensor, tile: int) -> Tensor:
    """DC-AE's multi-scale attention, in two passes over the tiles.

    Per head, an output is (sum_n v_n k_n^T) q / (sum_n k_n^T q), n running over the whole picture: the sums
    are taken first. Few cells take the quadratic form, which the layer itself computes.
    """
    if x.shape[2] * x.shape[3] <= max(attn.attention_head_dim, tile * tile):
        return attn(x)
    sums = None
    for part in _tiles(x, tile):
        _, k, v = _heads(attn, x, part)
        more = nnf.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(-1, -2)
        sums = more if sums is None else sums + more
    assert sums is not None, "a latent has at least one cell"
    out = torch.empty_like(x)
    for part in _tiles(x, tile):
        top, bottom, left, right = part
        read = sums @ _heads(attn, x, part)[0]
        read = read[:, :, :-1] / (read[:, :, -1:] + attn.eps)
        read = read.to(x.dtype).reshape(x.shape[0], -1, bottom - top, right - left)
        read = attn.to_out(read.movedim(1, -1))
        read = (
            attn.norm_out(read).movedim(-1, 1)
            if attn.norm_type == "rms_norm"
            else attn.norm_out(read.movedim(-1, 1))
        )
        if attn.residual_connection:
            read = read + x[:, :, top:bottom, left:right]
        out[:, :, top:bottom, left:right] = read
    return out


def _heads(attn: Any, x: Tensor, part: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """float32 q, k, v [B, heads, head_dim, cells] of one tile, at every scale of the layer."""
    top, bottom, left, right = part
    margin = max((m.proj_in.kernel_size[0] // 2 for m in attn.to_qkv_multiscale), default=0)
    y, z = max(0, top - margin), max(0, left - margin)
    window = x[:, :, y : bottom + margin, z : right + margin].movedim(1, -1)
    qkv = torch.cat([attn.to_q(window), attn.to_k(window), attn.to_v(window)], dim=3).movedim(-1, 1)
    scales = [qkv, *(project(qkv) for project in attn.to_qkv_multiscale)]
    cut = torch.cat([s[:, :, top - y : bottom - y, left - z : right - z] for s in scales], dim=1).float()
    q, k, v = cut.reshape(x.shape[0], -1, 3 * attn.attention_head_dim, cut.shape[2] * cut.shape[3]).chunk(
        3, 2
    )
    return attn.nonlinearity(q), attn.nonlinearity(k), v


def _tiles(x: Tensor, tile: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of every tile, in cells."""
    height, width = x.shape[2:]
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            yield top, min(top + tile, height), left, min(left + tile, width)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _ramp(size: int, start: int, length: int, fade: int, like: Tensor) -> Tensor:
    """Weights of a tile's rows: 1 inside, falling towards each side that has a neighbour."""
    position = torch.arange(size, dtype=like.dtype, device=like.device) + 0.5
    weights = torch.ones_like(position)
    if fade and start > 0:
        weights = torch.minimum(weights, position / fade)
    if fade and start + size < length:
        weights = torch.minimum(weights, (size - position) / fade)
    return weights
