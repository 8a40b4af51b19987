"""A branch added to the residual stream through its per-segment gate."""

from tim_kernels.gated_residual.jvp import gated_residual_jvp
from tim_kernels.gated_residual.op import gated_residual
from tim_kernels.gated_residual.reference import gated_residual_jvp_reference, gated_residual_reference

__all__ = [
    "gated_residual",
    "gated_residual_jvp",
    "gated_residual_jvp_reference",
    "gated_residual_reference",
]
