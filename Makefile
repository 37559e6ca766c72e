# `make demo` and `make test` do all set-up on a fresh machine. Everything lives in $(VENV); `make clean` removes it.
VENV    ?= .venv
PYTHON  ?= python3
TORCH   ?= 2.13.0
WORKERS ?= 2

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# Each worker begins with its own half of the files, so that what a file shares is made once, and takes from the other at the end.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# name==version of what is installed; a release that does not run on Python 3.10 is pinned for the newer ones only.
define FREEZE
from importlib.metadata import distributions
from packaging.specifiers import SpecifierSet
for name, dist in sorted((d.name.lower().replace('_', '-'), d) for d in distributions()):
    if name not in ('pip', 'galore-torch'):
        old = SpecifierSet(dist.metadata['Requires-Python'] or '').contains('3.10')
        print(name + '==' + dist.version.split('+')[0] + ('' if old else ' ; python_version >= \'3.11\''))
endef
export FREEZE

.DEFAULT_GOAL := help
.PHONY: help setup demo lint docs test test-all test-integrations format import-time constraints clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# Done once, and again when what is installed could change. Always under the constraints: they hold torch to one release.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,test,docs]"
	touch $@

setup: $(STAMP)  ## virtual environment and an editable install of the pinned packages

demo: $(STAMP)  ## set-up, then the main job: pre-train a small model
	$(BIN)/galore pretrain $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## the documentation site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test: lint docs  ## set-up, lint, docs, the quick tests; ARGS="-k name" picks some, WORKERS=0 runs them in one process
	$(PYTEST) $(ARGS)

test-all: lint docs  ## the same with the slow tests
	$(PYTEST) -m "" $(ARGS)

test-integrations:  ## frameworks in environments of their own, and their table in docs/; NAMES="trl peft" picks some, KEEP=--keep keeps them
	$(PYTHON) tests/integrations/run.py --torch $(TORCH) $(KEEP) $(NAMES)

format: $(STAMP)  ## rewrite the files in the project's layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

import-time: $(STAMP)  ## median of 7 of what `import galore_torch` adds to `import torch`
	@for i in 1 2 3 4 5 6 7; do $(BIN)/python -c \
	'import time, torch; t = time.perf_counter(); import galore_torch; print(f"{1e3 * (time.perf_counter() - t):.1f}")'; \
	done | sort -n | sed -n '4s/$$/ ms (median of 7)/p'

constraints:  ## write constraints.txt anew from a fresh install
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --disable-pip-version-check torch==$(TORCH) ".[train,test,docs]"
	(sed -n '/^#/p' constraints.txt; build/constraints/bin/python -c "$$FREEZE") > build/constraints.txt
	mv build/constraints.txt constraints.txt && rm -rf build/constraints

clean:  ## remove the environment, caches and build outputs (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
