# Everything runs inside $(VENV), which the first target that needs it creates.
# A changed pyproject.toml installs again; otherwise a second run starts at once.

VENV ?= .venv
BIN := $(VENV)/bin

# The first interpreter that runs and is new enough; say PYTHON=... to choose.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$p"; break; }; done)

PIP := $(BIN)/python -m pip --disable-pip-version-check --retries 10
INSTALL := $(PIP) install --quiet --upgrade-strategy only-if-needed

# Arguments for pytest and the bench, such as TESTS="tests/core -x" or BENCH=--quick.
TESTS ?=
BENCH ?=
# What tests are installed with; EXTRAS=test,tpu audits for TPUs, for 684 MB.
EXTRAS ?= test
# Tests run in this many processes; each has its own simulated devices. One more than two
# cores: many tests wait for servers and for processes of theirs.
JOBS ?= 3

# The platform that make accelerator is for, as JAX calls it: cuda, tpu or cpu.
PLATFORM ?= cuda

.PHONY: help venv demo test check lint format types contracts proto-check deploy-check interop \
	docs bench accelerator wheels clean

help:
	@echo "make demo         plan and initialise a 1.1B model on 8 simulated devices"
	@echo "make test         run the tests"
	@echo "make check        all but the tests: the next five"
	@echo "make lint         ruff: rules and format"
	@echo "make types        pyright"
	@echo "make contracts    which package may import which"
	@echo "make proto-check  is the generated protobuf code current, the wire unbroken?"
	@echo "make deploy-check Dockerfile and Kubernetes manifests, offline"
	@echo "make format       rewrite the code as ruff would have it"
	@echo "make interop      install the Node client that the tests try; needs npm"
	@echo "make docs         the site, into build/site"
	@echo "make bench        measure, side by side with plain jax.jit"
	@echo "make accelerator  test and measure on the devices of this machine, without a network"
	@echo "make wheels       fetch what such a machine lacks, to be carried there"
	@echo "make clean        remove the virtual environment and all caches"

venv: $(VENV)/.installed

# A half-made environment would pass for a whole one the next time, so it goes.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 on PATH; set PYTHON=" >&2; exit 1; }
	@echo "creating $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv "$(VENV)" || { rm -rf "$(VENV)"; \
		echo "no virtual environment: Debian needs apt install python3-venv" >&2; \
		exit 1; }
	@echo '*' > "$(VENV)/.gitignore"

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "installing shardinit into $(VENV)"
	@$(INSTALL) --editable '.[all]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "installing shardinit and what its tests need into $(VENV)"
	@$(INSTALL) --editable '.[$(EXTRAS)]'
	@touch $@ $(VENV)/.installed

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing shardinit and what its developers need into $(VENV)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.test

# PyTorch for the CPU where the index has one: PyPI's own brings CUDA, 3 GB more.
$(VENV)/.torch: pyproject.toml | $(VENV)/.dev
	@echo "installing PyTorch and transformers into $(VENV)"
	@cpu=$$($(PIP) index versions torch 2>/dev/null | grep -oE '[0-9.]+\+cpu' | head -1); \
		$(INSTALL) "torch$${cpu:+==$$cpu}" 'torch>=2.9' 'transformers>=5'
	@touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "installing shardinit and what its site needs into $(VENV)"
	@$(INSTALL) --editable '.[docs]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/shardinit demo

test: $(VENV)/.test
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal --durations 15 $(TESTS)

check: lint types contracts proto-check deploy-check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev $(VENV)/.torch
	$(BIN)/pyright --pythonpath $(BIN)/python

# Contracts see packages outside as one, and ruff's ban has two exempt files.
contracts: $(VENV)/.dev
	$(BIN)/lint-imports
	@! grep -rnE 'jax\._src|from jax import .*\b_src\b' --include='*.py' shardinit \
		|| { echo "jax._src is private to JAX: import it nowhere" >&2; exit 1; }

proto-check: $(VENV)/.dev
	$(BIN)/python protos/generate.py --check
	$(BIN)/buf lint protos
	$(BIN)/buf breaking protos --against protos/first-release.binpb

deploy-check: $(VENV)/.dev
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/python deploy/check.py

interop:
	cd tests/interop && npm ci --no-audit --no-fund --ignore-scripts

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/site

bench: $(VENV)/.installed
	$(BIN)/python -m shardinit.bench $(BENCH)

# With the JAX that the machine has; benchmarks/accelerators.md says what else it needs.
accelerator:
	benchmarks/accelerator.sh "$(PYTHON)" "$(PLATFORM)"

wheels:
	"$(PYTHON)" -m pip download --quiet --no-deps --only-binary :all: \
		--dest wheels --requirement benchmarks/accelerators.txt \
		$(if $(WHEELS_FOR),--python-version $(WHEELS_FOR))

clean:
	rm -rf .venv .venv-new .accelerator .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
