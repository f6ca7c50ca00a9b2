# `make demo` and `make test` need nothing before them but Python 3.11+ and a way to its packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
FLOORS := adapter_store cluster deploy kernels workers

.PHONY: setup demo serve test lint types unit gpu fidelity sweep format docs site lock typings clean

setup: $(VENV)/.ready typings

# The constraints fix every version, so a new release breaks nobody; the stamp makes the next `make` start at once.
# Built without isolation: with the setuptools that the constraints name, and without another download.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): a few minutes the first time"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt --upgrade pip setuptools
	PYTHONWARNINGS=ignore $(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

# mypy and import-linter do not follow the finder of an editable install: links show them the package as imported.
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
	PYTHONPATH=typings $(BIN)/lint-imports
	$(BIN)/hadolint deploy/docker/Dockerfile

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/pytest -m "not gpu"

# On a machine with a GPU.
gpu: setup
	$(BIN)/pytest -m gpu

# Logprobs against transformers + PEFT; on a GPU: make fidelity ARGS="--device cuda --dtype bfloat16 --base llama-7b-4-layers".
# What is to be kept is measured with --out benchmarks/results/fidelity.jsonl.
fidelity: setup
	$(BIN)/python benchmarks/fidelity.py --out build/fidelity.jsonl $(ARGS)

# Every causal model class of the installed transformers, tiny, against PEFT: writes docs/bases.md, fails where one is wrong.
sweep: setup
	$(BIN)/python benchmarks/sweep.py --page docs/bases.md $(ARGS)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Writes docs/ anew from the code; a test fails when they are behind it.
docs: setup
	$(BIN)/python docs/generate.py

# Builds the pages in build/site; a broken link fails it. A test does the same.
site: setup
	$(BIN)/python docs/build_site.py

# Writes down what is installed now; a build tag such as +cpu is left to the index that serves it.
lock:
	{ sed '/^#/!d' constraints.txt; $(PIP) freeze --all --exclude-editable | sed 's/+[a-z0-9.]*$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) typings build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
