"""What is optimised: transport, time sampling, derivative, weights, extra terms. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tim_ds.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportConfig:
    """One row of the paper's Table 1, with its constants. A constant of another row is refused."""

    kind: Literal["ot_fm", "trigflow", "edm", "vp", "ve", "tim"] = "ot_fm"
    sigma_data: float | None = None
    """Standard deviation of the data, in EDM's path and every time weight. Null: 1 (trigflow, edm: 0.5)."""
    p_mean: float | None = None
    """Mean of the normal draw of logit t (ot_fm, tim), log tan t (trigflow) or log t (edm)."""
    p_std: float | None = None
    beta_min: float = 0.1
    """vp only."""
    beta_d: float = 19.9
    """vp only."""
    sigma_min: float = 0.02
    """ve only: smallest t."""
    sigma_max: float = 100.0
    """ve only: largest t."""

    def __post_init__(self) -> None:
        for name in ("sigma_data", "p_std"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"objective.transport.{name}: expected a positive number, received {value}")
        if self.kind in ("vp", "ve") and (self.p_mean is not None or self.p_std is not None):
            raise ConfigError(f"objective.transport.p_mean/p_std: {self.kind} draws t uniformly; remove them")
        if self.kind != "vp" and (self.beta_min, self.beta_d) != (0.1, 19.9):
            raise ConfigError(
                f"objective.transport.beta_min/beta_d: belong to vp, not {self.kind}; remove them"
            )
        if self.kind != "ve" and (self.sigma_min, self.sigma_max) != (0.02, 100.0):
            raise ConfigError(
                f"objective.transport.sigma_min/sigma_max: belong to ve, not {self.kind}; remove them"
            )
        if not 0 < self.sigma_min < self.sigma_max:
            raise ConfigError("objective.transport.sigma_min: expected 0 < sigma_min < sigma_max")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightConfig:
    """w(t, r) of Eqs. 11-12, and the adaptive weight that the authors' code adds."""

    time_type: Literal["constant", "reciprocal", "sqrt", "square", "soft_min_snr"] = "sqrt"
    warp: Literal["identity", "tangent", "odds"] = "tangent"
    """tau of Eq. 11: t, tan(t) (valid below pi/2) or t / (1 - t) (valid below 1)."""
    of_interval: bool = True
    """Whether the weight is a function of tau(t) - tau(r), or of tau(t) alone."""
    adaptive: bool = True
    """Divide every image's loss by a detached loss (+ 1e-5), as the authors' code does."""
    adaptive_over: Literal["image", "kind"] = "kind"
    """What the divisor is a mean over: the images of its kind, diffusion (r = t) or transition (r < t), in
    the same pack, or the image itself (the authors' code)."""

    def __post_init__(self) -> None:
        if self.adaptive_over != "kind" and not self.adaptive:
            raise ConfigError(
                f"objective.weight.adaptive_over: {self.adaptive_over} has no effect while "
                "objective.weight.adaptive is false; remove it (or override it with kind), or set adaptive"
            )


# tan(t) needs t < pi/2, t / (1 - t) needs t <= 1.
_WARP_TRANSPORTS = {"tangent": ("ot_fm", "trigflow", "vp", "tim"), "odds": ("ot_fm", "vp", "tim")}


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidedTargetConfig:
    """Guidance folded into the diffusion part of the target, from the EMA network (the authors' `_mg`)."""

    w_gt: float = 1.0
    w_cond: float = 0.75
    start: float = 0.3
    """Smallest guided t, inclusive, in the transport's time."""
    end: float = 0.8
    """Largest guided t, inclusive."""

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ConfigError(f"objective.guided_target.start: {self.start} is beyond end {self.end}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The transition objective (Eqs. 4-13).

    The defaults of shares, times, derivative and divisor were chosen together, with an exact derivative
    (`tim_ds/objective/README.md`); the authors' are 0.5, 0.1, larger, dde and image.
    """

    transport: TransportConfig = field(default_factory=TransportConfig)
    diffusion_share: float = 0.75
    """Probability that an image trains r = t (the PF-ODE target). 1.0 is plain flow matching."""
    consistency_share: float = 0.05
    """Probability that an image trains r = T_min."""
    diffusion_time: Literal["larger", "first"] = "first"
    """t of an image that trains r = t: the first of its two draws of time, which follows the transport's
    distribution itself, or the larger (the authors' code), which is rarely small."""
    derivative: Literal["dde", "paired", "jvp"] = "paired"
    """How dF/dt is found: central difference (Eq. 10), tangent carried by the main forward, forward mode."""
    derivative_step: float | None = None
    """Half-width e of the central difference (Eq. 10); null: the transport's own."""
    weight: WeightConfig = field(default_factory=WeightConfig)
    directional: bool = True
    """Adds mean(1 - cos(F, target)) to every image's loss."""
    repa_weight: float = 0.0
    """Coefficient of the feature-alignment term; needs model.z_dim and an image encoder."""
    guided_target: GuidedTargetConfig | None = None

    def __post_init__(self) -> None:
        for name in ("diffusion_share", "consistency_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"objective.{name}: expected 0 to 1, received {getattr(self, name)}")
        if self.diffusion_share + self.consistency_share > 1.0 and self.diffusion_share < 1.0:
            raise ConfigError(
                f"objective.consistency_share: diffusion_share + consistency_share exceeds 1 "
                f"({self.diffusion_share} + {self.consistency_share})"
            )
        if self.diffusion_time != "first" and self.diffusion_share == 0.0:
            raise ConfigError(
                f"objective.diffusion_time: {self.diffusion_time} has no effect, diffusion_share 0 leaves no "
                "image that trains r = t; remove it"
            )
        valid = _WARP_TRANSPORTS.get(self.weight.warp)
        if self.weight.time_type != "constant" and valid is not None and self.transport.kind not in valid:
            raise ConfigError(
                f"objective.weight.warp: {self.weight.warp} is valid on {', '.join(valid)}; "
                f"times of {self.transport.kind} go beyond its domain, use identity"
            )
        if self.derivative_step is not None and self.derivative_step <= 0:
            raise ConfigError(f"objective.derivative_step: expected above 0, received {self.derivative_step}")
        if self.repa_weight < 0:
            raise ConfigError(f"objective.repa_weight: expected 0 or more, received {self.repa_weight}")
