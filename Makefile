# Everything here makes its own virtual environment (.venv) the first time, from pyproject.toml.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: train test check format benchmark clean

train: $(INSTALLED)  ## train the embedded default: a small Llama on Python's own standard library
	$(BIN)/bptool train

check: $(INSTALLED)  ## linters, strict types and fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n auto -m "not slow and not benchmark"

test: $(INSTALLED)  ## everything `check` does, and the slow tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto -m "not benchmark"

benchmark: $(INSTALLED)  ## speed and memory, as ratios within one run; asserts nothing, takes minutes
	$(BIN)/pytest -q -s -m benchmark tests/benchmarks

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "bptool needs Python 3.11 or later: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
