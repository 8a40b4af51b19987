# Every target makes its own environment first: .venv, built once and again only when pyproject.toml changes.
#   make quickstart   train and compare two small models on real handwriting, on the CPU
#   make test         the tests that need neither a GPU nor a network
#   make check        lint, format, types, spelling, recipes
#   make gpu          tests and benchmarks on a GPU, in the order of their worth (kernels/README.md)
# PYTHON chooses the interpreter of a new environment, TORCH the torch to install in it, for example
#   make test PYTHON=python3.12 TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
# For a torch that brings no Triton of its own (the CPU build): the compiler of kernels/results/resources.json.
TRITON ?= triton==3.7.0
VENV ?= .venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ON_PATH := PATH="$(abspath $(BIN)):$$PATH"
RECIPES := $(wildcard launch/recipes/*.yaml)

.PHONY: quickstart test check gpu clean

quickstart: $(INSTALLED)
	$(ON_PATH) bash launch/quickstart.sh

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu and not multi_gpu and not slow"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(ON_PATH) $(BIN)/pyright
	$(BIN)/codespell
	$(BIN)/python -m tim_ds.config.check --quiet $(RECIPES)

# With the interpreter that is there, and its PyTorch: a GPU may be lent for less time than an environment takes.
# ARGUMENTS go to the command, for example  make gpu ARGUMENTS="--seconds 540 --out results"
gpu:
	$(PYTHON) launch/first_light.py $(ARGUMENTS)

# Leaves the environment (.venv) and the results of runs (runs/) alone.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# torch goes first, in a line of its own: that line decides between the CPU and a CUDA build. Any package that asks
# for torch before it would fetch the default build, which is several gigabytes of CUDA libraries.
# The metric libraries of the extra `eval` come without what they ask for: that is torchvision, whose build on PyPI
# does not import beside a CPU torch and then breaks transformers. The tests need nothing of it.
# An environment that was interrupted half-way has no stamp and is completed here.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -c "import triton" 2> /dev/null || $(BIN)/python -m pip install $(TRITON)
	$(BIN)/python -m pip install -e ".[dev]"
	$(BIN)/python -m pip install --no-deps "torch-fidelity>=0.4" "clean-fid>=0.1.35"
	touch $@
