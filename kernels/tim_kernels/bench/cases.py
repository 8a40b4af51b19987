"""What is measured: for each op its inputs, the functions that compete, and the bytes it has to move.

T tokens, S segments, D width, H hidden columns of the MLP, C channels of a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tim_kernels.chunks import ChunkPlan
from tim_kernels.gated_residual import gated_residual, gated_residual_reference
from tim_kernels.modulated_layer_norm import modulated_layer_norm, modulated_layer_norm_reference
from tim_kernels.swiglu import swiglu_packed, swiglu_reference
from tim_kernels.transition_loss import TargetCoefficients, transition_loss, transition_loss_reference

Inputs = dict[str, Tensor]
Function = Callable[[Inputs, ChunkPlan], tuple[Tensor, ...]]

MIXES: dict[str, tuple[int, ...]] = {
    "small": (64,),
    "uniform": (1024,),
    "mixed": (256, 1024, 640, 2304, 96, 4096),
}
"""Segment lengths, repeated: pictures of 256 px, of 1024 px, and of native sizes."""


def lengths_of(mix: str, tokens: int) -> tuple[int, ...]:
    """Segments of the mix until there are `tokens` tokens; the last one is cut to fit."""
    lengths: list[int] = []
    for n in itertools.cycle(MIXES[mix]):
        rest = tokens - sum(lengths)
        if rest <= n:
            return (*lengths, rest)
        lengths.append(n)
    raise AssertionError("unreachable: a cycle has no end")


@dataclass(frozen=True)
class Spec:
    """One input: its columns (None: a vector), dtype, leading axis, and whether it takes a gradient."""

    columns: int | None
    dtype: torch.dtype = torch.float32
    axis: str = "T"
    gradient: bool = True


@dataclass(frozen=True)
class Case:
    """An op in one shape family.

    The byte model counts every tensor with a row a token once for each kernel that has to read or write it;
    modulation and partial sums (a few percent) are left out.
    """

    op: str
    label: str
    specs: dict[str, Spec]
    ours: Function
    twin: Function
    outputs_axis: str
    forward_bytes_per_token: int
    backward_bytes_per_token: int
    float32_tolerance: float = 1e-4
    """Largest deviation of a float32 result from the float64 twin, over its largest magnitude: sums of up to
    some thousand terms, which an implementation may take in any order."""
    libraries: dict[str, Function] = field(default_factory=dict)
    """Other implementations of the same function, where they are installed."""
    yardsticks: dict[str, Function] = field(default_factory=dict)
    """Library kernels that do a part of the work: no rival, but a measure."""

    @property
    def name(self) -> str:
        return f"{self.op}, {self.label}"

    def inputs(self, lengths: tuple[int, ...], device: torch.device, seed: int = 0) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        size = {"T": sum(lengths), "S": len(lengths)}
        made = {}
        for name, spec in self.specs.items():
            shape = (size[spec.axis],) if spec.columns is None else (size[spec.axis], spec.columns)
            x = torch.randn(shape, generator=generator, device=device)
            made[name] = x.to(spec.dtype).requires_grad_(spec.gradient)
        return made


def cases(width: int = 1152, hidden: int = 3072, channels: int = 32) -> list[Case]:
    """Every op at the authors' XL sizes, or at others."""
    return [*_norms(width), _residual(width), _swiglu(hidden), _loss(channels)]


def _norms(width: int) -> Iterator[Case]:
    bf16 = torch.bfloat16
    modulation = {"shift": Spec(width, axis="S"), "scale": Spec(width, axis="S")}
    joined = {"branch": Spec(width, bf16), "gate": Spec(width, axis="S")}

    def ours(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, Tensor]:
        branch, gate = x.get("branch"), x.get("gate")
        return modulated_layer_norm(x["x"], branch, gate, x["shift"], x["scale"], plan, h_dtype=bf16)

    def twin(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, Tensor]:
        h_dtype = torch.float64 if x["x"].dtype == torch.float64 else bf16
        branch, gate = x.get("branch"), x.get("gate")
        ids = plan.segment_ids
        return modulated_layer_norm_reference(
            x["x"], branch, gate, x["shift"], x["scale"], ids, eps=1e-6, h_dtype=h_dtype
        )

    def norm_alone(x: Inputs, plan: ChunkPlan) -> tuple[Tensor]:
        return (nnf.layer_norm(x["x"], (width,), eps=1e-6),)

    for label, specs, forward, backward in (
        # x 4, branch 2, x' 4, h 2.   d_h 2, d_x' 4, x' 4, branch 2, d_x 4, d_branch 2.
        ("float32 stream, with residual", {"x": Spec(width), **joined, **modulation}, 12, 18),
        # x 4, h 2.   d_h 2, d_x' 4, x 4, d_x 4.
        ("float32 stream, norm only", {"x": Spec(width), **modulation}, 6, 14),
        # x 2, branch 2, x' 2, h 2.   d_h 2, d_x' 2, x' 2, branch 2, d_x 2, d_branch 2.
        ("bfloat16 stream, with residual", {"x": Spec(width, bf16), **joined, **modulation}, 8, 12),
    ):
        yield Case(
            "modulated_layer_norm",
            f"{label}, width {width}",
            specs,
            ours,
            twin,
            "T",
            forward * width,
            backward * width,
            # The float64 twin does not round x' to bfloat16.
            float32_tolerance=2**-7 if specs["x"].dtype == bf16 else 1e-4,
            yardsticks={"torch layer_norm alone": norm_alone},
        )


def _residual(width: int) -> Case:
    def twin(x: Inputs, plan: ChunkPlan) -> tuple[Tensor]:
        return (gated_residual_reference(x["x"], x["branch"], x["gate"], plan.segment_ids),)

    return Case(
        "gated_residual",
        f"float32 stream, width {width}",
        {"x": Spec(width), "branch": Spec(width, torch.bfloat16), "gate": Spec(width, axis="S")},
        lambda x, plan: (gated_residual(x["x"], x["branch"], x["gate"], plan),),
        twin,
        "T",
        # x 4, branch 2, result 4.   Its gradient 4, branch 2, d_branch 2.
        10 * width,
        8 * width,
    )


def _swiglu(hidden: int) -> Case:
    def twin(x: Inputs, plan: ChunkPlan) -> tuple[Tensor]:
        return (swiglu_reference(*x["gate_up"].chunk(2, dim=-1)),)

    return Case(
        "swiglu",
        f"bfloat16, packed, hidden {hidden}",
        {"gate_up": Spec(2 * hidden, torch.bfloat16)},
        lambda x, plan: (swiglu_packed(x["gate_up"]),),
        twin,
        "T",
        # gate and up 4, result 2.   Its gradient 2, gate and up 4, their gradients 4.
        6 * hidden,
        10 * hidden,
        libraries=_liger_swiglu(),
    )


def _liger_swiglu() -> dict[str, Function]:
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}

    def liger(x: Inputs, plan: ChunkPlan) -> tuple[Tensor]:
        return (LigerSiLUMulFunction.apply(*x["gate_up"].chunk(2, dim=-1)),)

    return {"Liger SiLUMul": liger}


def _loss(channels: int) -> Case:
    names = [name.removesuffix("_S") for name in TargetCoefficients._fields]
    constant = partial(Spec, gradient=False)

    def ours(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, Tensor]:
        coefficients = TargetCoefficients(*(x[name] for name in names))
        return transition_loss(
            x["F"], x["x"], x["z"], x["dF_dt"], coefficients, plan, latent_channels=channels
        )

    def twin(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, Tensor]:
        return transition_loss_reference(
            x["F"],
            x["x"],
            x["z"],
            x["dF_dt"],
            TargetCoefficients(*(x[name] for name in names)),
            plan.segment_ids,
            plan.num_segments,
            diffusion_target_TC=None,
            latent_channels=channels,
            directional=True,
        )

    return Case(
        "transition_loss",
        f"float32, {channels} channels",
        {
            "F": Spec(channels),
            **{name: constant(channels) for name in ("x", "z", "dF_dt")},
            **{name: constant(None, axis="S") for name in names},
        },
        ours,
        twin,
        "S",
        # F, x, z and dF/dt.   The same again, and d_F.
        16 * channels,
        20 * channels,
    )
