"""How pictures are sampled. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tim_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """Settings of one sampling run."""

    num_steps: int = 8
    """Transitions from T_max to T_min."""
    mode: Literal["transition", "diffusion"] = "transition"
    """`transition`: the network is told where the step ends; `diffusion`: r = t, as an ODE solver would."""
    cfg_scale: float = 1.0
    """F_u + cfg_scale (F_c - F_u); 1 is unguided and costs one evaluation."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Guided steps have low <= t / T_max <= high (see cfg_upper)."""
    cfg_upper: Literal["inclusive", "exclusive"] = "inclusive"
    """`exclusive` repeats the authors' strict bounds: by default the first step is then never guided."""
    stochasticity: float = 0.0
    """Share of fresh noise in inner steps; only ot_fm and tim define it."""
    schedule_dtype: Literal["float64", "bfloat16"] = "float64"
    """`bfloat16` repeats the authors' rounding of the time grid."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ConfigError(f"sampler.num_steps: expected at least 1, received {self.num_steps}")
        low, high = self.cfg_interval
        if low > high:
            raise ConfigError(f"sampler.cfg_interval: low {low} is beyond high {high}")
        if low > 1 or high < 0:
            raise ConfigError(
                f"sampler.cfg_interval: expected shares of T_max that meet 0 to 1, received {[low, high]}, "
                "by which no step is guided"
            )
        # A request may hold what a file cannot: inf, nan.
        for name in ("cfg_scale", "stochasticity"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"sampler.{name}: expected 0 or more, received {getattr(self, name)}")
