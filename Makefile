# make help lists the targets. Those that need .venv make it first if it is missing or older than the project's
# metadata: with uv if it is installed, else with venv and pip. It holds the versions of requirements.lock, or with
# NEWEST=1 the newest version of everything.

VENV ?= .venv
PYTHON ?= python3
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
DEMO ?= .demo
DEMO_ARGS ?=
FAMILY ?= qwen3_vl
DOCS_VENV ?= .docs-venv
DOCS ?= build
PYTEST_ARGS ?=
NEWEST ?=
LOCK ?= requirements.lock
VENVS ?= .upstream
ENVS ?=
GPU_ARGS ?=
SOAK_ARGS ?=
FILE ?= .gpu/gpu.json

PY := $(VENV)/bin/python
UV := $(shell command -v uv 2>/dev/null)
# Only one of the two stamps exists: the one for the versions that were installed last.
STAMPS := $(VENV)/.installed $(VENV)/.installed-newest
STAMP := $(VENV)/.installed$(if $(NEWEST),-newest)

.DEFAULT_GOAL := help
.PHONY: help setup lock demo test soak contract upstream methods lint check hooks docs pictures clean
.PHONY: gpu gpu-wheels gpu-report

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: ## make .venv with everything that tests and demo need, by the lock; NEWEST=1: the newest versions
ifdef NEWEST
	@rm -f $(STAMP)
endif
	@$(MAKE) --no-print-directory $(STAMP)

lock: ## write the newest version of everything into requirements.lock (needs uv)
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate \
	    --extra dev setup.cfg --output-file $(LOCK).new
	@{ sed -n '/^#/p' requirements.lock; cat $(LOCK).new; } > $(LOCK).made && mv $(LOCK).made $(LOCK) && rm $(LOCK).new

demo: $(STAMP) ## train a tiny model to read handwritten digits and ask it about new ones (CPU, minutes); FAMILY=qwen3_5
	@FAMILY=$(FAMILY) bash examples/digits/demo.sh $(PY) $(DEMO) $(DEMO_ARGS)

test: $(STAMP) ## run the tests that need no GPU and take no more than half a minute each
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not gpu and not soak" -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

soak: $(STAMP) ## run the tests that take long: every combination of engines and methods, and runs killed at random
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "soak and not gpu" -n $(JOBS) --dist worksteal $(PYTEST_ARGS)
	PYTHONPATH=. $(PY) tests/kill_run.py --write $(SOAK_ARGS)

contract: $(STAMP) ## test the internals of other libraries that are used, and the promises, with the installed versions
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not gpu and not soak" -n $(JOBS) --dist worksteal tests/upstream $(PYTEST_ARGS)

upstream: ## run the contract with many versions and write docs/compatibility.md (uv); ENVS="oldest newest": only these
	$(PYTHON) tests/upstream/environments.py --venvs $(VENVS) --jobs $(JOBS) $(ENVS)

methods: $(STAMP) ## try every training method on tiny models and write the table in docs/tuning.md
	PYTHONPATH=. OMP_NUM_THREADS=1 $(PY) tests/methods_table.py --write

lint: $(STAMP) ## check format, lint rules and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

check: lint test ## lint and test: what has to pass before a change is merged

hooks: ## install git hooks that run make lint and check the message of each commit (by pre-commit, if installed)
	@git config --unset core.hooksPath || true
	@if command -v pre-commit > /dev/null; then pre-commit install; else git config core.hooksPath .ci/hooks; fi

docs: $(DOCS_VENV)/.installed ## build the documentation as a site in .site and check its links; DOCS=serve serves it
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs $(DOCS) --strict

pictures: $(STAMP) ## draw the pictures of README and docs again; needs chromium, and make demo before it
	PYTHONPATH=. $(PY) docs/images/draw.py --demo $(DEMO)

gpu: ## run all tests and measurements that need a GPU (25 minutes, no network); GPU_ARGS="--budget 9m --out DIR"
	$(PYTHON) tests/gpu/day.py $(GPU_ARGS)

gpu-wheels: ## download packages that a GPU machine without a network lacks for make gpu
	$(PYTHON) tests/gpu/wheels.py

gpu-report: ## write the results in FILE=DIR/gpu.json into the tables of the docs
	$(PYTHON) tests/gpu/report.py $(FILE)

clean: ## remove the files that the demo and the tools wrote; .venv stays
	rm -rf $(DEMO) .site build dist .pytest_cache .mypy_cache .ruff_cache

# A link to a python that was removed counts as missing, so a broken .venv is made again.
$(PY):
ifdef UV
	uv venv --clear --seed --python $(PYTHON) $(VENV)
else
	$(PYTHON) -m venv --clear $(VENV)
endif

# The constraints downgrade newer versions to those of the lock; --upgrade goes the other way.
ifdef NEWEST
HOW := --upgrade
else
HOW := --constraint $(LOCK)
# The setuptools that builds the package comes from the lock too.
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
