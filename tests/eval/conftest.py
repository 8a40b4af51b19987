"""Scans of the bundled handwriting and a scorer built on them; torch-fidelity without torchvision."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

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


@pytest.fixture(scope="session")
def fidelity() -> ModuleType:
    """torch-fidelity itself.

    It imports torchvision for data sets and networks that are not used here. Where there is none (it has no
    CPU build on PyPI, and its CUDA build does not import beside a CPU torch), empty modules stand in for it
    while it is imported, and only then.
    """
    if "torch_fidelity" in sys.modules:
        return sys.modules["torch_fidelity"]
    try:
        return importlib.import_module("torch_fidelity")
    except (ImportError, RuntimeError):
        for name in [
            name for name in sys.modules if name.partition(".")[0] in ("torch_fidelity", "torchvision")
        ]:
            del sys.modules[name]
    names = (
        "torchvision",
        "torchvision.datasets",
        "torchvision.transforms",
        "torchvision.transforms.functional",
    )
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    for data_set in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules["torchvision.datasets"], data_set, type(data_set, (), {}))
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("torch_fidelity")
