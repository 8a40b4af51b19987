"""Which (t, r) each image of a pack trains. Pure: random draws come in, times go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tim_ds.errors import ShapeError
from tim_ds.objective.config import ObjectiveConfig
from tim_ds.objective.transport import Transport


@dataclass(frozen=True, eq=False)
class Times:
    """Times of a pack. What a step decides on (who takes part in which network call) is host-side.

    Shapes:
        t_S, r_S: [S], float32 or float64, in the transport's units.
    Dtypes:
        conditioning times have that of t_S and r_S; states, targets and loss that of the images.
    """

    t_S: Tensor
    r_S: Tensor
    is_diffusion: tuple[bool, ...]
    """Images drawn to train r = t: their time weight is 1."""
    transition_indices: tuple[int, ...]
    """Segments with r < t, ascending: those that need dF/dt."""
    t_values: tuple[float, ...]
    """t_S on the host, as rounded to its dtype."""

    @classmethod
    def from_tensors(
        cls, transport: Transport, t_S: Tensor, r_S: Tensor, is_diffusion: tuple[bool, ...] | None = None
    ) -> Times:
        """Times given on the CPU; without `is_diffusion`, exactly the entries with r = t are.

        Raises:
            ShapeError: if the lengths differ.
            TimeDomainError: outside T_min <= r <= t <= T_max.
        """
        if t_S.ndim != 1 or t_S.shape != r_S.shape:
            raise ShapeError(
                f"times: expected t and r of one shape [S], received {list(t_S.shape)}, {list(r_S.shape)}"
            )
        transport.check_times(t_S, r_S)
        earlier: list[bool] = (r_S < t_S).tolist()
        if is_diffusion is None:
            is_diffusion = tuple(not e for e in earlier)
        if len(is_diffusion) != len(earlier):
            raise ShapeError(f"times: {len(earlier)} images, {len(is_diffusion)} entries in is_diffusion")
        return cls(t_S, r_S, is_diffusion, tuple(i for i, e in enumerate(earlier) if e), tuple(t_S.tolist()))

    @property
    def num_segments(self) -> int:
        return len(self.is_diffusion)

    def select(self, indices: Sequence[int], index: Tensor) -> Times:
        """The times of the segments `indices`; `index` is the same, int64 on this device."""
        moving = frozenset(self.transition_indices)
        return Times(
            self.t_S.index_select(0, index),
            self.r_S.index_select(0, index),
            tuple(self.is_diffusion[i] for i in indices),
            tuple(place for place, i in enumerate(indices) if i in moving),
            tuple(self.t_values[i] for i in indices),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Times:
        """The same times with their tensors on `device`."""
        return replace(
            self,
            t_S=self.t_S.to(device, non_blocking=non_blocking),
            r_S=self.r_S.to(device, non_blocking=non_blocking),
        )


def draw_times(
    transport: Transport,
    config: ObjectiveConfig,
    normals_S2: Tensor,
    uniforms_S3: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> Times:
    """(t, r) of every image from that image's own draws.

    t is the larger and r the smaller of two draws of the transport's time distribution. The third uniform
    decides the image's kind: with probability `diffusion_share` r = t, with `consistency_share` r = T_min,
    otherwise r stays. With `diffusion_time: first`, an image that trains r = t has the first draw for t. The
    kind is drawn per image, so no position of a batch is special and the shares hold for any batch size.
    Differs from reference: it gives the first round(share B) positions of a batch to diffusion.

    Shapes:
        normals_S2: float64 [S, 2], standard normal.   uniforms_S3: float64 [S, 3] in [0, 1).   Both on the
        CPU.
    Args:
        dtype: of the times, in which the network is also told them: float64 for one that takes them so, as
            `TiM` does. float32 knows VP's conditioning time, 999 t, to 3e-5, and a derivative no better.
    Raises:
        ShapeError: for other shapes.
    """
    num_segments = normals_S2.shape[0]
    if normals_S2.shape != (num_segments, 2) or uniforms_S3.shape != (num_segments, 3):
        raise ShapeError(
            f"draws: expected normals [S, 2] and uniforms [S, 3], received {list(normals_S2.shape)}, "
            f"{list(uniforms_S3.shape)}"
        )
    drawn_S2 = transport.draw_t(normals_S2, uniforms_S3[:, :2])
    t_S, r_S = drawn_S2.amax(1), drawn_S2.amin(1)
    kind_S = uniforms_S3[:, 2]
    diffusion_S = kind_S < config.diffusion_share
    consistency_S = ~diffusion_S & (kind_S < config.diffusion_share + config.consistency_share)
    if config.diffusion_time == "first":
        t_S = torch.where(diffusion_S, drawn_S2[:, 0], t_S)
    r_S = torch.where(diffusion_S, t_S, r_S)
    r_S = torch.where(consistency_S, torch.full_like(r_S, transport.T_min), r_S)
    return Times.from_tensors(transport, t_S.to(dtype), r_S.to(dtype), tuple(diffusion_S.tolist()))
