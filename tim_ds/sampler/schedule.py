"""The times at which a sampling run evaluates the network."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tim_ds.errors import RequestError


def time_grid(
    T_max: float, T_min: float, num_steps: int, dtype: Literal["float64", "bfloat16"] = "float64"
) -> Tensor:
    """Evenly spaced times from noise to data: `num_steps` transitions, hence num_steps + 1 times.

    Shapes:
        Returns float64 [num_steps + 1], from T_max down to T_min, on the CPU.
    Units:
        The transport's own time, T_max = noise, T_min = data.
    Args:
        dtype: precision that the times are rounded to; the result is float64 either way. `bfloat16` repeats
            the authors' grid, whose steps become uneven (at 250 steps between 0.98 and 1.95 times 1/250).
    Raises:
        RequestError: if there is no step, or the rounded times no longer decrease.
    """
    if num_steps < 1:
        raise RequestError(f"num_steps: expected at least 1 transition, received {num_steps}")
    if not T_min < T_max:
        raise RequestError(f"time grid: expected T_min < T_max, received T_min={T_min}, T_max={T_max}")
    times = torch.linspace(T_max, T_min, num_steps + 1, dtype=torch.float64)
    if dtype == "bfloat16":
        times = times.to(torch.bfloat16).double()
        if not bool((times[1:] < times[:-1]).all()):
            raise RequestError(
                f"num_steps: {num_steps} steps repeat a time once rounded to bfloat16; "
                f"take fewer steps or sampler.schedule_dtype: float64"
            )
    return times
