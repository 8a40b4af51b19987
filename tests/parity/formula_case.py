"""Everything that a formula golden records: transports in float64, time features, positions."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tests.parity.compare import Report
from tests.parity.golden import KINDS, GoldenFile, transport_config
from tests.parity.network_case import ELEMENTWISE, REFERENCE_BUG
from tim_ds.model import ops
from tim_ds.model.embed import time_features
from tim_ds.model.rope import token_positions
from tim_ds.objective.config import GuidedTargetConfig, TransportConfig
from tim_ds.objective.guidance_target import guided_diffusion_target
from tim_ds.objective.noised import NoisedPack
from tim_ds.objective.time_sampling import Times
from tim_ds.objective.transport import Transport, build_transport
from tim_ds.packed import ClassCondition, Condition, NetworkOutput, Segments

FORMULA = 1e-12

_OF_T = {
    "alpha": "alpha",
    "sigma": "sigma",
    "alpha_hat": "alpha_hat",
    "sigma_hat": "sigma_hat",
    "d_alpha": "d_alpha",
    "d_sigma": "d_sigma",
    "d_alpha_hat": "d_alpha_hat",
    "d_sigma_hat": "d_sigma_hat",
}
_OF_T_AND_R = ("A", "B", "dB", "B_over_dB")


def compare_formulas(golden: GoldenFile) -> Report:
    """Compare every tensor of a formula golden."""
    report = Report(golden.path.name, golden.tensors)
    report.use(*(name for name in golden.tensors if name.startswith("in/")))
    names = {name.split("/")[0] for name in golden.tensors if re.fullmatch(r"[^/]+/t", name)} - {"temb"}
    for name in sorted(names):
        _compare_transport(report, golden, name)
    if "temb/t" in golden.tensors:
        report.use("temb/t")
        times = golden.tensors["temb/t"]
        # A float32 frequency is off by up to 2^-23 of itself, its phase by that times t.
        phase = 2.0**-23 * max(1.0, times.abs().max().item())
        report.compare("temb/sinusoid_256", time_features(times), ELEMENTWISE + phase)
    tables = {match[0] for name in golden.tensors if (match := re.match(r"rope/hd\d+_h\d+_w\d+(?=/)", name))}
    for table in sorted(tables):
        _compare_positions(report, table)
    if golden.description.get("samplers"):
        report.skip(
            ["samplers (index lists of the description)"],
            "the authors' order of training data is not ported; the loader has an order of its own",
        )
    return report.close()


def _compare_transport(report: Report, golden: GoldenFile, name: str) -> None:
    entry = golden.description["transports"].get(name)
    config = transport_config(entry) if entry is not None else TransportConfig(kind=_kind(name))  # type: ignore[arg-type]
    transport = build_transport(config)
    tensors = golden.tensors
    report.use(f"{name}/t", f"{name}/r")
    t, r = tensors[f"{name}/t"], tensors[f"{name}/r"]
    x, z, dF_dt, F = (tensors[f"in/{key}"] for key in ("x", "z", "dF", "F"))
    x_t = transport.interpolate(x, z, t)
    values: dict[str, Tensor] = {
        **{key: getattr(transport, method)(t) for key, method in _OF_T.items()},
        **{key: getattr(transport, key)(t, r) for key in _OF_T_AND_R},
        "c_t": transport.c_noise(t),
        "c_r": transport.c_noise(r),
        "x_t": x_t,
        "target": transport.target(x, z, t, r, dF_dt),
        "x_r": transport.step(x_t, t, r, F),
    }
    if entry is not None and entry.get("mg"):
        values["target_mg"] = _guided(transport, entry["mg"], golden, name)
    if config.kind == "edm" and transport.sigma_data != 1.0:
        report.skip(
            [tensor for key in ("target", "x_r", "target_mg") if (tensor := f"{name}/ref/{key}") in tensors],
            REFERENCE_BUG,
        )
    for source in ("eq", "ref"):
        for key, value in values.items():
            report.compare(f"{name}/{source}/{key}", value, FORMULA, family=f"{name}/{source}")


def _kind(name: str) -> str:
    return name if name in KINDS.values() else name.split("_")[0]


class _Recorded:
    """A network that answers with what is recorded: point i with label 2i, without condition 2i + 1."""

    def __init__(self, F_cond: Tensor, F_uncond: Tensor) -> None:
        self.F_S2 = torch.stack([F_cond, F_uncond], dim=1)

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
        assert isinstance(condition, ClassCondition), "labels carry the row"
        row, column = condition.labels_S // 2, condition.labels_S % 2
        return NetworkOutput(self.F_S2[row, column][:, None], None)


def _guided(transport: Transport, mg: dict[str, float], golden: GoldenFile, name: str) -> Tensor:
    """The guided target at every point: each point is an image of one token with one channel."""
    tensors = golden.tensors
    t, r = tensors[f"{name}/t"], tensors[f"{name}/r"]
    x_TC, z_TC = (tensors[f"in/{key}"][:, None] for key in ("x", "z"))
    points = range(t.shape[0])
    guided_TC = guided_diffusion_target(
        _Recorded(tensors["in/F_cond"], tensors["in/F_uncond"]),
        GuidedTargetConfig(
            w_gt=_float32(mg["w_gt"]), w_cond=_float32(mg["w_cond"]), start=mg["w_start"], end=mg["w_end"]
        ),
        NoisedPack(
            transport,
            x_TC,
            z_TC,
            Times(t, r, (False,) * len(points), tuple(points), tuple(t.tolist())),
            Segments.from_lengths([1] * len(points)),
            ClassCondition(torch.tensor([2 * i for i in points])),
        ),
        ClassCondition(torch.tensor([2 * i + 1 for i in points])),
    )
    dF_dt_TC = tensors["in/dF"][:, None]
    target_TC = transport.target(x_TC, z_TC, t[:, None], r[:, None], dF_dt_TC, diffusion_target=guided_TC)
    return target_TC[:, 0]


def _float32(value: float) -> float:
    """The reference holds the weights of the guided target in float32, between float64 states too."""
    return torch.tensor(value, dtype=torch.float32).item()


def _compare_positions(report: Report, table: str) -> None:
    match = re.fullmatch(r"rope/hd(\d+)_h(\d+)_w(\d+)", table)
    assert match, "the caller matched it"
    head_dim, height, width = (int(group) for group in match.groups())
    segments = Segments.from_grids([(height, width)])
    positions = torch.stack(token_positions(segments, "reference"))
    report.compare(f"{table}/pos", positions, 0.0)
    cos, sin = ops.rotary_table(segments, head_dim, "reference", torch.float32).by_token()
    report.compare(f"{table}/cos", cos.repeat_interleave(2, dim=1), ELEMENTWISE)
    report.compare(f"{table}/sin", sin.repeat_interleave(2, dim=1), ELEMENTWISE)
