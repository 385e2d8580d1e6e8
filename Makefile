# Everything runs in a virtual environment of its own: make PYTHON=python3.12 VENV=/elsewhere/env
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := stepcell models exporter runtime plugins tests

.PHONY: setup demo test gpu-check kernels-report kernels-emulate lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m tools.demo

# Two to four files at a time, each on one thread: most of the work is Python's. What crashes or hangs is run once: a
# fresh process would run it again, up to 16 times.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --max-worker-restart 0

# The same promises on a GPU; without one it says what was not run.
gpu-check: setup
	$(BIN)/python -m pytest tests/gpu tests/plugins/kernels/test_device.py -v -s
	$(BIN)/python benchmarks/kernels.py --kernels $${STEPCELL_KERNELS:-build/kernels}

# Registers, spills and code size of every kernel for every GPU (ten minutes, no GPU needed).
kernels-report: setup
	$(BIN)/python -m tools.kernels_report

# Every kernel with every tile in an emulator of PTX (fifteen minutes, no GPU needed).
kernels-emulate: setup
	$(BIN)/python -m tools.ptx_emulator

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build demo-output $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache
