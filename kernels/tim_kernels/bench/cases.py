"""What is measured: for each op its inputs, the functions that compete, and the bytes it has to move.

T tokens, S segments, D width, H hidden columns of the MLP or width of a head, N heads, C channels of a token,
P grid positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tim_kernels.bench.attention import attention_cases
from tim_kernels.bench.case import NUM_POSITIONS, Case, Function, Inputs, Spec
from tim_kernels.bench.tangents import tangent_cases
from tim_kernels.chunks import ChunkPlan
from tim_kernels.gated_residual import gated_residual, gated_residual_reference
from tim_kernels.modulated_layer_norm import modulated_layer_norm, modulated_layer_norm_reference
from tim_kernels.qk_norm_rope import (
    RotaryTable,
    kv_norm_rope,
    packed_norm_rope_reference,
    qk_norm_rope,
    qk_norm_rope_reference,
    qkv_norm_rope,
)
from tim_kernels.swiglu import swiglu_packed, swiglu_reference
from tim_kernels.transition_loss import TargetCoefficients, transition_loss, transition_loss_reference


def cases(width: int = 1152, hidden: int = 3072, channels: int = 32, head_dim: int = 72) -> list[Case]:
    """Every op at the authors' XL sizes, or at others."""
    return [
        *_norms(width),
        _residual(width),
        *_heads(width, head_dim),
        _swiglu(hidden),
        _loss(channels),
        *attention_cases(width, head_dim),
        *tangent_cases(width, hidden, head_dim),
    ]


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
            yardsticks={"torch layer_norm alone": norm_alone, **_library_norms(width)},
        )


def _library_norms(width: int) -> dict[str, Function]:
    """Norms with affine weights, and the sum with the branch before them where a library has that."""
    found: dict[str, Function] = {}

    def affine(x: Inputs) -> tuple[Tensor, Tensor]:
        return x["x"].new_ones(width), x["x"].new_zeros(width)

    try:
        from liger_kernel.ops.layer_norm import (  # pyright: ignore[reportMissingImports]
            LigerLayerNormFunction,
        )

        found["Liger LayerNorm alone"] = lambda x, plan: (
            LigerLayerNormFunction.apply(x["x"], *affine(x), 1e-6),
        )
    except ImportError:
        pass
    try:
        from flash_attn.ops.triton.layer_norm import (  # pyright: ignore[reportMissingImports]
            layer_norm_fn,
        )

        def added_and_normed(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, ...]:
            if "branch" not in x:
                return (layer_norm_fn(x["x"], *affine(x), eps=1e-6),)
            in_fp32 = x["x"].dtype == torch.float32
            return tuple(
                layer_norm_fn(
                    x["branch"], *affine(x), residual=x["x"], eps=1e-6, prenorm=True, residual_in_fp32=in_fp32
                )
            )

        found["flash-attn residual and norm alone"] = added_and_normed
    except ImportError:
        pass
    return found


def _residual(width: int) -> Case:
    def twin(x: Inputs, plan: ChunkPlan) -> tuple[Tensor]:
        return (gated_residual_reference(x["x"], x["branch"], x["gate"], plan.segment_ids),)

    def addcmul(x: Inputs, plan: ChunkPlan) -> tuple[Tensor]:
        return (torch.addcmul(x["x"], x["gate"].index_select(0, plan.segment_ids), x["branch"].float()),)

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
        libraries={"torch addcmul": addcmul},
    )


def _heads(width: int, head_dim: int) -> Iterator[Case]:
    bf16, num_heads = torch.bfloat16, width // head_dim
    affine = {name: Spec(None, axis=head_dim) for name in ("q weight", "q bias", "k weight", "k bias")}
    # Any numbers do for cosine and sine: the rotation is linear in them.
    angles = {name: Spec(head_dim // 4, axis=NUM_POSITIONS, gradient=False) for name in ("cos", "sin")}
    positions = {name: Spec(None, torch.int32, gradient=False) for name in ("a", "b")}

    def table(x: Inputs) -> RotaryTable:
        return RotaryTable(x["cos"], x["sin"], x["a"], x["b"])

    def norm(x: Inputs, name: str) -> tuple[Tensor, Tensor]:
        return x[f"{name} weight"], x[f"{name} bias"]

    def self_attention(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, ...]:
        norms, shift = (norm(x, "q"), norm(x, "k")), x.get("shift")
        return qkv_norm_rope(x["qkv"], num_heads, *norms, table(x), shift_SE=shift, plan=plan)

    def self_attention_twin(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, ...]:
        norms, shift = (norm(x, "q"), norm(x, "k")), x.get("shift")
        return packed_norm_rope_reference(
            x["qkv"], num_heads, norms, table(x), shift, plan.segment_ids, eps=1e-5
        )

    def queries(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, ...]:
        return (qk_norm_rope(x["q"].unflatten(1, (num_heads, head_dim)), *norm(x, "q"), table(x)),)

    def queries_twin(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, ...]:
        q = x["q"].unflatten(1, (num_heads, head_dim))
        return (qk_norm_rope_reference(q, *norm(x, "q"), table(x), eps=1e-5),)

    def keys_and_values(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, ...]:
        return kv_norm_rope(x["kv"], num_heads, norm(x, "k"))

    def keys_and_values_twin(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, ...]:
        norms = (norm(x, "k"),)
        return packed_norm_rope_reference(x["kv"], num_heads, norms, None, None, None, eps=1e-5)

    def by_library(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, ...]:
        """torch's layer norm of the heads in float32, and a product of complex numbers."""
        packed = next(x[name] for name in ("qkv", "q", "kv") if name in x).float()
        if "shift" in x:
            packed = packed + x["shift"].index_select(0, plan.segment_ids)
        parts = list(packed.unflatten(1, (-1, num_heads, head_dim)).unbind(1))
        for i, name in enumerate(name for name in "qk" if f"{name} weight" in x):
            parts[i] = nnf.layer_norm(parts[i], (head_dim,), *norm(x, name), eps=1e-5)
            if "cos" in x:
                cos, sin = (torch.cat([x[n][x["a"]], x[n][x["b"]]], dim=1)[:, None] for n in ("cos", "sin"))
                pairs = torch.view_as_complex(parts[i].unflatten(-1, (-1, 2)))
                parts[i] = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
        return tuple(y.to(bf16) for y in parts)

    shifted = {"qkv": Spec(3 * width, bf16), "shift": Spec(3 * width, axis="S")}
    shared = self_attention, self_attention_twin
    q_affine, k_affine = ({n: x for n, x in affine.items() if n[0] == first} for first in "qk")
    for label, specs, ours, twin, forward, backward in (
        # q, k, v 6, results 6.   Their gradients 6, q and k 4, gradient of the row 6.
        ("q, k, v with shift", {**shifted, **affine, **angles, **positions}, *shared, 12, 16),
        # q and k 4, results 4.   As above.
        ("q, k, v", {"qkv": shifted["qkv"], **affine, **angles, **positions}, *shared, 8, 16),
        # q 2, result 2.   Its gradient 2, q 2, d_q 2.
        ("q", {"q": Spec(width, bf16), **q_affine, **angles, **positions}, queries, queries_twin, 4, 6),
        # k 2, result 2.   Gradients of k and v 4, k 2, gradient of the row 4.
        ("k, v", {"kv": Spec(2 * width, bf16), **k_affine}, keys_and_values, keys_and_values_twin, 4, 10),
    ):
        yield Case(
            "qk_norm_rope",
            f"bfloat16, {label}, {num_heads} heads of {head_dim}",
            specs,
            ours,
            twin,
            "T",
            forward * width,
            backward * width,
            libraries={"torch layer_norm and complex product": by_library},
        )


def _swiglu(hidden: int) -> Case:
    def twin(x: Inputs, plan: ChunkPlan) -> tuple[Tensor]:
        return (swiglu_reference(*x["gate_up"].chunk(2, dim=-1)),)

    def silu_and_product(x: Inputs, plan: ChunkPlan) -> tuple[Tensor]:
        gate, up = x["gate_up"].chunk(2, dim=-1)
        return (nnf.silu(gate) * up,)

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
        libraries={"torch silu and product": silu_and_product, **_liger_swiglu()},
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

    def given_target(x: Inputs, plan: ChunkPlan) -> tuple[Tensor, Tensor]:
        return nnf.mse_loss(x["F"], x["x"]), nnf.cosine_similarity(x["F"], x["x"], dim=-1)

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
        yardsticks={"torch mse_loss and cosine_similarity alone": given_target},
    )
