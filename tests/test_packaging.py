"""What pyproject.toml installs; building a distribution needs a network, so its rules are checked instead."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("tim_ds", "data_pipeline", "kernels/tim_kernels")
SCRIPTS = re.search(r"^\[project\.scripts\]\n(.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.M | re.S)


def test_no_folder_with_modules_is_left_out():
    """Without `__init__.py` a folder imports in a checkout, as a namespace, and is not installed."""
    folders = {module.parent for package in PACKAGES for module in (ROOT / package).rglob("*.py")}
    assert len(folders) > len(PACKAGES)
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_type_hints_are_visible_to_those_who_install(package):
    assert (ROOT / package / "py.typed").exists()


def test_commands_lead_to_the_mains_of_the_scripts():
    assert SCRIPTS is not None
    commands = re.findall(r'^tim-(\w+) = "([\w.]+):(\w+)"$', SCRIPTS.group(1), re.M)
    assert [name for name, _, _ in commands] == ["train", "sample", "evaluate"]
    for name, module, function in commands:
        script = (ROOT / "launch" / f"{name}.py").read_text()
        assert f"from {module} import {function}\n" in script
        assert callable(getattr(importlib.import_module(module), function))
