"""Everything that a network golden records, computed by this project's code.

The network runs in float32 like the goldens', except where a central difference divides its rounding by 0.01
(the derivative, the target and what follows from them). There it runs in float64 on the float32 states and
times (`_Wide`), so that the comparison sees the goldens' rounding alone and comes out the same on every
machine.

Conventions of the goldens: the first `n_diffusion` images of a batch have r = t, the derivative is taken of
all others, all images share one grid, and captions keep their padding.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.parity.compare import Report
from tests.parity.golden import GoldenFile, Layout, build_network, transport_config
from tim_ds.errors import ConfigError
from tim_ds.model import embed, ops
from tim_ds.model.tim import TiM
from tim_ds.objective import target
from tim_ds.objective.config import GuidedTargetConfig, ObjectiveConfig, WeightConfig
from tim_ds.objective.derivative import central_difference, forward_mode
from tim_ds.objective.loss import LossTerms, transition_loss
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.target import transition_target
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import VP, Transport, build_transport
from tim_ds.objective.weighting import time_weight
from tim_ds.packed import Condition, Direction, Network, NetworkOutput, Segments, TextCondition
from tim_ds.sampler.config import SamplerConfig
from tim_ds.sampler.transition import sample

# Tolerances of tests/golden/README.md. EDM and VE reach t = 80 and 100, where a float32 time is coarse
# against the step of the central difference.
FORWARD = 1e-5
DDE, DDE_COARSE = 3e-4, 2e-3
TARGET, TARGET_COARSE = 3e-4, 3e-3
DENOISING, DENOISING_COARSE = 3e-5, 5e-4
GRADIENT = 1e-4
GUIDED = 3e-4
TRACE = 1e-3
COARSE = ("edm", "ve")
# VP's loss is compared twice. With two float32 roundings of the reference, for which the README's 3e-5 has no
# room, in place of ours, it is within 3e-5: the central difference at e = 1e-4 (off by up to 4.1e-5 of the
# target) and beta_t - beta_r, whose beta_r cancels near r = 0 (up to 3.1e-5 of the target; the loss is a
# square). With ours, which keep these digits, it is within:
DENOISING_VP_OURS = 3e-4
# Not in the README: a few float32 operations on equal inputs; a time weight near r = t is a difference of
# tangents.
ELEMENTWISE = 1e-6
WEIGHT = 1e-5

REFERENCE_BUG = "a known bug of the reference for sigma_data != 1 (tests/golden/README.md)"
_TRUSTED_OF_BUG = ("t", "r", "c_t", "c_r", "x_t", "v_t", "F", "dde", "jvp")

TIME_TYPES = {
    "constant": "constant",
    "reciprocal": "reciprocal",
    "sqrt": "sqrt",
    "square": "square",
    "Soft-Min-SNR": "soft_min_snr",
}
WARPS = {"none": "identity", "tangent": "tangent", "sigmoid": "odds"}

_ACTIVATIONS = {
    "x_embed": "x_embedder",
    "y_embed": "y_embedder",
    r"block(\d+)_adaln": r"blocks.\1.adaLN_modulation",
    r"block(\d+)_attn": r"blocks.\1.attn",
    r"block(\d+)_cross_attn": r"blocks.\1.cross_attn",
    r"block(\d+)_mlp": r"blocks.\1.mlp",
    r"block(\d+)_out": r"blocks.\1",
}
"""Recorded name to the module whose output it is."""


def compare_network(golden: GoldenFile) -> Report:
    """Compare every tensor of a network golden."""
    case = _Case(golden)
    case.forward()
    with mock.patch.object(target, "build_derivative", lambda config: _reference_difference):
        for name in golden.description["transports"]:
            case.transport(name)
        case.guided_target()
        case.trace()
    case.time_weights()
    for name in golden.description["sampling"]:
        case.sampling_run(name)
    return case.report.close()


class _Case:
    def __init__(self, golden: GoldenFile) -> None:
        self.golden, self.about, self.tensors = golden, golden.description, golden.tensors
        self.report = Report(golden.path.name, golden.tensors)
        self.network = build_network(golden)
        self.wide = _Wide(self.network)
        self.model = self.network.config
        self.layout = Layout(self.model, *self.about["latent_hw"])
        self.images: int = self.about["batch"]
        self.num_diffusion: int = self.about["n_diffusion"]
        self.segments = self.layout.segments(self.images)
        self.report.use("in/x", "in/z", "in/y", "in/y_null", "in/h_target")
        self.x_TC, self.z_TC = self.layout.pack(self.tensors["in/x"]), self.layout.pack(self.tensors["in/z"])
        self.condition = self.layout.condition(self.tensors["in/y"])
        self.null_condition = self.layout.condition(self.tensors["in/y_null"])
        features = self.tensors.get("in/h_target")
        self.features_TZ = None if features is None else features.flatten(0, 1)
        parameters = sum(p.numel() for p in self.network.parameters())
        self.report.check("num_params", parameters, self.about["num_params"])

    # ---- the network alone

    def forward(self) -> None:
        """fwd/*, act/*, rope/*."""
        report = self.report
        report.use("fwd/t", "fwd/r")
        t_S, r_S = self.tensors["fwd/t"], self.tensors["fwd/r"]
        x_t_TC = build_transport(transport_config({"cls": "OT_FM", "ctor": {}})).interpolate(
            self.x_TC, self.z_TC, self.segments.expand(t_S)[:, None]
        )
        report.compare("fwd/x_t", self.layout.unpack(x_t_TC), ELEMENTWISE, family="fwd/x_t")
        recorded = [name for name in self.tensors if name.startswith("act/")]
        with torch.no_grad(), _Recorder(self.network) as recorder:
            output = self.network(
                self.layout.pack(self.tensors["fwd/x_t"]),
                t_S,
                r_S,
                self.segments,
                self.condition,
                with_features=self.model.z_dim is not None,
            )
        report.compare("fwd/F", self.layout.unpack(output.F_TC), FORWARD, family="fwd/F")
        if output.features_TZ is not None:
            features = output.features_TZ.unflatten(0, (self.images, -1))
            report.compare("fwd/h_proj", features, FORWARD, family="fwd/h_proj")
        for name in recorded:
            value = self._activation(name.removeprefix("act/"), recorder, t_S, r_S)
            if value is not None:
                # A golden keeps the batch axis that packed tokens have not, or an axis of one token.
                report.compare(name, value.reshape(self._batched(name, value)), FORWARD)
        one = self.layout.segments(1)
        table = ops.rotary_table(one, self.model.head_dim, self.model.rope_layout, torch.float32)
        cos, sin = table.by_token()
        report.compare("rope/cos", cos.repeat_interleave(2, dim=1), ELEMENTWISE)
        report.compare("rope/sin", sin.repeat_interleave(2, dim=1), ELEMENTWISE)

    def _activation(self, name: str, recorder: _Recorder, t_S: Tensor, r_S: Tensor) -> Tensor | None:
        if name == "t_embed":
            return recorder.output("t_embedder", t_S)
        if name == "delta_embed":
            return self._interval_embedding(recorder, t_S, r_S)
        for pattern, module in _ACTIVATIONS.items():
            match = re.fullmatch(pattern, name)
            if match:
                return recorder.output(match.expand(module))
        return None

    def _interval_embedding(self, recorder: _Recorder, t_S: Tensor, r_S: Tensor) -> Tensor | None:
        """The sum that `time_condition` names: its last time by the interval embedder, others by t's."""
        given = {"t": t_S, "r": r_S, "t-r": t_S - r_S}
        *others, last = self.model.time_condition.split(",")
        last_module = "delta_embedder" if self.model.separate_interval_embedder else "t_embedder"
        parts = [recorder.output(last_module, given[last])]
        parts += [recorder.output("t_embedder", given[time]) for time in others]
        found = [part for part in parts if part is not None]
        return sum(found[1:], found[0]) if len(found) == len(parts) else None

    def _batched(self, name: str, value: Tensor) -> tuple[int, ...]:
        """The golden's shape where only the batch axes differ from ours, else ours (which then fails)."""
        shape = tuple(self.tensors[name].shape)
        same = shape[0] == self.images and shape[-1] == value.shape[-1] and value.numel() == _size(shape)
        return shape if same else tuple(value.shape)

    # ---- transports: state, derivative, target, step, loss, gradient

    def transport(self, name: str) -> None:
        """tr/T/*, loss/T/*, grad/T/*."""
        entry, report = self.about["transports"][name], self.report
        transport = self._transport(name)
        coarse = transport.name in COARSE
        forward = FORWARD
        prefix = f"tr/{name}"
        if name.endswith("_refbug"):
            untrusted = [
                tensor
                for tensor in self.tensors
                if tensor.startswith((f"{prefix}/", f"loss/{name}/", f"grad/{name}/"))
                and tensor not in [f"{prefix}/{key}" for key in _TRUSTED_OF_BUG]
            ]
            report.skip(untrusted, REFERENCE_BUG)
        for key in ("T_max", "T_min"):
            report.check(f"{name}/{key}", getattr(transport, key), entry[key])
        report.check(f"{name}/sigma_d", transport.sigma_data, entry["sigma_d"])
        if f"{prefix}/t" not in self.tensors:
            return
        report.use(f"{prefix}/t", f"{prefix}/r")
        times = self._times(name)
        pack = self._noised(transport, times)
        t_T1, r_T1 = pack.t_T1, self.segments.expand(times.r_S)[:, None]
        c_t, c_r, x_t_TC = pack.c_t_S, pack.c_r_S, pack.x_t_TC
        report.compare(f"{prefix}/c_t", c_t, ELEMENTWISE, family="tr/c_noise")
        report.compare(f"{prefix}/c_r", c_r, ELEMENTWISE, family="tr/c_noise")
        velocity_TC = transport.velocity(self.x_TC, self.z_TC, t_T1)
        self._compare_latent(f"{prefix}/x_t", x_t_TC, ELEMENTWISE)
        self._compare_latent(f"{prefix}/v_t", velocity_TC, ELEMENTWISE)
        with torch.no_grad():
            F_TC = self.network(x_t_TC, c_t, c_r, self.segments, self.condition).F_TC
        self._compare_latent(f"{prefix}/F", F_TC, forward)
        self._compare_latent(f"{prefix}/x_r", transport.step(x_t_TC, t_T1, r_T1, F_TC), forward)

        for key, network, estimate, tolerance in (
            ("dde", self.wide, _reference_difference, DDE_COARSE if coarse else DDE),
            ("jvp", self.network, forward_mode, forward),
        ):
            derivative_TC = torch.zeros_like(x_t_TC)
            if times.transition_indices:
                derivative_TC[self.segments.token_index(times.transition_indices)] = estimate(
                    network, pack, times.transition_indices, entry["differential_epsilon"]
                )
            self._compare_latent(f"{prefix}/{key}", derivative_TC, tolerance)

        try:
            config = self._objective(name, directional=False)
        except ConfigError as error:
            if "objective.weight.warp" not in str(error):
                # Anything else that we refuse is a difference from the authors, not a reason to look away.
                raise
            made = (f"{prefix}/target", f"loss/{name}/", f"grad/{name}/")
            report.skip([tensor for tensor in self.tensors if tensor.startswith(made)], f"refused: {error}")
            return
        target_TC = transition_target(self.wide, config, pack)
        self._compare_latent(f"{prefix}/target", target_TC, TARGET_COARSE if coarse else TARGET)
        self._losses(name, transport, times, coarse)

    def _losses(self, name: str, transport: Transport, times: Times, coarse: bool) -> None:
        report = self.report
        for variant in ("dir", "nodir"):
            prefix = f"loss/{name}/{variant}"
            config = self._objective(name, directional=variant == "dir")
            terms = self._loss(self.wide, config, transport, times)
            per_image = terms.denoising_S + terms.directional_S
            tensor = f"{prefix}/per_sample_denoising"
            tolerance = DENOISING_COARSE if coarse else DENOISING
            if transport.name == "vp":
                family = "loss/per_sample, vp of ours"
                report.compare(tensor, per_image, DENOISING_VP_OURS, family=family)
                rounded = self._loss_with_reference_rounding(name, config, times)
                per_image = rounded.denoising_S + rounded.directional_S
            report.compare(tensor, per_image, tolerance, family="loss/per_sample_denoising")
            report.compare(f"{prefix}/time_weight", terms.weight_S, WEIGHT, family="loss/time_weight")
            weighted, projection = _scalars(terms)
            # Weighting by 1 / L makes this nearly mean(w), whatever the loss.
            report.compare(f"{prefix}/weighted", weighted, DENOISING, family="loss/weighted")
            report.compare(f"{prefix}/proj", projection, FORWARD, family="loss/proj")
            if variant == "dir" and f"grad/{name}/global_norm" in self.tensors:
                self._gradients(name, terms)

    def _loss_with_reference_rounding(self, name: str, config: ObjectiveConfig, times: Times) -> LossTerms:
        """VP's loss, given the golden's central difference and the reference's coefficient."""
        dF_dt_TC = self.layout.pack(self.tensors[f"tr/{name}/dde"])
        carried = replace(config, derivative="paired", derivative_step=None)
        return self._loss(_Recalling(self.wide, dF_dt_TC), carried, _ReferenceVP(), times)

    def _gradients(self, name: str, terms: LossTerms) -> None:
        report = self.report
        parameters = dict(self.wide.network.named_parameters())
        gradients = torch.autograd.grad(
            terms.total_S.mean(), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        by_name = dict(zip(parameters, gradients, strict=True))
        order = self.about["grad_param_order"]
        norms = torch.stack([by_name[parameter].norm() for parameter in order])
        total = norms.norm()
        report.compare(f"grad/{name}/norms", norms, GRADIENT, family="grad/norms")
        report.compare(f"grad/{name}/global_norm", total, GRADIENT, family="grad/norms")
        for parameter, gradient in by_name.items():
            # A shift of all keys of cross-attention cancels in the softmax: the gradient is rounding alone.
            scale = total.item() if parameter.endswith("cross_attn.k_norm.bias") else None
            report.compare(
                f"grad/{name}/p/{parameter}", gradient, GRADIENT, family="grad/parameters", scale=scale
            )

    # ---- guidance in the target, time weights

    def guided_target(self) -> None:
        """mg/*."""
        if "mg/target" not in self.tensors:
            return
        report, name = self.report, "ot_fm"
        transport, times = self._transport(name), self._times(name)
        mg = self.about["mg"]
        teacher = _Wide(self.network)
        with torch.no_grad():
            for parameter in teacher.network.parameters():
                parameter.mul_(self.about["ema_scale"])
        pack = self._noised(transport, times)
        for key, condition in (("F_cond", self.condition), ("F_uncond", self.null_condition)):
            with torch.no_grad():
                F_TC = teacher(pack.x_t_TC, pack.c_t_S, pack.c_t_S, self.segments, condition).F_TC
            report.compare(f"mg/{key}", self.layout.unpack(F_TC), GUIDED)
        guided = GuidedTargetConfig(
            w_gt=mg["w_gt"], w_cond=mg["w_cond"], start=mg["w_start"], end=mg["w_end"]
        )
        config = self._objective(name, directional=True, guided_target=guided)
        target_TC = transition_target(
            self.wide, config, pack, teacher=teacher, null_condition=self.null_condition
        )
        report.compare("mg/target", self.layout.unpack(target_TC), GUIDED)
        terms = self._loss(self.wide, config, transport, times, teacher=teacher)
        weighted, projection = _scalars(terms)
        report.compare("mg/weighted", weighted, GUIDED)
        report.compare("mg/proj", projection, GUIDED)
        report.compare("mg/denoising", (terms.denoising_S + terms.directional_S).mean(), GUIDED)

    def time_weights(self) -> None:
        """tw/*."""
        times = self._times("ot_fm")
        is_diffusion_S = torch.tensor(times.is_diffusion)
        for time_type, ours in TIME_TYPES.items():
            for warp, our_warp in WARPS.items():
                for variant in ("t_minus_r", "t"):
                    config = WeightConfig(
                        time_type=ours,  # type: ignore[arg-type]  # the table holds names of WeightConfig
                        warp=our_warp,  # type: ignore[arg-type]
                        of_interval=variant == "t_minus_r",
                    )
                    weight_S = time_weight(config, times.t_S, times.r_S, is_diffusion_S, 1.0)
                    self.report.compare(f"tw/{time_type}/{warp}/{variant}", weight_S, WEIGHT)

    # ---- sampling

    def sampling_run(self, name: str) -> None:
        """samp/RUN."""
        tensor = f"samp/{name}"
        if tensor not in self.tensors:
            return
        run = self.about["sampling"][name]
        self.report.use("samp/z", "samp/y", "samp/y_null", f"{tensor}/noise")
        if run["transport"].endswith("_refbug"):
            self.report.skip([tensor], REFERENCE_BUG)
            return
        transport = self._transport(run["transport"])
        transport.T_max, transport.T_min = float(run["T_max"]), float(run["T_min"])
        scale = run.get("cfg_scale", 1.0)
        config = SamplerConfig(
            num_steps=run["num_steps"],
            mode="diffusion" if run.get("sample_type") == "ddiffusion" else "transition",
            # The reference guides for scales above 1 alone.
            cfg_scale=max(1.0, scale),
            cfg_interval=(run.get("cfg_low", 0.0), run.get("cfg_high", 1.0)),
            cfg_upper="exclusive",
            stochasticity=run.get("stochasticity_ratio", 0.0),
        )
        z = self.tensors["samp/z"]
        noise = self.tensors.get(f"{tensor}/noise")
        # The reference starts every transport from unit noise, the sampling loop from sigma(T_max) times it.
        start = transport.sigma(torch.tensor(transport.T_max, dtype=torch.float64)).item()
        result = sample(
            self.network,
            transport,
            self.layout.pack(z) / start,
            self.layout.segments(z.shape[0]),
            self.layout.condition(self.tensors["samp/y"]),
            config,
            null_condition=self.layout.condition(self.tensors["samp/y_null"]),
            noise=None if noise is None else iter([self.layout.pack(n) for n in noise]),
            keep_trajectory=True,
        )
        assert result.trajectory is not None, "asked for"
        states = torch.stack([self.layout.unpack(state) for state in result.trajectory])
        self.report.compare(tensor, states, FORWARD)

    # ---- four optimiser steps

    def trace(self) -> None:
        """trace/*."""
        if "trace" not in self.about:
            return
        settings, report, name = self.about["trace"], self.report, "ot_fm"
        transport, times = self._transport(name), self._times(name)
        config = self._objective(name, directional=True)
        wide = _Wide(self.network)
        network, average = wide.network, copy.deepcopy(wide.network)
        optimiser = torch.optim.AdamW(
            network.parameters(),
            lr=settings["lr"],
            betas=tuple(settings["betas"]),
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
        )
        rows = []
        for _ in range(settings["steps"]):
            terms = self._loss(wide, config, transport, times)
            weighted, projection = _scalars(terms)
            optimiser.zero_grad()
            terms.total_S.mean().backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), settings["max_grad_norm"])
            optimiser.step()
            with torch.no_grad():
                for ema, parameter in zip(average.parameters(), network.parameters(), strict=True):
                    ema.lerp_(parameter, 1 - settings["ema_decay"])
            denoising = (terms.denoising_S + terms.directional_S).mean()
            row = (weighted, projection, denoising, norm)
            rows.append(torch.stack([value.detach().double() for value in row]))
        table = torch.stack(rows)
        report.compare("trace/weighted_proj_denoising_gradnorm", table, TRACE, family="trace/rows")
        for key, trained in (("final", network), ("ema", average)):
            for parameter, value in trained.named_parameters():
                report.compare(f"trace/{key}/{parameter}", value, TRACE, family="trace/parameters")

    # ---- parts

    def _transport(self, name: str) -> Transport:
        transport = build_transport(transport_config(self.about["transports"][name]))
        # The reference takes its full step next to a singular time, too.
        transport.singular_time = None
        return transport

    def _noised(self, transport: Transport, times: Times) -> NoisedPack:
        return NoisedPack(transport, self.x_TC, self.z_TC, times, self.segments, self.condition)

    def _times(self, name: str) -> Times:
        """The golden's times and positional kinds; unlike ours they are not clamped to [T_min, T_max]."""
        t_S, r_S = self.tensors[f"tr/{name}/t"], self.tensors[f"tr/{name}/r"]
        kinds = tuple(i < self.num_diffusion for i in range(self.images))
        others = tuple(range(self.num_diffusion, self.images))
        return Times(t_S, r_S, kinds, others, tuple(t_S.tolist()))

    def _objective(self, name: str, *, directional: bool, guided_target: Any = None) -> ObjectiveConfig:
        entry = self.about["transports"][name]
        schedule = entry["schedule"]
        warp = "identity"
        if schedule.get("weight_time_tangent"):
            warp = "tangent"
        elif schedule.get("weight_time_sigmoid"):
            warp = "odds"
        return ObjectiveConfig(
            transport=transport_config(entry),
            derivative="dde",
            derivative_step=entry["differential_epsilon"],
            weight=WeightConfig(
                time_type=TIME_TYPES[schedule["weight_time_type"]],  # type: ignore[arg-type]
                warp=warp,
                of_interval=schedule.get("weight_t_and_r", True),
                adaptive_over="image",
            ),
            directional=directional,
            repa_weight=self.about["proj_coeff"] if self.features_TZ is not None else 0.0,
            guided_target=guided_target,
        )

    def _loss(
        self,
        network: Network,
        config: ObjectiveConfig,
        transport: Transport,
        times: Times,
        *,
        teacher: Network | None = None,
    ) -> LossTerms:
        return transition_loss(
            network,
            transport,
            config,
            self.x_TC,
            self.z_TC,
            times,
            self.segments,
            self.condition,
            latent_channels=self.model.in_channels,
            teacher=teacher,
            null_condition=self.null_condition,
            features_TZ=self.features_TZ,
        )

    def _compare_latent(self, tensor: str, value_TC: Tensor, tolerance: float) -> None:
        self.report.compare(
            tensor, self.layout.unpack(value_TC), tolerance, family=f"tr/{tensor.rsplit('/', 1)[1]}"
        )


class _Wide:
    """A float64 copy of a network on float32 states and times, its time features rounded like theirs."""

    def __init__(self, network: TiM) -> None:
        self.network = copy.deepcopy(network).double()

    def __call__(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
    ) -> NetworkOutput:
        if isinstance(condition, TextCondition):
            condition = replace(condition, states_LE=condition.states_LE.double())
        narrow = embed.time_features
        # t - r is rounded to float32 here, as it is when both are float32.
        with mock.patch.object(embed, "time_features", lambda s_S: narrow(s_S.float()).double()):
            return self.network(
                x_TC.double(), t_S.double(), r_S.double(), segments, condition, with_features=with_features
            )


class _ReferenceVP(VP):
    """VP whose B / dB is computed as the reference does, in float32: beta_r near r = 0 cancels."""

    def B_over_dB(self, t: Tensor, r: Tensor) -> Tensor:
        t_32, r_32 = t.float(), r.float()
        beta_t, beta_r = (torch.sqrt(torch.exp(self._q(s)) - 1) for s in (t_32, r_32))
        slope = 0.5 * self._d_q(t_32) * (beta_t + 1 / beta_t)
        return ((beta_t - beta_r) / slope).to(t.dtype)


class _Recalling:
    """A network that answers a direction with a derivative known beforehand."""

    def __init__(self, network: Network, dF_dt_TC: Tensor) -> None:
        self.network = network
        self.dF_dt_TC = dF_dt_TC

    def __call__(
        self,
        x_TC: Tensor,
        t_S: Tensor,
        r_S: Tensor,
        segments: Segments,
        condition: Condition,
        *,
        with_features: bool = False,
        direction: Direction | None = None,
    ) -> NetworkOutput:
        output = self.network(x_TC, t_S, r_S, segments, condition, with_features=with_features)
        if direction is None:
            return output
        return output._replace(dF_TC=self.dF_dt_TC[segments.token_index(direction.indices)])


def _reference_difference(
    network: Network, pack: NoisedPack, indices: Sequence[int], step: float | None
) -> Tensor:
    """The project's central difference, divided as the reference divides it: by 2e.

    The project divides by the distance that the rounded times have, which is 2e only up to 3e-4 of it in
    float32 (VP, e = 1e-4): more than the goldens' tolerance.
    """
    derivative_TC = central_difference(network, pack, indices, step)
    half = pack.transport.dde_step if step is None else step
    t_S = pack.times.t_S[list(indices)]
    span_S = (t_S + half) - (t_S - half)
    return derivative_TC * pack.segments.select(indices).expand(span_S / (2 * half))[:, None]


class _Recorder:
    """Outputs of every named module during one forward, with the first input that gave each."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __enter__(self) -> _Recorder:
        self.handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in self.network.named_modules()
            if name
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def record(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.calls.setdefault(name, []).append((inputs[0], output))

        return record

    def output(self, name: str, given: Tensor | None = None) -> Tensor | None:
        """What the module gave, for this input if it was called with several."""
        calls = self.calls.get(name, [])
        return next((y for x, y in calls if given is None or torch.equal(x, given)), None)


def _scalars(terms: LossTerms) -> tuple[Tensor, Tensor]:
    """(weighted, proj) as the reference logs them; total = weighted + coefficient * proj."""
    per_image = terms.denoising_S + terms.directional_S
    return (terms.weight_S * terms.adaptive_S * per_image).mean(), terms.alignment_S.mean()


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
