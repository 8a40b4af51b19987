"""SiLU(gate) * up, the product recomputed in the backward."""

from tim_kernels.swiglu.op import swiglu, swiglu_packed
from tim_kernels.swiglu.reference import swiglu_reference

__all__ = ["swiglu", "swiglu_packed", "swiglu_reference"]
