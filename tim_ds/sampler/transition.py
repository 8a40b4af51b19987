"""The sampling loop: from noise to data in any number of transitions.

Letters used in shapes: T image tokens of the pack, C channels of a token, S images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tim_ds.errors import NonFiniteError, RequestError, ShapeError
from tim_ds.objective.transport import Transport
from tim_ds.packed import Condition, Network, Segments, concatenate
from tim_ds.sampler import guidance, rng
from tim_ds.sampler.config import SamplerConfig
from tim_ds.sampler.schedule import time_grid

OnStep = Callable[[int, float, Tensor], None]
"""Called after every step with (steps done, time reached, state x_TC in float64)."""


@dataclass(frozen=True, eq=False)
class SampleResult:
    """What a sampling run leaves.

    Shapes:
        x_TC: float32 [T, C], clean latents: the last state over alpha(T_min), which is 1 but for EDM, whose
            path ends at x / sigma_data, and VP. trajectory: float32 [num_steps, T, C], state after each step.
    """

    x_TC: Tensor
    nfe: int
    """Evaluations of F a picture: a guided step counts 2, though both ride in one call."""
    trajectory: Tensor | None


@torch.no_grad()
def sample(
    network: Network,
    transport: Transport,
    z_TC: Tensor,
    segments: Segments,
    condition: Condition,
    config: SamplerConfig,
    *,
    null_condition: Condition | None = None,
    seeds: Sequence[int] | None = None,
    noise: Iterator[Tensor] | None = None,
    on_step: OnStep | None = None,
    keep_trajectory: bool = False,
) -> SampleResult:
    """Take every image of a pack from T_max to T_min.

    Per step from t to r: F = network(x_t, c_noise(t), c_noise(r)), x_r = transport.step(x_t, t, r, F). In
    mode `diffusion` the network is told r = t while the state still moves to r. State and times are float64;
    the network sees the state in the dtype of `z_TC`. The state starts at sigma(T_max) z, which is z but for
    VE's 100 z. Differs from reference: it starts every transport at z, which is not VE's distribution at
    T_max.

    Shapes:
        z_TC: [T, C] unit noise (`rng.initial_noise`), on the network's device.
    Args:
        null_condition: empty captions or null labels, needed when config.cfg_scale is not 1.
        seeds: one an image, those of its initial noise; needed when config.stochasticity is not 0.
        noise: fresh noise [T, C] for each stochastic step, instead of what `seeds` would give.
        on_step: observer; it must not change the state.
        keep_trajectory: keep the state after each step.
    Raises:
        RequestError: if the transport defines no stochastic step, or guidance has no null condition.
        ShapeError: if the parts of the pack do not fit together.
        NonFiniteError: if a state stops being finite; the message names the images and the step.
    """
    times = time_grid(transport.T_max, transport.T_min, config.num_steps, config.schedule_dtype)
    _check_pack(z_TC, segments, condition, null_condition)
    evaluator = _Evaluator(network, transport, segments, condition, null_condition, config, z_TC)
    noise = _noise_source(transport, segments, config, z_TC.shape[1], seeds, noise)

    host_times = times.tolist()
    times = times.to(z_TC.device)
    x_TC = transport.sigma(times[0]) * z_TC.double()
    _check_finite(x_TC, segments, "in the initial noise")
    states: list[Tensor] = []
    nfe = 0
    for i, (t_value, r_value) in enumerate(itertools.pairwise(host_times)):
        t, r = times[i], times[i + 1]
        F_TC, evaluations = evaluator(x_TC, t, t if config.mode == "diffusion" else r, t_value)
        nfe += evaluations
        is_inner = i > 0 and r_value > transport.T_min
        if noise is not None and is_inner:
            fresh = next(noise).to(x_TC.device, torch.float64)
            x_TC = transport.stochastic_step(x_TC, t, r, F_TC, fresh, config.stochasticity)
        else:
            x_TC = transport.step(x_TC, t, r, F_TC)
        _check_finite(
            x_TC, segments, f"after step {i + 1} of {config.num_steps} (t={t_value:.6g} to r={r_value:.6g})"
        )
        if keep_trajectory:
            states.append(x_TC.float())
        if on_step is not None:
            on_step(i + 1, r_value, x_TC)
    clean_TC = x_TC / transport.alpha(times[-1])
    return SampleResult(clean_TC.float(), nfe, torch.stack(states) if keep_trajectory else None)


class _Evaluator:
    """F at a state, guided where the configuration says so, then with both halves in one call."""

    def __init__(
        self,
        network: Network,
        transport: Transport,
        segments: Segments,
        condition: Condition,
        null_condition: Condition | None,
        config: SamplerConfig,
        z_TC: Tensor,
    ) -> None:
        self.network, self.transport, self.config = network, transport, config
        self.segments, self.condition = segments, condition
        self.dtype = z_TC.dtype
        self.time_dtype = torch.promote_types(z_TC.dtype, torch.float32)
        if config.cfg_scale == 1.0:
            return
        if null_condition is None:
            raise RequestError(
                f"sampler.cfg_scale: {config.cfg_scale} needs a null condition (empty captions or null "
                f"labels); pass null_condition, or set cfg_scale to 1"
            )
        twice = [*range(segments.num_segments)] * 2
        self.paired_segments = segments.select(twice)
        self.paired_condition = concatenate([condition, null_condition])

    def __call__(self, x_TC: Tensor, t: Tensor, r: Tensor, t_value: float) -> tuple[Tensor, int]:
        """(F [T, C] in float64, evaluations a picture)."""
        x = x_TC.to(self.dtype)
        if not guidance.is_guided(t_value, self.config, self.transport.T_max):
            return self._call(x, t, r, self.segments, self.condition), 1
        F_TC = self._call(torch.cat([x, x]), t, r, self.paired_segments, self.paired_condition)
        F_c, F_u = F_TC.chunk(2)
        return guidance.combine(F_c, F_u, self.config.cfg_scale), 2

    def _call(self, x_TC: Tensor, t: Tensor, r: Tensor, segments: Segments, condition: Condition) -> Tensor:
        c_t, c_r = (
            self.transport.c_noise(s).to(self.time_dtype).expand(segments.num_segments) for s in (t, r)
        )
        return self.network(x_TC, c_t, c_r, segments, condition).F_TC.double()


def _check_pack(z_TC: Tensor, segments: Segments, condition: Condition, null: Condition | None) -> None:
    if z_TC.ndim != 2 or z_TC.shape[0] != segments.num_tokens:
        raise ShapeError(f"z_TC: expected [{segments.num_tokens}, C], received {list(z_TC.shape)}")
    for name, part in (("condition", condition), ("null_condition", null)):
        if part is not None and part.num_segments != segments.num_segments:
            raise ShapeError(
                f"{name}: expected one for each of {segments.num_segments} images, "
                f"received {part.num_segments}"
            )
    if null is not None and type(null) is not type(condition):
        raise ShapeError(
            f"null_condition: expected {type(condition).__name__} like the condition, "
            f"received {type(null).__name__}"
        )


def _noise_source(
    transport: Transport,
    segments: Segments,
    config: SamplerConfig,
    channels: int,
    seeds: Sequence[int] | None,
    noise: Iterator[Tensor] | None,
) -> Iterator[Tensor] | None:
    """Where the inner steps' noise comes from; None for a deterministic run."""
    if config.stochasticity == 0.0:
        return None
    if transport.stochastic_rate is None:
        raise RequestError(
            f"sampler.stochasticity: transport {transport.name} has no stochastic step (ot_fm and tim have), "
            f"received {config.stochasticity}; set it to 0"
        )
    if noise is not None:
        return noise
    if seeds is None or segments.grids is None:
        raise RequestError("sampler.stochasticity: needs the seed of every image; pass seeds")
    return rng.step_noise(segments.grids, channels, seeds)


def _check_finite(x_TC: Tensor, segments: Segments, where: str) -> None:
    if bool(torch.isfinite(x_TC).all()):
        return
    bad = [i for i, part in enumerate(segments.split(x_TC)) if not bool(torch.isfinite(part).all())]
    raise NonFiniteError(
        f"sampling: images {bad} of {segments.num_segments} are not finite {where}; "
        f"check the weights and, for large guidance, the scale"
    )
