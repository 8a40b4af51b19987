"""Per-head LayerNorm and two-axis rotary positions for the queries and keys of attention."""

from tim_kernels.qk_norm_rope.jvp import qk_norm_rope_jvp, qkv_norm_rope_jvp
from tim_kernels.qk_norm_rope.op import Affine, kv_norm_rope, qk_norm_rope, qkv_norm_rope
from tim_kernels.qk_norm_rope.reference import (
    packed_norm_rope_jvp_reference,
    packed_norm_rope_reference,
    qk_norm_rope_jvp_reference,
    qk_norm_rope_reference,
)
from tim_kernels.qk_norm_rope.table import RotaryTable

__all__ = [
    "Affine",
    "RotaryTable",
    "kv_norm_rope",
    "packed_norm_rope_jvp_reference",
    "packed_norm_rope_reference",
    "qk_norm_rope",
    "qk_norm_rope_jvp",
    "qk_norm_rope_jvp_reference",
    "qk_norm_rope_reference",
    "qkv_norm_rope",
    "qkv_norm_rope_jvp",
]
