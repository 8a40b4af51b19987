"""Who may import whom, read from the source itself, function bodies and type-checking blocks included.

The direction keeps the mathematics pure (the objective and the sampler receive the network, they never import
it), keeps each outside library in one place, and keeps recipes checkable without torch.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

OURS = ("tim_ds", "tim_kernels", "data_pipeline", "launch")

# What every part of tim_ds and launch may import. Each package's config.py is added to it.
SHARED = ("tim_ds.packed", "tim_ds.errors", "tim_ds.__version__", "data_pipeline.command")

ALLOWED: dict[str, tuple[str, ...]] = {
    "launch": ("tim_ds.trainer", "tim_ds.eval", "tim_ds.pipeline", "tim_ds.config"),
    "tim_ds.trainer": (
        "tim_ds.objective",
        "tim_ds.model",
        "tim_ds.sampler",
        "tim_ds.config",
        "tim_ds.eval",
        "tim_ds.pipeline",
        "tim_ds.sources",
        "data_pipeline",
    ),
    "tim_ds.eval": (
        "tim_ds.sampler",
        "tim_ds.model",
        "tim_ds.objective",
        "tim_ds.config",
        "tim_ds.pipeline",
        "data_pipeline",
    ),
    "tim_ds.pipeline": (
        "tim_ds.sampler",
        "tim_ds.objective.transport",
        "tim_ds.model",
        "tim_ds.sources",
        "tim_ds.config",
        "data_pipeline.encoders",
    ),
    "tim_ds.sources": ("tim_ds.model", "tim_ds.compat", "tim_ds.config"),
    "tim_ds.compat": ("tim_ds.model", "tim_ds.config"),
    "tim_ds.sampler": ("tim_ds.objective.transport",),
    "tim_ds.objective": (),
    # The description in a folder of weights is decoded and checked like a recipe.
    "tim_ds.model": ("tim_ds.config.decode", "tim_ds.config.node"),
    "tim_ds.config": (),
    "tim_ds.packed": (),
    "tim_ds.errors": (),
    "tim_ds": (),
    "data_pipeline": (),
    "tim_kernels": (),
}

# Modules that alone may import something, beside what their package may.
EXCEPTIONS = {
    "tim_ds.model.ops": ("tim_kernels",),
    # A command beside the estimators that it compares, for any export or recipe; see COMMANDS.
    "tim_ds.objective.derivative_error": (
        "tim_ds.config.load",
        "tim_ds.model",
        "tim_ds.sources",
        "data_pipeline.errors",
        "data_pipeline.index",
        "data_pipeline.reader",
    ),
    # What a measurement says about its machine has one form.
    "tim_ds.trainer.bench.report": ("tim_kernels.bench.report.environment",),
}

# Commands that may import what their package must not. Nothing imports them, so the package does not either.
COMMANDS = ("tim_ds.objective.derivative_error",)

# The one home of each outside library.
HOMES = {
    "deepspeed": ("tim_ds.trainer.engine",),
    "webdataset": ("data_pipeline.shards",),
    "yaml": ("tim_ds.config.load",),
    "triton": ("tim_kernels",),
}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of ours beneath a repository root."""
    for base, package in (
        (root, "tim_ds"),
        (root, "data_pipeline"),
        (root, "launch"),
        (root / "kernels", "tim_kernels"),
    ):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@cache
def imports(module: str, path: Path) -> tuple[tuple[str, int], ...]:
    """(dotted name, line) of everything that a file imports, relative imports resolved.

    `from a import b` gives a.b: whether b is a module or a name in a, a rule about a covers it.
    """
    return tuple(_imports(module, path))


def _imports(module: str, path: Path) -> Iterator[tuple[str, int]]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def package_of(module: str) -> str:
    return max((name for name in ALLOWED if within(module, name)), key=len)


def is_config(target: str) -> bool:
    """Whether a.b.config or a name in it is imported."""
    parts = target.split(".")
    return within(target, "data_pipeline.config") or (parts[0] == "tim_ds" and "config" in parts[2:])


def complaint(module: str, target: str) -> str | None:
    """Why `module` must not import `target`; None if it may."""
    top = target.partition(".")[0]
    if top in HOMES and not any(within(module, home) for home in HOMES[top]):
        return f"{top} is imported in {' and '.join(HOMES[top])} alone"
    if any(within(target, command) for command in COMMANDS):
        return f"{target} is a command, which imports what its package must not"
    light = within(module, "tim_ds.config") or module.rpartition(".")[2] == "config"
    outside = top not in OURS and top not in sys.stdlib_module_names and top not in HOMES
    if light and outside:
        return "configuration needs the standard library alone"
    package = package_of(module)
    if package == "tim_ds.objective" and outside and top != "torch":
        return "the objective needs torch alone"
    if top not in OURS:
        return None
    allowed = (*ALLOWED[package], *EXCEPTIONS.get(module, ()))
    if light:
        allowed = ("tim_ds.config",) if package == "tim_ds.config" else ()
    elif package != "tim_ds":
        allowed += (package,)
    if package not in ("data_pipeline", "tim_kernels"):
        # packed.py needs torch, which configuration must do without.
        allowed += SHARED[1:] if light else SHARED
        if is_config(target):
            return None
    if any(within(target, name) for name in allowed):
        return None
    return f"{package} may import {', '.join(allowed) or 'nothing of ours'}"


def violations(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: {module} imports {target}: {reason}"
        for module, path in sources(root)
        for target, line in imports(module, path)
        if (reason := complaint(module, target))
    ]


def test_every_import_follows_the_direction():
    assert violations(ROOT) == []


def test_the_check_saw_the_repository():
    seen = {module: {target for target, _ in imports(module, path)} for module, path in sources(ROOT)}
    assert len(seen) > 30
    assert "tim_ds.packed.Segments" in seen["tim_ds.model.tim"]
    assert "yaml" in seen["tim_ds.config.load"]
    assert "webdataset" in {target.partition(".")[0] for target in seen["data_pipeline.shards"]}
    assert all(package_of(module) in ALLOWED for module in seen)
    assert [module for module in seen if package_of(module) == "tim_ds" and module != "tim_ds"] == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("launch/train.py", "from tim_ds.model.tim import TiM"),
        ("tim_ds/eval/table.py", "import tim_ds.trainer.loop"),
        ("tim_ds/eval/table.py", "def f():\n    from tim_ds.trainer import loop"),
        ("tim_ds/pipeline/tim_pipeline.py", "from tim_ds.objective import loss"),
        ("tim_ds/pipeline/request.py", "from data_pipeline.loader import build_loader"),
        ("tim_ds/sampler/loop.py", "from tim_ds.model import tim"),
        ("tim_ds/sampler/loop.py", "from tim_ds.objective.loss import transition_loss"),
        ("tim_ds/objective/loss.py", "from ..model.tim import TiM"),
        ("tim_ds/objective/loss.py", "from tim_ds.sampler.guidance import combine"),
        ("tim_ds/objective/loss.py", "from tim_ds.objective.derivative_error import at_precision"),
        ("tim_ds/trainer/loop.py", "from tim_ds.objective import derivative_error"),
        ("tim_ds/objective/derivative_error.py", "from tim_ds.eval.frechet import fit_gaussian"),
        ("tim_ds/objective/loss.py", "import numpy as np"),
        ("tim_ds/model/blocks.py", "from tim_kernels.swiglu import op"),
        ("tim_ds/model/tim.py", "from tim_ds.objective.transport import Transport"),
        ("tim_ds/model/weights.py", "from tim_ds.config.recipe import Recipe"),
        ("tim_ds/model/config.py", "import torch"),
        ("tim_ds/model/config.py", "from tim_ds.model.tim import TiM"),
        ("tim_ds/model/config.py", "from tim_ds.packed import Segments"),
        ("tim_ds/config/recipe.py", "from tim_ds.trainer.loop import fit"),
        ("tim_ds/config/check.py", "import yaml"),
        ("tim_ds/config/load.py", "import numpy"),
        ("tim_ds/trainer/loop.py", "import deepspeed"),
        ("tim_ds/trainer/loop.py", "from deepspeed.ops import adam"),
        (
            "tim_ds/trainer/loop.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import webdataset",
        ),
        ("tim_ds/model/ops.py", "import triton.language as tl"),
        ("data_pipeline/loader.py", "from tim_ds.packed import Segments"),
        ("data_pipeline/config.py", "from tim_ds.errors import ConfigError"),
        ("data_pipeline/index.py", "import webdataset as wds"),
        ("kernels/tim_kernels/swiglu/op.py", "from tim_ds.errors import ShapeError"),
        ("kernels/tim_kernels/swiglu/op.py", "import data_pipeline"),
        ("tim_ds/packed.py", "from tim_ds.model.tim import TiM"),
        ("tim_ds/__init__.py", "from tim_ds.config.load import load_recipe"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("launch/train.py", "from tim_ds.trainer.run import train"),
        ("tim_ds/trainer/engine/process_group.py", "import deepspeed"),
        ("tim_ds/trainer/loop.py", "from data_pipeline.loader import build_loader"),
        ("tim_ds/eval/table.py", "from tim_ds.sampler.transition import sample"),
        ("tim_ds/pipeline/encoders.py", "from data_pipeline.encoders.autoencoder import build_autoencoder"),
        ("tim_ds/sampler/loop.py", "from tim_ds.objective.transport import Transport"),
        ("tim_ds/sampler/loop.py", "from tim_ds.objective.config import TransportConfig"),
        ("tim_ds/sampler/loop.py", "from ..packed import Segments"),
        (
            "tim_ds/objective/loss.py",
            "from . import transport\nimport torch.nn.functional as nnf\nimport math",
        ),
        ("tim_ds/objective/derivative_error.py", "from tim_ds.model.tim import TiM"),
        ("tim_ds/model/ops.py", "from tim_kernels.swiglu import op"),
        (
            "tim_ds/model/weights.py",
            "from tim_ds.config.decode import decode\nfrom tim_ds import __version__",
        ),
        ("tim_ds/trainer/config.py", "from tim_ds.sampler.config import SamplerConfig"),
        ("tim_ds/config/recipe.py", "from data_pipeline.config import DataConfig"),
        ("kernels/tim_kernels/swiglu/kernel.py", "import triton\nimport torch"),
    ],
)
def test_a_right_import_is_accepted(tmp_path: Path, file: str, line: str):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    assert violations(tmp_path) == []
