"""Training kernels for packed diffusion transformers: fused, varlen, deterministic, each with its definition.

Depends on torch alone; Triton is imported when a Triton path first runs.
"""

from tim_kernels.chunks import ChunkPlan
from tim_kernels.dispatch import path_taken, use_path
from tim_kernels.gated_residual import gated_residual
from tim_kernels.modulated_layer_norm import modulated_layer_norm
from tim_kernels.swiglu import swiglu, swiglu_packed
from tim_kernels.tangent import (
    dense_attention_tangent,
    gated_residual_tangent,
    head_norm_tangent,
    modulated_layer_norm_tangent,
    silu_tangent,
    swiglu_tangent,
)
from tim_kernels.transition_loss import TargetCoefficients, transition_loss

__all__ = [
    "ChunkPlan",
    "TargetCoefficients",
    "dense_attention_tangent",
    "gated_residual",
    "gated_residual_tangent",
    "head_norm_tangent",
    "modulated_layer_norm",
    "modulated_layer_norm_tangent",
    "path_taken",
    "silu_tangent",
    "swiglu",
    "swiglu_packed",
    "swiglu_tangent",
    "transition_loss",
    "use_path",
]
