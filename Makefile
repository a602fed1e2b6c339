# One command each: set up, see it learn, test, check. `make help` lists them.
PYTHON ?= python3
DEVICE ?=
TEST_WORKERS ?= 2
BIN := .venv/bin
export DEVICE
SHELL := /bin/bash

.PHONY: help setup quickstart test lint docs clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/'

setup:  ## make .venv (DEVICE=cpu|gpu overrides what is found, PYTHON=... picks the interpreter)
	@$(PYTHON) requirements/install.py

quickstart: setup  ## set-up, then train a small language model with GRPO and draw its curve
	@$(BIN)/llmquest-rl train configs/quickstart.yaml

test: setup  ## set-up, then all tests, offline, in TEST_WORKERS processes (2)
	@echo "test: running all tests"
	@HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) \
		--dist loadfile --no-loadscope-reorder

lint: setup  ## formatting, lint, types, import rules, configuration files: what CI checks beside the tests
	@.ci/lint

docs: setup  ## make docs/configuration.md from the typed tree
	@$(BIN)/python -m trainer.config_docs

clean:  ## remove .venv and caches (runs are kept)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
