# One command each: set up, see it learn, test, check. `make help` lists them.
PYTHON ?= python3
DEVICE ?=
TEST_WORKERS ?= 2
BIN := .venv/bin
export DEVICE
SHELL := /bin/bash

.PHONY: help setup quickstart test lint docs clean

help:  ## Shows this list.
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 18

setup:  ## Makes .venv. DEVICE=cpu or DEVICE=gpu overrides the device that is found, PYTHON=... picks the interpreter.
	@$(PYTHON) requirements/install.py

quickstart: setup  ## Sets up, trains a small language model with GRPO, and draws its curve.
	@$(BIN)/llmquest-rl train configs/quickstart.yaml

test: setup  ## Sets up and runs all tests without a network, in TEST_WORKERS processes (2).
	@echo "test: running all tests"
	@HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) \
		--dist loadfile --no-loadscope-reorder

lint: setup  ## Sets up and runs the checks that CI runs beside the tests: format, lint, types, imports, recipes, documentation.
	@.ci/lint

docs: setup  ## Sets up, makes the tables that come from code, and builds the documentation site; dead links are errors.
	@$(BIN)/python -m trainer.cli.generated_docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: open site/index.html, or run $(BIN)/mkdocs serve"

clean:  ## Removes .venv, the caches and the built site; runs are kept.
	rm -rf site .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build *.egg-info
