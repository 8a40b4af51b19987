"""Attention within the segments of two packed sequences, on the fastest backend that can be trusted."""

from tim_kernels.varlen_attention.op import (
    prove_attention_backends,
    use_attention_backend,
    varlen_attention,
    varlen_attention_with_lse,
)
from tim_kernels.varlen_attention.plan import AttentionPlan

__all__ = [
    "AttentionPlan",
    "prove_attention_backends",
    "use_attention_backend",
    "varlen_attention",
    "varlen_attention_with_lse",
]
