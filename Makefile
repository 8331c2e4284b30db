# make train | test | lint | audit | bench | cuda-check | versions | lessons | speedrun-cpu: each
# sets up .venv by itself first. make gpu-check takes the torch of this machine's own Python instead.
# make train ARGS='--steps 100' passes flags on; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin
# Two stamps on one environment: what training needs, and what tests and linters need beside it.
RUNTIME := .venv/runtime
READY := .venv/ready
GPU_VENV := build/gpu-check/venv
NEW_ENOUGH := -c 'import sys; sys.exit("error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

.PHONY: train test lint audit bench cuda-check gpu-check versions lessons speedrun-cpu clean

train: $(RUNTIME)
	@$(BIN)/python train_gpt2.py demo $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest -q -n 2 $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

audit: $(READY)
	@$(BIN)/python -m kernels.audit $(ARGS)

bench: $(READY)
	@$(BIN)/python -m tests.bench $(ARGS)

cuda-check: $(RUNTIME)
	@$(BIN)/python -m tests.nullgpu $(ARGS)

gpu-check: $(GPU_VENV)/ready
	@$(GPU_VENV)/bin/python -m tests.gpucheck $(ARGS)

versions: $(RUNTIME)
	@$(BIN)/python -m tests.versions $(ARGS)

lessons: $(READY)
	@$(BIN)/python -m lessons.render $(ARGS)

speedrun-cpu: $(RUNTIME)
	@$(BIN)/python -m eval.speedrun_cpu $(ARGS)

clean:
	rm -rf .venv build/cuda-check build/gpu-check build/versions

$(RUNTIME): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) $(NEW_ENOUGH)
	@echo "setting up .venv (once, some minutes; PyTorch is large)"
	@$(PYTHON) -m venv .venv
	@$(INSTALL) .
	@touch $@

$(READY): $(RUNTIME)
	@echo "adding what tests and linters need to .venv (once, a minute or two)"
	@$(INSTALL) '.[dev]'
	@touch $@

$(GPU_VENV)/ready: setup.cfg constraints.txt
	@$(PYTHON) $(NEW_ENOUGH)
	@$(PYTHON) -m tests.gpucheck.venv $(GPU_VENV)
	@touch $@
