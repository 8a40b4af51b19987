"""The images of a pack on their paths from data to noise: what every part of the objective starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tim_ds.errors import ShapeError
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import TargetCoefficients, Transport
from tim_ds.packed import Condition, Segments


@dataclass(frozen=True, eq=False)
class NoisedPack:
    """Images x with noise z of their own, each at a time t and bound for r <= t.

    Conditioning times have the dtype of the times; states, targets and loss that of x (`dtype`), to which
    coefficients are rounded once.

    Shapes:
        x_TC: clean latent tokens.   z_TC: unit noise.   Both [T, C].
    """

    transport: Transport
    x_TC: Tensor
    z_TC: Tensor
    times: Times
    segments: Segments
    condition: Condition

    def check(self) -> None:
        """Do tokens, segments, times and condition fit together?

        Raises:
            ShapeError: if they do not.
        """
        x_TC, z_TC, segments = self.x_TC, self.z_TC, self.segments
        if x_TC.ndim != 2 or x_TC.shape[0] != segments.num_tokens or z_TC.shape != x_TC.shape:
            raise ShapeError(
                f"pack: expected x and z of [{segments.num_tokens}, C], received {list(x_TC.shape)} and "
                f"{list(z_TC.shape)}"
            )
        if not segments.num_segments == self.times.num_segments == self.condition.num_segments:
            raise ShapeError(
                f"pack: {segments.num_segments} segments, {self.times.num_segments} times, "
                f"{self.condition.num_segments} conditions"
            )
        if min(segments.lengths, default=0) < 1:
            raise ShapeError("pack: expected segments of at least one token each")

    @property
    def dtype(self) -> torch.dtype:
        """Of x, at least float32."""
        return torch.promote_types(self.x_TC.dtype, torch.float32)

    @cached_property
    def t_T1(self) -> Tensor:
        """The time of every token."""
        return self.segments.expand(self.times.t_S)[:, None]

    @cached_property
    def x_t_TC(self) -> Tensor:
        """The states at t."""
        return self.transport.interpolate(self.x_TC, self.z_TC, self.t_T1)

    @cached_property
    def c_t_S(self) -> Tensor:
        """c_noise(t): the conditioning time that the network is given for t."""
        return self.transport.c_noise(self.times.t_S)

    @cached_property
    def c_r_S(self) -> Tensor:
        """c_noise(r)."""
        return self.transport.c_noise(self.times.r_S)

    def diffusion_target(self) -> Tensor:
        """alpha_hat x + sigma_hat z [T, C]: the target where r = t."""
        return self.transport.diffusion_target(self.x_TC, self.z_TC, self.t_T1)

    def target_coefficients(self) -> TargetCoefficients:
        """Of Eq. 9, [S] each."""
        coefficients = self.transport.target_coefficients(self.times.t_S, self.times.r_S)
        return TargetCoefficients(*(c.to(self.dtype) for c in coefficients))

    def rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens [T'] and places [S'] of the segments `indices`, int64, on this device.

        Raises:
            ShapeError: if there is none.
        """
        if not indices:
            raise ShapeError("pack: expected at least one segment to choose, received none")
        index = torch.tensor(list(indices), dtype=torch.int64)
        return self.segments.token_index(indices), index.to(self.times.t_S.device, non_blocking=True)

    def select(self, indices: Sequence[int]) -> NoisedPack:
        """The segments `indices` as a pack of their own."""
        tokens, index = self.rows(indices)
        return NoisedPack(
            self.transport,
            self.x_TC.index_select(0, tokens),
            self.z_TC.index_select(0, tokens),
            self.times.select(indices, index),
            self.segments.select(indices),
            self.condition.select(indices),
        )

    def to(self, device: torch.device | str) -> NoisedPack:
        """The same pack on `device`."""
        return replace(
            self,
            x_TC=self.x_TC.to(device),
            z_TC=self.z_TC.to(device),
            times=self.times.to(device),
            segments=self.segments.to(device),
            condition=self.condition.to(device),
        )
