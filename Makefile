# `make demo` and `make test` set up their own environment in .venv, from nothing.

PYTHON ?= python3
VENV ?= .venv
# Installed first and exactly: left to resolve torch by itself, pip may choose a build with gigabytes of CUDA.
TORCH ?= torch==2.13.0
WORKERS ?= 2
DEMO ?= experiments/digits.py
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test format

demo: $(STAMP)
	$(BIN)/python $(DEMO) $(ARGS)

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt $(TORCH)
	$(BIN)/pip install -c constraints.txt -e ".[dev,plot]"
	touch $@
