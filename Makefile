# What can be done here: make help. Every target makes .venv first where it is missing or older than the project's
# metadata; with uv if it is installed, else with venv and pip.

VENV ?= .venv
PYTHON ?= python3
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
DEMO ?= .demo
DEMO_ARGS ?=
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
UV := $(shell command -v uv 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup demo test methods lint check clean

help: ## what can be done here
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## make .venv with everything that tests and demo need

demo: $(STAMP) ## train a tiny Qwen3-VL to read handwritten digits and ask it about new ones (CPU, minutes)
	@bash examples/digits/demo.sh $(PY) $(DEMO) $(DEMO_ARGS)

test: $(STAMP) ## run every test that needs no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not gpu" -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

methods: $(STAMP) ## try every training method on tiny models and write the table of docs/tuning.md
	PYTHONPATH=. OMP_NUM_THREADS=1 $(PY) tests/methods_table.py --write

lint: $(STAMP) ## format, lint and types, without the tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

check: lint test ## everything that has to pass before a change goes in

clean: ## remove what the demo and the tools wrote; .venv stays
	rm -rf $(DEMO) build dist .pytest_cache .mypy_cache .ruff_cache

# A link to a python that is gone counts as missing, so a broken .venv is made anew.
$(PY):
ifdef UV
	uv venv --clear --seed --python $(PYTHON) $(VENV)
else
	$(PYTHON) -m venv --clear $(VENV)
endif

$(STAMP): $(PY) setup.cfg pyproject.toml
ifdef UV
	uv pip install --python $(PY) -e ".[dev]"
else
	$(PY) -m pip install --disable-pip-version-check -e ".[dev]"
endif
	@touch $@
