# make help lists the targets. Every target makes .venv first where it is missing or older than the project's
# metadata; with uv if it is installed, else with venv and pip. It holds the versions of requirements.lock, or with
# NEWEST=1 the newest of everything.

VENV ?= .venv
PYTHON ?= python3
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
DEMO ?= .demo
DEMO_ARGS ?=
DOCS_VENV ?= .docs-venv
DOCS ?= build
PYTEST_ARGS ?=
NEWEST ?=
LOCK ?= requirements.lock
VENVS ?= .upstream
ENVS ?=
GPU_ARGS ?=
FILE ?= .gpu/gpu.json

PY := $(VENV)/bin/python
UV := $(shell command -v uv 2>/dev/null)
# Two stamps, of which one is there: what is installed is what was asked for last.
STAMPS := $(VENV)/.installed $(VENV)/.installed-newest
STAMP := $(VENV)/.installed$(if $(NEWEST),-newest)

.DEFAULT_GOAL := help
.PHONY: help setup lock demo test contract upstream methods lint check hooks docs pictures gpu gpu-wheels gpu-report clean

help: ## what can be done here
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: ## make .venv with everything that tests and demo need; NEWEST=1 takes the newest instead of the lock
ifdef NEWEST
	@rm -f $(STAMP)
endif
	@$(MAKE) --no-print-directory $(STAMP)

lock: ## take the newest of everything into requirements.lock (needs uv)
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate \
	    --extra dev setup.cfg --output-file $(LOCK).new
	@{ sed -n '/^#/p' requirements.lock; cat $(LOCK).new; } > $(LOCK).made && mv $(LOCK).made $(LOCK) && rm $(LOCK).new

demo: $(STAMP) ## train a tiny Qwen3-VL to read handwritten digits and ask it about new ones (CPU, minutes)
	@bash examples/digits/demo.sh $(PY) $(DEMO) $(DEMO_ARGS)

test: $(STAMP) ## run every test that needs no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not gpu" -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

contract: $(STAMP) ## test what is taken from other libraries, and the promises, with the installed versions
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not gpu" -n $(JOBS) --dist worksteal tests/upstream $(PYTEST_ARGS)

upstream: ## run the contract with many versions and write docs/compatibility.md; ENVS="oldest newest" for some (needs uv)
	$(PYTHON) tests/upstream/environments.py --venvs $(VENVS) --jobs $(JOBS) $(ENVS)

methods: $(STAMP) ## try every training method on tiny models and write the table of docs/tuning.md
	PYTHONPATH=. OMP_NUM_THREADS=1 $(PY) tests/methods_table.py --write

lint: $(STAMP) ## format, lint and types, without the tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

check: lint test ## everything that has to pass before a change goes in

hooks: ## install git hooks that run make lint and check the message of each commit (by pre-commit, if installed)
	@git config --unset core.hooksPath || true
	@if command -v pre-commit > /dev/null; then pre-commit install; else git config core.hooksPath .ci/hooks; fi

docs: $(DOCS_VENV)/.installed ## build the documentation as a site in .site and check its links; DOCS=serve shows it in a browser
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs $(DOCS) --strict

pictures: $(STAMP) ## draw the pictures of README and docs again; needs chromium, and make demo before it
	PYTHONPATH=. $(PY) docs/images/draw.py --demo $(DEMO)

gpu: ## run all that a GPU has to show, 25 minutes, no network needed; GPU_ARGS="--budget 9m --out DIR"
	$(PYTHON) tests/gpu/day.py $(GPU_ARGS)

gpu-wheels: ## download what such a machine lacks, for make gpu
	$(PYTHON) tests/gpu/wheels.py

gpu-report: ## write the tables of FILE=DIR/gpu.json into the documents
	$(PYTHON) tests/gpu/report.py $(FILE)

clean: ## remove what the demo and the tools wrote; .venv stays
	rm -rf $(DEMO) .site build dist .pytest_cache .mypy_cache .ruff_cache

# A link to a python that is gone counts as missing, so a broken .venv is made anew.
$(PY):
ifdef UV
	uv venv --clear --seed --python $(PYTHON) $(VENV)
else
	$(PYTHON) -m venv --clear $(VENV)
endif

# In an environment with newer versions the constraints take them back; --upgrade takes an older one forward.
ifdef NEWEST
HOW := --upgrade
else
HOW := --constraint $(LOCK)
# The setuptools that builds the package is that of the lock too.
BUILD := PIP_BUILD_CONSTRAINT=$(CURDIR)/$(LOCK) UV_BUILD_CONSTRAINT=$(CURDIR)/$(LOCK)
endif

$(STAMP): $(PY) setup.cfg pyproject.toml $(if $(NEWEST),,$(LOCK))
ifdef UV
	$(BUILD) uv pip install --python $(PY) $(HOW) -e ".[dev]"
else
	$(BUILD) $(PY) -m pip install --disable-pip-version-check $(HOW) $(if $(NEWEST),--upgrade-strategy eager) -e ".[dev]"
endif
	@rm -f $(STAMPS)
	@touch $@

# An environment of its own for the site, without torch and the rest: the `docs` extra of setup.cfg alone.
$(DOCS_VENV)/.installed: setup.cfg
	$(if $(UV),uv venv --clear --seed --python $(PYTHON),$(PYTHON) -m venv --clear) $(DOCS_VENV)
	sed -n '/^docs =/,/^[a-z]/s/^    //p' setup.cfg > $(DOCS_VENV)/requirements.txt
	$(if $(UV),uv pip install --python $(DOCS_VENV)/bin/python,$(DOCS_VENV)/bin/python -m pip install) \
	    --constraint $(LOCK) --requirement $(DOCS_VENV)/requirements.txt
	@touch $@
