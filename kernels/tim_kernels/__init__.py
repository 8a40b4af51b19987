"""Training kernels for packed diffusion transformers: fused, varlen, deterministic, each with its definition.

Depends on torch alone; Triton is imported when a Triton path first runs.
"""

from tim_kernels.chunks import ChunkPlan
from tim_kernels.dispatch import path_taken, use_path
from tim_kernels.gated_residual import gated_residual
from tim_kernels.modulated_layer_norm import modulated_layer_norm
from tim_kernels.swiglu import swiglu, swiglu_packed
from tim_kernels.transition_loss import TargetCoefficients, transition_loss

__all__ = [
    "ChunkPlan",
    "TargetCoefficients",
    "gated_residual",
    "modulated_layer_norm",
    "path_taken",
    "swiglu",
    "swiglu_packed",
    "transition_loss",
    "use_path",
]
