# Start here: `make run` or `make test`. Both set up a missing environment first.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

RECIPE ?= trainer/recipes/stdlib.yaml
ARGS ?=
VERSION := $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
IMAGE ?= diloco-pipelines-python:$(VERSION)
ACCELERATOR ?= cuda
TORCH_INDEX ?=

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
SOURCES := pipelines components trainer tests
# One more than there are cores: tests spend much of their time waiting.
TESTERS = $(shell $(BIN)/python -c 'import os; print(min(8, os.cpu_count() + 1))')
LINT = $(BIN)/ruff check --quiet $(SOURCES) examples && \
    $(BIN)/ruff format --check --quiet $(SOURCES) examples && \
    $(BIN)/mypy --no-error-summary && \
    { imports=$$($(BIN)/lint-imports --no-cache --no-logo) || { echo "$$imports"; false; }; } && \
    $(BIN)/codespell

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

setup: $(READY)  ## create .venv with all dependencies, pinned

$(READY): pyproject.toml constraints.txt
	@for python in python3.12 python3.11 python3 none; do \
	    $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && break; \
	done; \
	if [ $$python = none ]; then \
	    echo 'error: Python 3.11 or 3.12 is needed, but none of python3.12, python3.11 and python3 on the PATH is one' >&2; \
	    exit 1; \
	fi; \
	echo "setting up $(VENV) with $$($$python --version): this takes some minutes, once"; \
	$$python -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[local,dev]' \
	    | { grep --line-buffered -oE 'Downloading [^ ]+ \([0-9.]+ (MB|GB)\)|Installing collected packages' || true; }
	@touch $@

run: $(READY)  ## train, export and evaluate on this machine (RECIPE=file.yaml, ARGS="--total-steps 100 ...")
	@$(BIN)/python -m pipelines run --config $(RECIPE) $(ARGS)

# Lint runs in parallel with the tests, which often wait, and prints only if it fails. Not with $(MAKE), which --dry-run would run.
test: $(READY)  ## lint and run all tests that need no cluster and no GPU (ARGS="-k name")
	@log=$$(mktemp); trap 'rm -f $$log' EXIT; trap 'exit 130' INT; { $(LINT); } >$$log 2>&1 & lint=$$!; tests=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not faults" -n $(TESTERS) --dist loadfile --no-loadscope-reorder $(ARGS) || tests=$$?; \
	wait $$lint || { echo 'error: lint failed:'; cat $$log; exit 1; }; \
	exit $$tests

soak: $(READY)  ## inject random faults into runs, and verify each run (ARGS="--minutes 120 --seed 7")
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak $(ARGS)

test-faults: $(READY)  ## kill, freeze and disconnect real processes; ends with a table of results (about half an hour)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m faults tests/faults tests/integration $(ARGS)

test-cluster: $(READY)  ## run the steps on KUBECONFIG's cluster, with the image DILOCO_TEST_IMAGE (needs 2.25 CPU, 4.5 GiB of memory, Kubeflow Trainer or training operator, default storage class)
	@$(BIN)/python -m pytest -q -rs tests/cluster $(ARGS)

bench: $(READY)  ## run the benchmarks; each prints its measurements
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done

bench-gpu: $(READY)  ## measure on this machine's GPUs, in under 8 minutes and without a network
	@$(BIN)/python tests/benchmarks/bench_gpu.py $(ARGS)

lint: $(READY)  ## ruff, mypy, the import contract and spelling
	@$(LINT)

format: $(READY)  ## format the sources with ruff
	@$(BIN)/ruff check --quiet --fix $(SOURCES) examples
	@$(BIN)/ruff format $(SOURCES) examples

compile: $(READY)  ## write the compiled pipeline to build/
	@$(BIN)/python -m pipelines compile $(ARGS)

submit: $(READY)  ## run the pipeline on a Kubeflow backend (ARGS="--host URL --wait ...")
	@$(BIN)/python -m pipelines submit $(ARGS)

schedule: $(READY)  ## run it there repeatedly (ARGS="create|list|pause|resume|delete ...")
	@$(BIN)/python -m pipelines schedule $(ARGS)

build:  ## build the container image (ACCELERATOR=cuda|rocm|cpu; rocm and cpu need TORCH_INDEX=<index of torch's wheels>)
	docker build --build-arg ACCELERATOR=$(ACCELERATOR) --build-arg TORCH_INDEX=$(TORCH_INDEX) \
	    --tag $(IMAGE)$(if $(filter-out cuda,$(ACCELERATOR)),-$(ACCELERATOR)) .

manifests: $(READY)  ## render the examples, etcd's settings and the chart's values in manifests/ (ARGS="--etcd-heartbeat-interval 100 ..."), and the components' pages
	@$(BIN)/python -m trainer.kubernetes.objects.render --manifests manifests $(ARGS)
	@$(BIN)/python -m components.readme

clean:  ## remove build outputs and caches, but not .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

clean-runs:  ## remove runs/ with all checkpoints, models and reports
	rm -rf runs

.PHONY: help setup run test test-faults soak test-cluster bench bench-gpu lint format compile submit schedule build manifests clean clean-runs
