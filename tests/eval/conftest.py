"""Scans of the bundled handwriting, and a scorer built on them."""

from __future__ import annotations

import pytest

from data_pipeline.handwriting import Scans, load_scans
from tim_ds.eval.handwriting import HandwritingScorer


@pytest.fixture(scope="session")
def scans() -> tuple[Scans, Scans]:
    """(training, held-back)."""
    return load_scans()


@pytest.fixture(scope="session")
def scorer(scans: tuple[Scans, Scans]) -> HandwritingScorer:
    return HandwritingScorer(*scans)
