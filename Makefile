# Every target works on a fresh machine: it makes .venv, installs the package into it and goes on.
#   make quickstart   pretrain a small encoder on real images, in minutes, on any CPU
#   make test         the tests;  make test-slow: also the long ones
#   make lint         ruff and mypy
#   make bench        one training step of each objective beside other libraries (docs/performance.md)

PYTHON      ?= python3
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=

VENV := .venv
BIN  := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: quickstart test test-slow lint bench install clean
.DEFAULT_GOAL := test

quickstart: $(READY)
	$(BIN)/hybrid-ssl pretrain recipes/quickstart.yaml run.out=runs/quickstart-$$(date +%Y%m%d-%H%M%S)

# One thread for each process: on few cores, tests that start two processes are far faster so.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "slow or not slow" $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

install: $(READY)

# A stamp is written last, so that an interrupted installation is repeated.
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

$(READY): pyproject.toml $(CONSTRAINTS)
	@echo "== installing into $(VENV); the first time takes some minutes"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) -e ".[dev]"
	@touch $@

$(VENV)/.bench: $(READY)
	$(PIP) -e ".[bench]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
