# specblockd: `make run` and `make test` do all the set-up they need on a bare machine.
SHELL  := /bin/bash
PY     ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  ?= torch==2.13.0
CONFIG ?= configs/local.yaml
ROOTS  := bandit cuda_ext daemon drafter verifier

.DEFAULT_GOAL := help
.PHONY: help setup run demo demo-fault test test-fast lint types ci bench gpu-check clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## system packages, virtual environment, editable install (idempotent)

$(VENV)/.ready: pyproject.toml setup.py scripts/setup.sh scripts/constraints.txt $(wildcard cuda_ext/csrc/* cuda_ext/csrc/cuda/*)
	@PY='$(PY)' VENV='$(VENV)' TORCH='$(TORCH)' ROOTS='$(ROOTS)' bash scripts/setup.sh
	@touch $@

run: setup  ## set up and start the daemon on the embedded default (Ctrl-C drains and stops)
	@$(BIN)/specblockd serve -c $(CONFIG)

demo: setup  ## watch adaptation on a shift of traffic; ends with build/demo/report.html
	@$(BIN)/specblockd demo

demo-fault: setup  ## the same daemon with a planted cache fault: reported, nothing trained
	@$(BIN)/specblockd demo --fault --out build/demo-fault

test: setup  ## set up and run every test that needs no GPU
	@bash scripts/test.sh $(BIN)/python

test-fast: setup  ## unit tests only: no Ray, no Redis
	$(BIN)/python -m pytest -m "not gpu and not integration"

lint: setup  ## ruff: style, imports, banned bare names
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy --strict
	$(BIN)/mypy

ci: lint types test  ## exactly what CI runs

bench: setup  ## transformers, plain decoding and every drafter side by side
	$(BIN)/specblockd bench speed --small

gpu-check:  ## tests and measurements on a CUDA device; needs torch, transformers, numpy, safetensors, pytest only
	@if [ -x $(BIN)/python ]; then $(BIN)/python scripts/gpu_check.py $(ARGS); else $(PY) scripts/gpu_check.py $(ARGS); fi

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
