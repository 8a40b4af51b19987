"""Attention within the segments of two packed sequences, on the fastest backend that can be trusted."""

from tim_kernels.varlen_attention.jvp import varlen_attention_jvp, varlen_attention_jvp_reference
from tim_kernels.varlen_attention.op import (
    prove_attention_backends,
    use_attention_backend,
    varlen_attention,
    varlen_attention_with_lse,
)
from tim_kernels.varlen_attention.plan import AttentionPlan
from tim_kernels.varlen_attention.tangent_plan import AttentionTangentPlan

__all__ = [
    "AttentionPlan",
    "AttentionTangentPlan",
    "prove_attention_backends",
    "use_attention_backend",
    "varlen_attention",
    "varlen_attention_jvp",
    "varlen_attention_jvp_reference",
    "varlen_attention_with_lse",
]
