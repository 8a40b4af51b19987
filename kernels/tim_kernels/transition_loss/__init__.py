"""Target of Eq. 9 and the per-image loss terms of Eq. 13, in one pass over the tokens."""

from tim_kernels.transition_loss.op import TargetCoefficients, transition_loss
from tim_kernels.transition_loss.reference import transition_loss_reference

__all__ = ["TargetCoefficients", "transition_loss", "transition_loss_reference"]
