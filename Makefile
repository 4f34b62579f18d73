# Each target, alone, makes what it needs: `make bench` and `make test` work in a fresh clone
# on a machine with nothing but Python >= 3.11. PYTHON=/path/to/python chooses another one.

VENV ?= .venv
BIN := $(VENV)/bin
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
	$$name -c '$(IS_NEW_ENOUGH)' 2>/dev/null && echo $$name && break; done)
PYTEST_FLAGS ?= -n auto
BENCH_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help bench test check format clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

bench: $(VENV)/.bench  ## run the 250-point experiment and write its report under reports/
	$(BIN)/moejax bench $(BENCH_FLAGS)
	$(BIN)/moejax report

test: $(VENV)/.test  ## run the test suite
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(VENV)/.test  ## run every check: lint, format, types, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

format: $(VENV)/.test  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
		echo 'error: no Python >= 3.11 found' >&2; echo >&2; \
		echo 'hint: Install one, or name it: make test PYTHON=/path/to/python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
