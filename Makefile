# Every target does its own set-up in .venv; `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
# torch from your package index. A smaller CPU build: make install TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
# An installed GPU build of torch 2.11 or later: make install TORCH= VENV_FLAGS=--system-site-packages
TORCH ?= torch==2.13.0
VENV_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
ARGS ?=
# Two workers of one thread each: model tests are small, and more threads than cores would only wait for each other.
TEST_WORKERS ?= 2

.PHONY: help install run chat test test-long test-clients soak eval lint format type bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)$$/  make \1|\2/' | column -t -s'|'

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Fathom needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
ifneq ($(strip $(TORCH)),)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
endif
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

install: $(VENV)/.installed ## install Fathom and its test tools into .venv

run: install ## serve the embedded model (or MODEL=DIR) on 127.0.0.1:8000; more flags in ARGS
	$(BIN)/python -m server serve $(MODEL) $(ARGS)

chat: install ## talk to the server that `make run` started
	$(BIN)/fathom chat $(ARGS)

test: install ## run the tests (minutes); TESTS=path picks some
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m 'not long and not gpu and not clients' --durations=10 $(or $(TESTS),tests)

test-long: install ## run the slow tests as well (a million tokens among them)
	$(BIN)/python -m pytest -m long --durations=10 $(or $(TESTS),tests)

test-clients: install ## run coding agents and client libraries against the server (installs them into .clients/, 2 GB)
	$(BIN)/python -m pytest -m clients --durations=10 $(or $(TESTS),tests/clients)

soak: install ## ten million operations on the symbolic device (about an hour); OPS=n for fewer
	OMP_NUM_THREADS=1 $(BIN)/python tests/engine/symbolic/soak.py --ops $(or $(OPS),10000000) --workers $(TEST_WORKERS)

eval: install ## score the embedded model (or MODEL=DIR) on held-out examples through a server; more in ARGS
	$(BIN)/python -m embedded.evaluation $(if $(findstring --url,$(ARGS)),,$(or $(MODEL),$$($(BIN)/python -m model.tools.default_model))) $(ARGS)

lint: install ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: install ## check types
	$(BIN)/mypy

bench: install ## measure prefill and decode beside transformers; writes tests/bench/results/
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/bench/bench_model.py $(ARGS)

clean: ## remove .venv and caches
	rm -rf $(VENV) .clients build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
