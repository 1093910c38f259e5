# Everything a newcomer or CI runs. `make demo` and `make test` need Debian's make, git, python3 (>= 3.11) and python3-venv.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test check fast lint types imports soak package fix clean

PYTHON ?= python3
VENV ?= .venv
# the torch requirement: any pip requirement or the path of a wheel, e.g. TORCH=./torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl
TORCH ?= torch==2.13.0
# long trials: SOAK_COUNT trials of each kind from SOAK_SEED; CI runs one hundredth of the default
SOAK_COUNT ?= 200
SOAK_SEED ?= 0
# words handed on: make demo DEMO="--seconds 60", make test TEST="tests/ops"
DEMO ?=
TEST ?=

BIN := $(VENV)/bin
STAMP := $(shell cat pyproject.toml Makefile | cksum | cut -d' ' -f1)-$(shell echo '$(TORCH)' | cksum | cut -d' ' -f1)
RUN_STAMP := $(VENV)/.run-$(STAMP)
DEV_STAMP := $(VENV)/.dev-$(STAMP)

help:
	@echo "make demo      install, then train a small model on this machine's own text and talk to it"
	@echo "make test      install, then run the tests"
	@echo "make check     everything CI runs"
	@echo "make soak      long trials (SOAK_COUNT=$(SOAK_COUNT) SOAK_SEED=$(SOAK_SEED))"
	@echo "make fix       format and repair what lint can repair"

$(RUN_STAMP):
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing: apt-get install python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: install python3.11 or name another one, make demo PYTHON=python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "the venv module is missing: apt-get install python3-venv" >&2; exit 2; }
	@echo "installing into $(VENV) (once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@extra=$$($(BIN)/python -c 'import torch; print("" if torch.version.cuda else ",interpreter")'); \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev$$extra]"
	@touch $@

demo: $(RUN_STAMP)
	@GOMP_SPINCOUNT=1000 $(BIN)/alloy demo $(DEMO)

test: $(DEV_STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TEST)

fast: $(DEV_STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not multi" $(TEST)

lint: $(DEV_STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell src docs benchmarks README.md CONTRIBUTING.md CHANGELOG.md

types: $(DEV_STAMP)
	@$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(DEV_STAMP)
	@$(BIN)/lint-imports

soak: $(DEV_STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak --soak-count $(SOAK_COUNT) --soak-seed $(SOAK_SEED)

# the wheel and the sdist, checked, and the wheel used in an environment that never saw the source tree
package: $(DEV_STAMP)
	@rm -rf dist build/package
	@$(BIN)/python -m build --outdir dist . >/dev/null
	@$(BIN)/twine check --strict dist/*
	@$(PYTHON) -m venv build/package/venv
	@build/package/venv/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@build/package/venv/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	@cd build/package && venv/bin/alloy doctor >/dev/null && venv/bin/alloy pretrain pretrain/tiny --quiet --run-dir run
	@rm -rf build/package
	@echo "package: built, checked, installed and used"

check: test lint types imports package
	@$(MAKE) --no-print-directory soak SOAK_COUNT=$$(( ($(SOAK_COUNT) + 99) / 100 ))

fix: $(DEV_STAMP)
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
