"""SiLU(gate) * up, the product recomputed in the backward."""

from tim_kernels.swiglu.jvp import swiglu_jvp, swiglu_packed_jvp
from tim_kernels.swiglu.op import swiglu, swiglu_packed
from tim_kernels.swiglu.reference import swiglu_jvp_reference, swiglu_reference

__all__ = [
    "swiglu",
    "swiglu_jvp",
    "swiglu_jvp_reference",
    "swiglu_packed",
    "swiglu_packed_jvp",
    "swiglu_reference",
]
