# `make demo` and `make test` need make, Python >= 3.11 and a package index, and nothing else.

CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python
IS_USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c "$(IS_USABLE)" 2> /dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo report report-real test test-slow test-tpu test-gpu lint format wheel clean

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py

report: $(VENV)/.demo
	$(BIN)/restkv evaluate --grid docs/report/grid.yaml --output build/report
	cp build/report/report.md build/report/*.png docs/report/

# Many hours; it goes on where it was stopped, from what docs/report-real has measured.
report-real: $(VENV)/.demo
	$(BIN)/python scripts/report_real.py measure
	$(BIN)/python scripts/report_real.py pack
	$(BIN)/python scripts/report_real.py report

test: $(VENV)/.test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.test
	$(PYTEST) -m slow

# Compiles for TPUs that need not be there. libtpu stays out of the environment, where JAX would look for a TPU with it.
test-tpu: $(VENV)/.test build/libtpu/.installed
	PYTHONPATH=$(CURDIR)/build/libtpu $(BIN)/python -m pytest tests/tpu

# On a machine with a GPU: its kernels run instead of being interpreted, and products of float32 are of float32.
test-gpu: $(VENV)/.test
	$(PIP) install --quiet --editable ".[gpu]"
	JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest XLA_PYTHON_CLIENT_PREALLOCATE=false \
	XLA_FLAGS=--xla_gpu_autotune_level=0 $(PYTEST) -k "(triton or gpu or golden) and not (pallas_tpu or splash)" \
	tests/kernels tests/caches/test_paged.py tests/eviction/test_golden.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/bin/python
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv found (on Debian, venv is in python3-venv); name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --editable ".[eval]"
	touch $@

build/libtpu/.installed: | $(VENV)/bin/python
	$(PIP) install --quiet --no-deps --target $(@D) libtpu==0.0.52
	touch $@

$(VENV)/.test: pyproject.toml scripts/install_torch.py | $(VENV)/bin/python
	$(PIP) install --quiet --editable ".[dev]"
	$(BIN)/python scripts/install_torch.py
	touch $@
