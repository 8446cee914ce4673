# Everything runs in .venv, which is made on the way. Needs Python 3.11 or later with pip, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := $(VENV)/.bench

.PHONY: help setup demo test chaos bench bench-quick check format clean
.DEFAULT_GOAL := help

help: ## what there is to make
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 21

setup: $(READY) ## the virtual environment, with all that the project and its tests need

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mnemobus needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## the whole system on this machine: writes, reads, kills a worker, and checks the promises
	@$(BIN)/mnemobus demo $(ARGS)

test: $(READY) ## the tests, against real servers; ARGS="-k feed" passes options to pytest
	@$(BIN)/python -m pytest -n 4 --dist loadfile $(ARGS)

chaos: $(READY) ## everything that can go wrong, for some minutes; ARGS="--seed 1 --minutes 10 --store postgres"
	@PYTHONPATH=tests $(BIN)/python -m chaos.campaign $(ARGS)

bench: $(BENCH) ## measures beside the alternatives, in ten minutes; ARGS=--help lists what may be chosen
	@PYTHONPATH=.:tests $(BIN)/python -m bench $(ARGS)

bench-quick: $(BENCH) ## the same in a minute, to see that it works
	@PYTHONPATH=.:tests $(BIN)/python -m bench --quick $(ARGS)

$(BENCH): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

check: $(READY) ## lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## put the code into its form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove what make has made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
