# Every target sets up its own .venv first and is safe to run again.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup lint check test demo docs clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the pinned dependencies and mlbseg itself, editable

# The stamp comes last, so an install that was cut short is done again.
# nnU-Net checks exported datasets in a test, and its networks are those of the extra nnunet; the dependencies of both
# would bring torchvision, which this torch has no build of.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mlbseg needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt nnunetv2 batchgenerators acvl-utils \
	  dynamic-network-architectures
	touch $@

lint: $(STAMP)  ## ruff (rules and format) and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint  ## lint, and the tests that train nothing and start no processes: minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -q -m 'not slow'

# One thread per worker: two workers with two threads each are slower on two cores than one. A file's tests go to one
# worker, so that what they share is made once; the longest files come first (tests/conftest.py).
test: lint  ## lint, then all tests, then the coverage that core, data and metrics must have
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=
	$(BIN)/coverage report
	@echo 'core, data and metrics, of which 90 % must be covered, branches counted:'
	$(BIN)/coverage report --fail-under=90 \
	  --include='src/mlbseg/core/*,src/mlbseg/data/*,src/mlbseg/metrics.py'

demo: $(STAMP)  ## generated scans, both stages of training, a table and a picture, in demo/
	$(BIN)/mlbseg demo --out demo

docs: $(STAMP)  ## the documentation's site in site/, which can be read from disk
	$(BIN)/mkdocs build --strict

clean:  ## remove .venv, caches and the demo's output
	rm -rf $(VENV) demo site build dist htmlcov .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
