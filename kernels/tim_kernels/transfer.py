"""From the host to a device without waiting for what the device still has to do."""

from __future__ import annotations

import torch
from torch import Tensor

STAGED_BYTES = 2**16
"""Up to so many bytes CUDA takes from pageable memory at once; of more it may first finish its stream."""


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on `device`. The host does not wait; larger tensors go through pinned memory, which torch keeps."""
    device = torch.device(device)
    if device.type == "cuda" and x.device.type == "cpu" and x.numel() * x.element_size() > STAGED_BYTES:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
