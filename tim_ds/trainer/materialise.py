"""Gives the parameters of a root module that was built on the meta device their values, one at a time.

Under ZeRO-3 `deepspeed.zero.Init` (`engine.Splitter`) splits a parameter among the ranks as soon as it has
its value, so that no rank ever holds more than one whole parameter beside its own pieces. As a context it
would do so too, but at the end of each module's constructor: the values would be those that the constructors
draw, from one generator in their order, and the network's own initialisation would have to gather everything
again. Here the value of a parameter depends on its name alone, so all stages begin with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Values = Callable[[str, Tensor], Tensor]
"""The whole value of a parameter, from its name and a tensor of its shape and dtype."""

Split = Callable[[nn.Parameter], None]
"""Splits a parameter among the ranks, in place."""


@torch.no_grad()
def materialise(
    module: nn.Module,
    values: Values,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    split: Split | None = None,
) -> None:
    """Replace the meta parameters of `module` by real ones.

    Args:
        values: asked once a parameter, by its name within `module`.
        dtype: of the parameters that are kept (the value is made in the meta parameter's own, then rounded).
        device: of the parameters; None: the CPU.
        split: called with each parameter when it has its value; None keeps it whole.
    """
    for prefix, holder in module.named_modules():
        for name, empty in list(holder.named_parameters(recurse=False)):
            if not empty.is_meta:
                continue
            value = values(f"{prefix}.{name}" if prefix else name, empty).to(device or "cpu", dtype)
            parameter = nn.Parameter(value, requires_grad=empty.requires_grad)
            del value
            setattr(holder, name, parameter)
            if split is not None:
                split(parameter)
