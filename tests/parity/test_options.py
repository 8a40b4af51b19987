"""Options that the stored results do not hold: every one against the formulas, and through the comparison
tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.parity.__main__ import main
from tests.parity.compare import Report
from tests.parity.golden import Layout
from tests.parity.plain import plain_forward, rotary_angles
from tim_ds.compat.authors import config_from_authors
from tim_ds.model.tim import TiM

CASES: dict[str, tuple[Literal["t2i", "c2i"], tuple[int, int], dict[str, Any]]] = {
    "t2i-r": ("t2i", (3, 5), {"new_condition": "r"}),
    "t2i-t,r-shared-plain": (
        "t2i",
        (4, 2),
        {"new_condition": "t,r", "use_new_embed": False, "qk_norm": False, "distance_aware": False},
    ),
    "t2i-t,r,t-r-deep-p2": (
        "t2i",
        (6, 10),
        {"new_condition": "t,r,t-r", "depth": 5, "encoder_depth": 4, "patch_size": 2, "num_heads": 3},
    ),
    "c2i-t,t-r-shared-p4": (
        "c2i",
        (8, 4),
        {"new_condition": "t,t-r", "use_new_embed": False, "patch_size": 4, "mlp_ratio": 2.5},
    ),
    "c2i-r,t-r-one-head": ("c2i", (1, 7), {"new_condition": "r,t-r", "num_heads": 1, "depth": 1}),
    "c2i-t-r-no-null": ("c2i", (5, 5), {"class_dropout_prob": 0.0, "distance_aware": False}),
    "t2i-one-token": ("t2i", (1, 1), {"hidden_size": 8, "num_heads": 2, "qk_norm": False}),
}
INPUTS = (
    *("in/x", "in/z", "in/y", "in/y_null", "in/h_target", "samp/z", "samp/y", "samp/y_null"),
    *("fwd/t", "fwd/r", "tr/ot_fm/t", "tr/ot_fm/r"),
)
IMAGES, TEXT_TOKENS, NUM_DIFFUSION = 3, 4, 1


def _arguments(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    common: dict[str, Any] = {
        "input_size": 8,
        "patch_size": 1,
        "in_channels": 3,
        "hidden_size": 24,
        "encoder_depth": 1,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 4.0,
        "z_dim": 5,
        "projector_dim": 7,
        "new_condition": "t-r",
        "use_new_embed": True,
        "qk_norm": True,
        "distance_aware": True,
        "lora_hidden_size": None,
    }
    own = {"cap_feat_dim": 6} if kind == "t2i" else {"num_classes": 4, "class_dropout_prob": 0.1}
    return {**common, **own, **changes}


def _weights(network: TiM) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(name: str, shape: torch.Size) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm.weight" in name:
            return 1 + 0.3 * value
        return value / (shape[1:].numel() ** 0.5 if len(shape) > 1 else 5)

    return {name: draw(name, value.shape) for name, value in network.state_dict().items()}


class _Made:
    """A case with random weights and inputs in float64."""

    def __init__(self, name: str) -> None:
        self.kind, (height, width), changes = CASES[name]
        self.arguments = _arguments(self.kind, changes)
        self.model = config_from_authors(self.kind, self.arguments)
        self.network = TiM(self.model).double()
        self.weights = _weights(self.network)
        self.network.load_state_dict(self.weights)
        self.layout = Layout(self.model, height, width)
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        latent = (IMAGES, self.model.in_channels, height, width)
        self.x, self.z = normal(*latent), normal(*latent)
        if self.kind == "t2i":
            self.y, self.y_null = (normal(IMAGES, TEXT_TOKENS, self.model.text_dim or 0) for _ in range(2))
        else:
            self.y, self.y_null = torch.tensor([0, 3, 1]), torch.tensor([2, 2, 2])
        self.features = normal(IMAGES, self.layout.grid[0] * self.layout.grid[1], self.model.z_dim or 0)
        self.t = torch.tensor([0.7, 0.9, 0.6], dtype=torch.float64)
        self.r = torch.tensor([0.7, 0.2, 0.0], dtype=torch.float64)

    def plain(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return plain_forward(self.arguments, self.weights, x, t, r, self.y[: len(x)] if y is None else y)


@pytest.mark.parametrize("name", CASES)
def test_packed_network_equals_the_formulas_on_padded_batches(name: str) -> None:
    made = _Made(name)
    expected = made.plain(made.x, made.t, made.r)
    with torch.no_grad():
        output = made.network(
            made.layout.pack(made.x),
            made.t,
            made.r,
            made.layout.segments(IMAGES),
            made.layout.condition(made.y),
            with_features=True,
        )
    assert output.features_TZ is not None
    assert expected["F"].std() > 0.05, "the case would say nothing"
    for ours, theirs in (
        (made.layout.unpack(output.F_TC), expected["F"]),
        (output.features_TZ, expected["h_proj"].flatten(0, 1)),
    ):
        # float64: five blocks of sums over some hundred terms.
        assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()


def _golden(made: _Made) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A golden of OT-FM in the stored format, from the formulas alone."""
    t, r, x, z, y = made.t, made.r, made.x, made.z, made.y
    wide_t, wide_r = t[:, None, None, None], r[:, None, None, None]

    def state(time: Tensor) -> Tensor:
        return (1 - time)[:, None, None, None] * x + time[:, None, None, None] * z

    forward = made.plain(state(t), t, r)
    e = 0.005
    derivative = (made.plain(state(t + e), t + e, r)["F"] - made.plain(state(t - e), t - e, r)["F"]) / (2 * e)
    derivative[:NUM_DIFFUSION] = 0
    target = z - x - (wide_t - wide_r) * derivative
    error = (forward["F"] - target).square().mean((1, 2, 3))
    angle = 1 - torch.cosine_similarity(forward["F"], target, dim=1)
    weight = (torch.tan(t) - torch.tan(r) + 1) ** -0.5
    weight[:NUM_DIFFUSION] = 1
    alignment = 1 - torch.cosine_similarity(forward["h_proj"], made.features, dim=-1)
    angles = rotary_angles(*made.layout.grid, made.model.head_dim, torch.float64).repeat_interleave(2, 1)
    tensors = {
        "in/x": x,
        "in/z": z,
        "in/y": y,
        "in/y_null": made.y_null,
        "in/h_target": made.features,
        "fwd/t": t,
        "fwd/r": r,
        "fwd/x_t": state(t),
        "fwd/F": forward["F"],
        "fwd/h_proj": forward["h_proj"],
        "rope/cos": angles.cos(),
        "rope/sin": angles.sin(),
        **{f"act/{key}": value for key, value in forward.items() if key not in ("F", "h_proj")},
        "tr/ot_fm/t": t,
        "tr/ot_fm/r": r,
        "tr/ot_fm/c_t": t,
        "tr/ot_fm/c_r": r,
        "tr/ot_fm/x_t": state(t),
        "tr/ot_fm/v_t": z - x,
        "tr/ot_fm/F": forward["F"],
        "tr/ot_fm/dde": derivative,
        "tr/ot_fm/target": target,
        "tr/ot_fm/x_r": state(t) - (wide_t - wide_r) * forward["F"],
    }
    for variant, per_image in (("dir", error + angle.mean((1, 2))), ("nodir", error)):
        tensors |= {
            f"loss/ot_fm/{variant}/per_sample_denoising": per_image,
            f"loss/ot_fm/{variant}/time_weight": weight,
            f"loss/ot_fm/{variant}/weighted": (weight * per_image / (per_image + 1e-5)).mean(),
            f"loss/ot_fm/{variant}/proj": alignment.mean(),
        }
    states, noise = [], z[:2]
    for start, end in ((1.0, 0.5), (0.5, 0.0)):
        at, to = torch.full((2,), start).double(), torch.full((2,), end).double()
        F = made.plain(noise, at, to)["F"]
        if start < 1:
            uncond = made.plain(noise, at, to, made.y_null[:2])["F"]
            F = uncond + 2.5 * (F - uncond)
        noise = noise - (start - end) * F
        states.append(noise)
    tensors |= {
        "samp/z": z[:2],
        "samp/y": y[:2],
        "samp/y_null": made.y_null[:2],
        "samp/ot_2step_cfg": torch.stack(states),
    }
    run = {"transport": "ot_fm", "T_max": 1.0, "T_min": 0.0, "num_steps": 2, "cfg_scale": 2.5}
    about = {
        "name": "made",
        "kind": made.kind,
        "network": made.arguments,
        "latent_hw": list(x.shape[-2:]),
        "batch": IMAGES,
        "n_diffusion": NUM_DIFFUSION,
        "ema_scale": 0.9,
        "proj_coeff": 1.0,
        "num_params": sum(value.numel() for value in made.weights.values()),
        "transports": {
            "ot_fm": {
                "cls": "OT_FM",
                "ctor": {},
                "sigma_d": 1.0,
                "T_max": 1.0,
                "T_min": 0.0,
                "differential_epsilon": e,
                "schedule": {"weight_time_type": "sqrt", "weight_time_tangent": True},
            }
        },
        "sampling": {"ot_2step_cfg": run},
    }
    return about, tensors


def _write(folder: Path, name: str, about: dict[str, Any], tensors: dict[str, Tensor], made: _Made) -> None:
    def narrow(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: (value.float() if value.is_floating_point() else value).contiguous().clone()
            for name, value in values.items()
        }

    (folder / f"golden_{name}.json").write_text(json.dumps(about))
    save_file(narrow(tensors), folder / f"golden_{name}.safetensors")
    save_file(narrow(made.weights), folder / f"golden_{name}_weights.safetensors")


def test_tool_compares_goldens_of_any_size_and_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate(CASES):
        made = _Made(name)
        about, tensors = _golden(made)
        _write(tmp_path, f"made{i}", about, tensors, made)
    code = main(["--goldens", str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "not comparable" not in printed
    assert f"{len(CASES)} files, " in printed and " 0 beyond tolerance" in printed


def test_tool_fails_on_a_wrong_value_of_every_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _Made("t2i-r")
    about, tensors = _golden(made)
    outputs = [name for name in tensors if name not in INPUTS]
    wrong = {name: value * 1.01 + 0.01 if name in outputs else value for name, value in tensors.items()}
    # The forward starts from the recorded state, which has to stay right for its outputs to be judged.
    wrong["fwd/x_t"] = tensors["fwd/x_t"]
    _write(tmp_path, "wrong", about, wrong, made)
    assert main(["--goldens", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    for name in outputs:
        assert name == "fwd/x_t" or f"  FAILED {name}: " in printed
    assert len(outputs) > 30


def test_a_tensor_of_unknown_name_is_listed_with_its_reason() -> None:
    report = Report("golden_x.json", {"act/new": torch.ones(1)}).close()
    assert report.skipped == {"act/new": "no tensor of this name is known to the tool"}
    assert "    act/new" in report.lines()
