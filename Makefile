# Everything runs in .venv, which is made and kept up to date here:
#   make demo    what effc does, on small models, in a few minutes
#   make test    lint, format, types, tests
#   make bench   effc beside other ways to run models, for hours; `effc bench --help` has parts of it
#
# PYTHON=python3.12   the Python that .venv is made with
# TORCH=torch==2.12.0 another torch than the pinned one, as a pip requirement
# WORKERS=4           test processes

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/pytest -n $(WORKERS) --dist loadfile
# Two makes in one checkout take turns installing.
LOCK := $(if $(shell command -v flock),flock $(VENV)/.lock)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint types bench lock clean distclean FORCE

help:
	@echo "make demo | test | test-all | lint | types | bench | lock | clean | distclean"

demo: $(VENV)/.demo
	$(BIN)/effc demo

test: lint types
	$(PYTEST)

test-all: lint types
	$(PYTEST) -m ""

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/python tools/typecheck.py

bench: $(VENV)/.bench
	@$(MAKE) --no-print-directory $(VENV)/.llama || \
	    echo "llama.cpp could not be built; effc bench goes on without it"
	$(BIN)/effc bench

# Pins again from what .venv holds now.
lock: $(VENV)/.bench
	$(BIN)/python tools/lock.py

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# ---------------------------------------------------------------- the environment

# Each stamp says that its extra was installed from these pins; a later one includes the earlier.
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench: pyproject.toml $(VENV)/constraints.txt
	@echo "installing effc[$(patsubst .%,%,$(@F))] into $(VENV); the first time takes a minute or more"
	$(LOCK) $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check \
	    --constraint $(VENV)/constraints.txt --editable ".[$(patsubst .%,%,$(@F))]"
	@touch $@

$(VENV)/.test: $(VENV)/.demo
$(VENV)/.bench: $(VENV)/.test

# Built for this CPU; those of its instructions that are not to be trusted are left out.
$(VENV)/.llama: pyproject.toml $(VENV)/constraints.txt | $(VENV)/.bench
	@echo "building llama.cpp into $(VENV); the first time takes ten minutes or more"
	CMAKE_ARGS="$$($(BIN)/python -m effc.benchmarks.llama_cpp)" $(LOCK) \
	    $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check \
	    --constraint $(VENV)/constraints.txt --editable ".[llama]"
	@touch $@

$(VENV)/constraints.txt: constraints.txt $(VENV)/.torch
	@sed 's|^torch==.*|$(TORCH)|' constraints.txt > $@

# Changes when TORCH does, and only then.
$(VENV)/.torch: FORCE | $(BIN)/python
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || \
	    { echo "no '$(PYTHON)' found: install Python 3.10 or newer, or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "effc needs Python 3.10 or newer, '$(PYTHON)' is $$($(PYTHON) -V 2>&1): make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
