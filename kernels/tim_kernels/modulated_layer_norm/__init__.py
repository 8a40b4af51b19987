"""Gated residual, LayerNorm without affine, per-segment shift and scale, in one pass over the tokens."""

from tim_kernels.modulated_layer_norm.jvp import modulated_layer_norm_jvp
from tim_kernels.modulated_layer_norm.op import modulated_layer_norm
from tim_kernels.modulated_layer_norm.reference import (
    modulated_layer_norm_jvp_reference,
    modulated_layer_norm_reference,
)

__all__ = [
    "modulated_layer_norm",
    "modulated_layer_norm_jvp",
    "modulated_layer_norm_jvp_reference",
    "modulated_layer_norm_reference",
]
