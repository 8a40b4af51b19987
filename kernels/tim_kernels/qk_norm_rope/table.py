"""Rotary positions: which angle every token and pair of a head turns by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tim_kernels.transfer import to_device


@dataclass(frozen=True, eq=False)
class RotaryTable:
    """Two coordinates a token, and the cosine and sine of every coordinate and frequency.

    Coordinate a turns the first half of a head, b the second, pair k of a half by coordinate * frequency[k].

    A kernel reads 8 bytes a token this way, its two coordinates; the rows that they point to, 18 KB for 128
    positions at H = 72, stay in the cache. A table with a row a token would be 288 bytes: 3 % of what q and k
    of self-attention move in the forward, 6 % of the q of cross-attention. Taking cosines in the kernel would
    read no less, and cost a range reduction for every pair of every head.

    T tokens, H head width, P positions.

    Shapes:
        cos, sin: [P, H / 4], float32 for the kernels.   positions_a, positions_b: int32 [T], below P.
    """

    cos: Tensor
    sin: Tensor
    positions_a: Tensor
    positions_b: Tensor
    _rows: list[tuple[Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)
    """`by_token`, once somebody has asked for it: the definition does, three times a block."""

    @classmethod
    def from_positions(
        cls,
        positions_a: Tensor,
        positions_b: Tensor,
        num_positions: int,
        head_dim: int,
        *,
        base: float = 10000.0,
        dtype: torch.dtype = torch.float32,
    ) -> RotaryTable:
        """Frequencies base ** (-4 k / H); angles are formed in `dtype`.

        Args:
            num_positions: above every coordinate; a number of the host, since no length is read back.
        Raises:
            ValueError: for coordinates that are not int32 [T] on one device, a head_dim that is not a
                multiple of 4, a dtype narrower than float32, or (on the CPU) a coordinate out of range.
        """
        a, b = positions_a, positions_b
        if a.ndim != 1 or a.shape != b.shape or a.device != b.device or {a.dtype, b.dtype} != {torch.int32}:
            raise ValueError(
                "rotary positions: expected two int32 [tokens] on one device, received "
                f"{a.dtype} {list(a.shape)} on {a.device} and {b.dtype} {list(b.shape)} on {b.device}"
            )
        if head_dim % 4 or head_dim < 4:
            raise ValueError(f"rotary positions: head_dim: expected a multiple of 4, received {head_dim}")
        if dtype not in (torch.float32, torch.float64):
            # bfloat16 angles are off by 0.24 rad at 128 positions.
            raise ValueError(f"rotary positions: dtype: expected float32 or float64, received {dtype}")
        if a.device.type == "cpu" and a.numel():
            low, high = int(torch.minimum(a, b).min()), int(torch.maximum(a, b).max())
            if low < 0 or high >= num_positions:
                raise ValueError(
                    f"rotary positions: expected within [0, {num_positions}), received {low} to {high}"
                )
        k = torch.arange(head_dim // 4, dtype=torch.float64)
        frequency = (base ** (-4.0 * k / head_dim)).to(dtype)
        angle = torch.arange(num_positions, dtype=torch.int32).to(dtype)[:, None] * frequency
        cos, sin = (to_device(x, a.device) for x in (angle.cos(), angle.sin()))
        return cls(cos, sin, a.contiguous(), b.contiguous())

    @property
    def num_tokens(self) -> int:
        return self.positions_a.shape[0]

    @property
    def head_dim(self) -> int:
        return 4 * self.cos.shape[1]

    def by_token(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every token and pair: [T, H / 2] each."""
        if not self._rows:
            a, b = self.positions_a, self.positions_b
            cos, sin = (
                torch.cat([x.index_select(0, a), x.index_select(0, b)], dim=1) for x in (self.cos, self.sin)
            )
            self._rows.append((cos, sin))
        return self._rows[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> RotaryTable:
        """The same table with its tensors on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("cos", "sin", "positions_a", "positions_b")
        }
        return replace(self, **moved)
