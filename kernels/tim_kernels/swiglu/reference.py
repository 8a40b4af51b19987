"""The definition, in plain PyTorch: any floating dtype, forward mode, vmap and compilation included."""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, in the dtype of the arguments (in 16 bits it rounds twice, the kernel once)."""
    return nnf.silu(gate) * up
