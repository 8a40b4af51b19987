"""Settings of every test: one thread, so that sums have one order, and random streams that start anew."""

from __future__ import annotations

import os

# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# Without a GPU, Triton's kernels run in its interpreter. Triton reads the variable when it is first imported,
# and other libraries import it too: hence here, before any test.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds the global random streams before each test, so that the order of tests does not matter."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value
