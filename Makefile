# `make demo` and `make test` need nothing before them but Python 3.11+, make and a network for the packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FLOORS := adapter_store cluster deploy kernels workers

.PHONY: setup demo serve test lint types unit typings clean

setup: $(VENV)/.ready typings

# The constraints hold torch to a CPU build; the stamp makes a second `make` start at once.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# mypy does not follow the finder of an editable install: links show it the package as it is imported.
typings:
	@mkdir -p typings/lorafleet
	@for floor in $(FLOORS); do ln -sfn ../../$$floor typings/lorafleet/$$floor; done

demo: setup
	$(BIN)/python examples/demo/demo.py

serve: setup
	$(BIN)/python examples/demo/demo.py --keep

test: setup lint types unit

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/pytest -m "not gpu"

clean:
	rm -rf $(VENV) typings build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
