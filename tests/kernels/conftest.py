"""Kernel tests run on the CUDA device if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tim_kernels import dispatch


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available() and not dispatch.is_interpreting():
        return torch.device("cuda")
    assert dispatch.is_interpreting(), "Triton was imported before tests/conftest.py set TRITON_INTERPRET"
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """Every torch.empty is filled with NaN, so that an element which no kernel writes cannot go unseen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before)
