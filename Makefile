# `make demo` and `make test` need nothing before them but Python 3.11+ and a way to its packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
FLOORS := adapter_store cluster deploy kernels workers

# Processes that tests are spread over. Each computes on one thread, or torch's threads would fight for the cores.
# All hash alike, since they must collect the same tests.
JOBS ?= logical
PYTEST := $(BIN)/pytest
SPREAD = OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(PYTEST) -n $(JOBS) --dist loadfile --max-worker-restart 0 \
	--ignore tests/workers/test_step_message.py
# It blocks its process until another one has started. After other tests in that process, it took the process down twice.
ALONE = $(PYTEST) tests/workers/test_step_message.py
# Ray's processes need all cores, so these tests follow each other.
RAY = $(PYTEST) -m "ray and not gpu"

.PHONY: setup demo serve test lint types unit quick oldest slow ray coverage chaos soak clients gpu fidelity sweep format docs site wheel lock typings clean

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
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema custom.github-workflows-require-timeout .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-actions .github/actions/*/action.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

types: setup
	$(BIN)/mypy

# What every change passes.
unit: quick ray

quick: setup
	$(SPREAD) -m "not gpu and not ray and not slow"

# The same beside the oldest transformers that pyproject.toml allows.
oldest: setup
	$(PIP) install --quiet --no-deps --upgrade --target build/oldest transformers==5.17.0 "huggingface_hub==1.*"
	PYTHONPATH=$(CURDIR)/build/oldest $(MAKE) quick

# In several runs: a process that had run nearly all of them ended at once, three times of three.
slow: setup
	$(SPREAD) -m "slow and not gpu and not ray" tests/workers
	$(SPREAD) -m "slow and not gpu and not ray" tests --ignore tests/workers
	$(ALONE)

ray: setup
	$(RAY)

# Lines of the floors that tests run, in all processes. The report fails below the share that pyproject.toml names.
coverage: setup
	rm -rf build/coverage && mkdir -p build/coverage
	$(MAKE) quick slow ray PYTEST="$(BIN)/coverage run -m pytest"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet --fail-under=0
	$(BIN)/coverage report

# On a machine with a GPU.
gpu: setup
	$(BIN)/pytest -m gpu

# Logprobs against transformers + PEFT; on a GPU: make fidelity ARGS="--device cuda --dtype bfloat16 --base llama-7b-4-layers".
# What is to be kept is measured with --out benchmarks/results/fidelity.jsonl.
fidelity: setup
	$(BIN)/python benchmarks/fidelity.py --out build/fidelity.jsonl $(ARGS)

# Every causal model class of the installed transformers, tiny, against PEFT: writes docs/bases.md, fails where one is wrong.
sweep: setup
	PYTHONHASHSEED=0 $(BIN)/python benchmarks/sweep.py --page docs/bases.md $(ARGS)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Faults against a fresh service under load: what clients saw, and for how long. ARGS="--times 20 --clients 50": the full run.
chaos: setup
	$(BIN)/python -m tests.chaos $(ARGS)

# Other projects' clients, each installed in an environment of its own: make clients CLIENTS="langchain litellm".
clients: setup
	$(BIN)/python -m tests.clients.install $(CLIENTS)
	$(BIN)/pytest tests/clients

# How fast each process grows while mixed operations run: make soak ARGS="--soak 30".
soak: setup
	$(BIN)/python -m tests.chaos --soak 5 $(ARGS)

# Writes docs/ anew from the code; a test fails when they are behind it.
docs: setup
	$(BIN)/python docs/generate.py

# Builds the pages in build/site; a broken link fails it. A test does the same.
site: setup
	$(BIN)/python docs/build_site.py

# The wheel in dist/, built from the last commit and checked in an environment of its own.
wheel: setup
	rm -rf build/source build/fresh dist
	mkdir -p build/source
	git archive HEAD | tar -x -C build/source
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist build/source
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	build/fresh/bin/python -I .github/scripts/check_wheel.py

# Writes down what is installed now; a build tag such as +cpu is left to the index that serves it.
lock:
	{ sed '/^#/!d' constraints.txt; $(PIP) freeze --all --exclude-editable | sed 's/+[a-z0-9.]*$$//'; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) typings build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
