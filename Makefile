# All targets use one virtual environment: make PYTHON=python3.12 VENV=/elsewhere/env
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-pythons lint docs release-check docker gpu-check kernels-report kernels-emulate torture fuzz audit sbom interop fleet fleet-triton fleet-ray clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install_pinned.py '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m tools.demo

# Test files in parallel, one thread each, the longest first (tests/conftest.py): three on two cores, since many tests
# wait. A worker that crashes or hangs is not restarted: xdist would repeat the test that crashed it, up to 16 times.
# Bytecode is kept, whatever the environment says: commands that tests start would compile the project anew.
test: setup
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 3 --dist loadfile \
		--no-loadscope-reorder --max-worker-restart 0

# The tests that need no torch, on other Pythons; those that are not installed are left out.
PYTHONS ?= 3.10 3.11 3.12 3.13
test-pythons: build/test-models/.ready
	$(BIN)/python -m tools.test_pythons $(PYTHONS)

# Exported models for them, made anew when what exports them has changed.
build/test-models/.ready: $(VENV)/.ready $(wildcard exporter/*/*.py models/*.py stepcell/*.py tests/exported_models.py)
	rm -rf $(@D)
	$(BIN)/python -m tests.exported_models $(@D)
	touch $@

# Tests and measurements that need a GPU; skipped with a message on a machine without one.
gpu-check: setup
	$(BIN)/python -m pytest tests/gpu tests/plugins/kernels/test_device.py -v -s
	$(BIN)/python benchmarks/kernels.py --kernels $${STEPCELL_KERNELS:-build/kernels}

# Registers, spills and code size of every kernel for every GPU (ten minutes, no GPU needed).
kernels-report: setup
	$(BIN)/python -m tools.kernels_report

# What tools and runtimes of others do with an exported file: docs/interop.md and its JSON (ten minutes, 3 GB of packages).
interop: setup build/interop/.ready
	$(BIN)/python -m tools.interop build/interop/bin/python

build/interop/.ready: tools/interop/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	touch $@

# Real servers of Triton, real clients, a Ray cluster, and everything that is done to them (half an hour; HAProxy from the
# system, network namespaces for Ray).
fleet: fleet-triton fleet-ray

fleet-triton: build/fleet/denoiser.onnx build/fleet/.ready
	OMP_NUM_THREADS=1 build/fleet/bin/python -m tools.fleet $< --output benchmarks/results/fleet.json

fleet-ray: build/fleet/denoiser.onnx build/fleet-ray/.ready
	OMP_NUM_THREADS=1 build/fleet-ray/bin/python -m tools.fleet.corpus $< --output benchmarks/results/fleet_ray.json

build/fleet/denoiser.onnx: setup
	mkdir -p $(@D)
	$(BIN)/stepcell export models/zoo/denoiser.safetensors -o $@ --precision float32 --overwrite

build/fleet/.ready: tools/fleet/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	$(@D)/bin/python -m pip install --quiet --editable .
	touch $@

build/fleet-ray/.ready: tools/fleet/ray_requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	$(@D)/bin/python -m pip install --quiet --editable .
	touch $@

# Every kernel with every tile in an emulator of PTX (fifteen minutes, no GPU needed).
kernels-emulate: setup
	$(BIN)/python -m tools.ptx_emulator

# 500 kills, full disks, little memory, two writers, lost cameras, a clock that is set (an hour, no GPU needed).
torture: setup
	$(BIN)/python -m tools.torture --output benchmarks/results/torture.json

# Style, types, import rules ([tool.importlinter] in pyproject.toml), types of the public API, and the Dockerfile.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if [ -x $(BIN)/lint-imports ]; then $(BIN)/lint-imports; else echo "import rules: not checked on Python 3.10"; fi
	$(BIN)/python -m tools.check_public_types
	$(BIN)/hadolint Dockerfile

# The guides and the API reference as a site in site/. Every link and anchor must exist.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Version, changelog, wheel and sdist; the wheel in a clean environment. docs/releasing.md has the other steps.
release-check: setup
	$(BIN)/python -m tools.release_check

# Known vulnerabilities of the pinned packages; asks the public database of PyPI, so it needs the network.
audit: build/release/.ready
	build/release/bin/pip-audit --no-deps --disable-pip --requirement constraints.txt

# The packages of a release and their licences in CycloneDX form, from the environment of `make setup`.
sbom: setup build/release/.ready
	build/release/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible \
		--output-file build/stepcell.cdx.json

build/release/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv build/release
	build/release/bin/python tools/install_pinned.py '.[release]'
	touch $@

# The demonstration in a container.
docker:
	docker build --tag stepcell .
	docker run --rm --volume "$(CURDIR)/demo-output:/stepcell/demo-output" stepcell

# Changed files of every kind, an hour for each (FUZZ_SECONDS); only errors of stepcell may come of them.
FUZZ_SECONDS ?= 3600
fuzz: $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

$(VENV)/.fuzz: $(VENV)/.ready
	$(BIN)/python tools/install_pinned.py '.[fuzz]'
	touch $@

clean:
	rm -rf build dist site demo-output $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache
