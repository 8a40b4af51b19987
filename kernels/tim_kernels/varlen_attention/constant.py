"""The choice of a backend for a compiled model, which takes it as it is made while it is traced.

Trials cannot be traced.
"""

from __future__ import annotations

import torch

from tim_kernels.varlen_attention import op

first_trusted = torch.compiler.assume_constant_result(op._first_trusted)
refusal_of = torch.compiler.assume_constant_result(op._refusal_of)
