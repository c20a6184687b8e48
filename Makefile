# Every target sets up what it needs; the environment is built once and rebuilt when the dependencies change.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# What the contract must stay compatible with: the last release, or what is committed if there is none yet.
RELEASED = $(shell git describe --tags --abbrev=0 2>/dev/null || git rev-parse HEAD)
GIT_DIR = $(shell git rev-parse --path-format=absolute --git-common-dir)
# Tests wait for servers most of the time: two at once, each with one thread for torch, take half as long as one.
TEST_PROCESSES ?= 2
# A run that takes longer is ended, with the names of the tests that were running.
TEST_TIMEOUT_S ?= 1500
DEMO_OPTIONS := $(if $(QUICK),--quick)

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types imports contract bench compose-test dashboards-test helm-test report documents up proto clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[local,tracing]' --group dev
	touch $@

demo: $(READY) ## Train the same model twice, uniform and chosen by the running stack, and compare (QUICK=1: one minute)
	$(BIN)/python trainer/examples/emoji/demo.py $(DEMO_OPTIONS)

test: $(READY) ## Run all tests, against real servers
	OMP_NUM_THREADS=1 $(BIN)/python -P tests/support/supervise.py $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --run-timeout $(TEST_TIMEOUT_S) --cov --cov-report=term

check: lint types imports contract test ## All that CI runs

# checkov and what else the chart's checks need, in an environment of their own.
HELM_TOOLS := .cache/tools/helm-test

$(HELM_TOOLS)/.ready: deploy/checks/helm/requirements.txt
	test -x $(HELM_TOOLS)/bin/python || $(PYTHON) -m venv $(HELM_TOOLS)
	$(HELM_TOOLS)/bin/python -m pip install --quiet --requirement $<
	touch $@

helm-test: $(READY) $(HELM_TOOLS)/.ready ## Check the Helm chart with real helm 3 and 4, no cluster needed
	PYTHONPATH=deploy/checks $(HELM_TOOLS)/bin/python deploy/checks/helm/check.py
	PYTHONPATH=deploy/checks:tests $(BIN)/python deploy/checks/helm/accepted.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

contract: $(READY) proto
	git diff --exit-code -- protos
	cd protos && ../$(BIN)/buf lint
	cd protos && ../$(BIN)/buf breaking --against '$(GIT_DIR)#ref=$(RELEASED),subdir=protos'

bench: $(READY) ## Measure the selection and the service on this machine (about an hour)
	$(BIN)/python -m jest_bench selection --json benchmarks/results/selection.json
	$(BIN)/python -m jest_bench rpc --json benchmarks/results/rpc.json
	$(BIN)/python -m jest_bench rounding --json benchmarks/results/rounding.json
	$(BIN)/python benchmarks/stand_in/export.py .cache/stand_in_reference
	$(BIN)/python -m jest_bench scorer --model-repository .cache/stand_in_reference --json benchmarks/results/scorer.json
	$(BIN)/python -m jest_bench memory --model-repository .cache/stand_in_reference --json benchmarks/results/memory.json
	$(BIN)/python benchmarks/plot_memory.py benchmarks/results/memory.json docs/memory.svg

dashboards-test: $(READY) ## Check rules, alerts and dashboards against a real Prometheus (a minute)
	PYTHONPATH=deploy/checks:tests $(BIN)/python deploy/checks/dashboards

report: $(READY) ## Draw the dashboards of a short training run: results/dashboards/*.png
	PYTHONPATH=deploy/checks:tests $(BIN)/python deploy/checks/dashboards --seconds 90 --report results/dashboards

up: $(READY) ## Start the whole stack on this machine, MODEL_REPOSITORY=PATH (Ctrl-C ends it)
	$(BIN)/jest-server up $(if $(MODEL_REPOSITORY),--model-repository $(MODEL_REPOSITORY))

compose-test: $(READY) ## Build the images, run docker-compose.yml, and kill every service while a job trains
	$(BIN)/hadolint deploy/docker/Dockerfile
	PYTHONPATH=tests $(BIN)/python deploy/checks/compose.py $(if $(WHERE_POSSIBLE),--where-possible)

documents: $(READY) $(HELM_TOOLS)/.ready ## Write what is made from code: the page of metrics, the dashboards, the chart's README and schema
	$(BIN)/jest-server metrics > docs/metrics.md
	$(BIN)/python deploy/observability/make_dashboards.py
	PYTHONPATH=deploy/checks $(HELM_TOOLS)/bin/python deploy/checks/helm/documents.py

proto: $(READY) ## Generate the protobuf code again
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python protos/generate.py

clean: ## Remove everything that make has made
	rm -rf $(VENV) .cache results build dist .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
