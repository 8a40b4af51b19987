"""The repository must not get in the way of the libraries it stands on.

`kernels` is also the name of a package of Hugging Face, which transformers and diffusers import when they
find one. Started from the repository root, Python finds our folder of that name. As long as it has no
__init__.py it is only a namespace without content, which they ignore; with an __init__.py it would be
*executed*, and one that carries a `__version__` makes T5, Gemma and the autoencoders fail to import. Hence
the name `tim_kernels`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import importlib.util
import sys
from pathlib import Path

root = Path.cwd()
assert Path(sys.path[0] or ".").resolve() == root, sys.path
sys.path.insert(1, str(root / "kernels"))

from diffusers import AutoencoderDC, AutoencoderKL
from transformers import AutoTokenizer, Gemma3ForCausalLM, T5EncoderModel

found = importlib.util.find_spec("kernels")
if found is not None and found.origin is None:
    # A folder without __init__.py: nothing in it is run or offered.
    import kernels
    assert getattr(kernels, "__file__", None) is None
    assert not hasattr(kernels, "__version__")
elif found is not None:
    assert root not in Path(found.origin).parents, f"kernels is a package of ours: {found.origin}"

import tim_kernels
assert root / "kernels" / "tim_kernels" in Path(tim_kernels.__file__).parents
print(AutoencoderDC.__name__, AutoencoderKL.__name__, Gemma3ForCausalLM.__name__, T5EncoderModel.__name__)
"""


def test_transformers_and_diffusers_import_from_the_repository_root():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # No PYTHONPATH: the program sets the path that a user in this folder has.
        env={**_environment(), "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["AutoencoderDC", "AutoencoderKL", "Gemma3ForCausalLM", "T5EncoderModel"]


def test_the_kernels_folder_is_not_a_package():
    assert (ROOT / "kernels" / "tim_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
