# Everything a checkout needs, from Python (3.11 or later) and make alone. `make help` lists the targets.

PYTHON ?= python3
# Installed first and by version, so that nothing installed after it replaces it. Another build: make test TORCH='...'
TORCH ?= torch==2.13.0
PROMPT ?= a red cube on top of a blue sphere
PYTEST_ARGS ?=
# Test processes. Two fit the memory of any machine that the tests fit.
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input
export PROMPT

.PHONY: help demo test lint types format
.DELETE_ON_ERROR:

help:
	@echo "make demo    generate an image with the bundled model in out/   (PROMPT='...' for another one)"
	@echo "make test    the default test run, under ten minutes           (PYTEST_ARGS='tests/nn -x' for some)"
	@echo "make lint    ruff: rules and formatting"
	@echo "make types   mypy, strict"
	@echo "make format  let ruff rewrite what it can"
	@echo "Each of them first builds .venv if it is missing or older than pyproject.toml."

demo: $(STAMP)
	@mkdir -p out
	$(BIN)/impasto generate "$$PROMPT" --output out/demo.png --seed 7
	@echo "The image is $(CURDIR)/out/demo.png"

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The stamp is written last: a set-up that was interrupted is taken up again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Impasto needs Python 3.11 or later; \
	$(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	@echo "Setting up .venv: PyTorch and what Impasto needs. The first time, this takes some minutes."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(PIP) $(TORCH)
	@$(PIP) --editable '.[test]'
	@touch $@
