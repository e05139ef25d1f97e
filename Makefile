# `make help` lists the targets. Every target creates .venv if it is missing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
CORES := $(shell getconf _NPROCESSORS_ONLN)
# Test workers: more than two cores, since many tests wait for processes of their own.
WORKERS ?= $(shell echo $$(( $(CORES) < 3 ? 3 : $(CORES) > 8 ? 8 : $(CORES) )))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
LOCK := $(if $(filter-out 0,$(GPUS)),cuda,cpu)
NPROC ?= $(if $(filter cuda,$(LOCK)),$(GPUS),$(if $(filter 1,$(CORES)),1,2))
PIP := $(BIN)/python -m pip install -qq --progress-bar off --disable-pip-version-check
export PYTHONUNBUFFERED := 1

# A stamp file is written last, so that an interrupted install is repeated.
RUNTIME := $(VENV)/.runtime-$(LOCK)
PACKAGE := $(VENV)/.package
DEV := $(VENV)/.dev

.PHONY: help demo test lint test-fast test-slow install install-dev lock clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(PACKAGE) data/demo/manifest.json  ## train and evaluate on a small synthetic dataset
	@echo "== train on $(NPROC) process(es)"
	PATH=$(CURDIR)/$(BIN):$$PATH PET_NPROC_PER_NODE=$(NPROC) \
	    launch/torchrun.sh train configs/demo.yaml run.dir=runs/demo
	echo "== evaluate out of distribution"
	$(BIN)/cnsdiff evaluate runs/demo --split test_ood
	echo "== the dataset is in data/demo, the run in runs/demo:"
	ls runs/demo

data/demo/manifest.json: | $(PACKAGE)
	@echo "== prepare a synthetic dataset in data/demo"
	$(BIN)/cnsdiff prepare data/demo --synthetic

test: lint test-fast  ## lint, types, import rules and the default tests

lint: $(PACKAGE) $(DEV)  ## ruff, mypy, import-linter, shellcheck and hadolint
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch
	$(BIN)/hadolint Dockerfile

test-fast: $(PACKAGE) $(DEV)  ## the default tests (not slow, not gpu)
	@echo "== tests, by $(WORKERS) workers"
	$(PYTEST)

test-slow: $(PACKAGE) $(DEV)  ## the slow tests
	@echo "== slow tests, by $(WORKERS) workers"
	$(PYTEST) -m "slow and not gpu" --timeout 1800

install: $(PACKAGE)  ## .venv with cnsdiff, pinned

install-dev: $(PACKAGE) $(DEV)  ## the same, with the test tools

$(RUNTIME): requirements/$(LOCK).txt requirements/cpu-nodeps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "make: $(PYTHON) is older than 3.11; name another: make PYTHON=python3.11" >&2; exit 1; }
	echo "== $(VENV): a new environment with $$($(PYTHON) --version)"
	$(PYTHON) -m venv --clear $(VENV)
	echo "== $(VENV): torch (the largest download)"
	$(PIP) "$$(grep '^torch==' requirements/$(LOCK).txt)"
	echo "== $(VENV): requirements/$(LOCK).txt"
	$(PIP) -r requirements/$(LOCK).txt
	if [ $(LOCK) = cpu ]; then $(PIP) --no-deps -r requirements/cpu-nodeps.txt; fi
	touch $@

$(PACKAGE): $(RUNTIME) pyproject.toml
	@echo "== $(VENV): cnsdiff_dist itself"
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(DEV): $(RUNTIME) requirements/dev.txt
	@echo "== $(VENV): requirements/dev.txt"
	$(PIP) -r requirements/dev.txt
	touch $@

lock: $(RUNTIME)  ## resolve pyproject.toml again into requirements/*.txt
	@$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python requirements/lock.py

clean:  ## remove .venv, the demo and caches
	rm -rf $(VENV) data/demo runs/demo build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
