"""Training kernels for packed diffusion transformers: fused, varlen, deterministic, each with its definition.

Depends on torch alone; Triton is imported when a Triton path first runs.
"""

from tim_kernels.chunks import ChunkPlan
from tim_kernels.dispatch import path_taken, use_path
from tim_kernels.gated_residual import gated_residual, gated_residual_jvp
from tim_kernels.modulated_layer_norm import modulated_layer_norm, modulated_layer_norm_jvp
from tim_kernels.qk_norm_rope import (
    RotaryTable,
    kv_norm_rope,
    qk_norm_rope,
    qk_norm_rope_jvp,
    qkv_norm_rope,
    qkv_norm_rope_jvp,
)
from tim_kernels.swiglu import swiglu, swiglu_jvp, swiglu_packed, swiglu_packed_jvp
from tim_kernels.tangent import silu_tangent
from tim_kernels.tangent_plan import TangentPlan
from tim_kernels.transition_loss import TargetCoefficients, transition_loss
from tim_kernels.varlen_attention import (
    AttentionPlan,
    AttentionTangentPlan,
    prove_attention_backends,
    use_attention_backend,
    varlen_attention,
    varlen_attention_jvp,
    varlen_attention_with_lse,
)

__all__ = [
    "AttentionPlan",
    "AttentionTangentPlan",
    "ChunkPlan",
    "RotaryTable",
    "TangentPlan",
    "TargetCoefficients",
    "gated_residual",
    "gated_residual_jvp",
    "kv_norm_rope",
    "modulated_layer_norm",
    "modulated_layer_norm_jvp",
    "path_taken",
    "prove_attention_backends",
    "qk_norm_rope",
    "qk_norm_rope_jvp",
    "qkv_norm_rope",
    "qkv_norm_rope_jvp",
    "silu_tangent",
    "swiglu",
    "swiglu_jvp",
    "swiglu_packed",
    "swiglu_packed_jvp",
    "transition_loss",
    "use_attention_backend",
    "use_path",
    "varlen_attention",
    "varlen_attention_jvp",
    "varlen_attention_with_lse",
]
