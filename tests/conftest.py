"""Where there is no CUDA device, Triton's kernels run in its interpreter, on the CPU.

Triton reads the variable when it is first imported, and other libraries import it too: hence here, before any
test.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
