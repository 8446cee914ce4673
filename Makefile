# Everything runs in .venv, which is made on the way. Needs Python 3.11 or later with pip, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := $(VENV)/.bench

.PHONY: help setup demo test chaos bench bench-quick check format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 21

setup: $(READY) ## make the virtual environment, with everything that the project and its tests need

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mnemobus needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## run the whole system on this machine: write, read, kill a worker, and check the promises
	@$(BIN)/mnemobus demo $(ARGS)

test: $(READY) ## run the tests, against real servers; ARGS="-k feed" passes options to pytest
	@$(BIN)/python -m pytest -n 4 --dist loadfile $(ARGS)

chaos: $(READY) ## run a campaign of faults for some minutes; ARGS="--seed 1 --minutes 10 --store postgres"
	@PYTHONPATH=tests $(BIN)/python -m chaos.campaign $(ARGS)

bench: $(BENCH) ## measure beside the alternatives, in ten minutes; ARGS=--help lists the options
	@PYTHONPATH=.:tests $(BIN)/python -m bench $(ARGS)

bench-quick: $(BENCH) ## the same in a minute, to check that it works
	@PYTHONPATH=.:tests $(BIN)/python -m bench --quick $(ARGS)

$(BENCH): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

check: $(READY) ## check lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove the files that make has made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
