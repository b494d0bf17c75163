# Needs Python 3.11 or newer, make, and a package registry; everything lands in .venv.
PYTHON ?= python3
# make lock UPGRADE=--upgrade moves every pin to its newest version
UPGRADE ?=

BIN := .venv/bin
PIP_INSTALL := -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-optimized check bench bench-learners bench-learner-steps bench-memory bench-toys bench-cleaning bench-plan bench-search bench-hpo bench-both bench-stochastic bench-sklearn pictures omniglot lock clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: .venv/.installed ## the environment of requirements.lock, in .venv (PYTHON=python3.12 picks a Python)

demo: .venv/.installed ## train MAML on synthetic glyphs and write its report, in minutes on a laptop
	$(BIN)/bilevel demo

test: .venv/.installed ## all tests, and the examples in the docstrings
	$(BIN)/python -m pytest --numprocesses auto

test-optimized: .venv/.installed ## the same with the compiler's optimizations, as users run it; about twice as long
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= $(BIN)/python -m pytest --numprocesses auto

check: .venv/.installed ## lint, format, types, layering and docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest tests/test_layering.py

bench: .venv/.installed .venv-peers/.installed ## time bilevel against its peers
	$(BIN)/python bench/run.py

bench-memory: .venv/.installed ## memory and time of unrolling over horizons of 10 to 10000 inner steps
	$(BIN)/python bench/horizons.py

bench-toys: .venv/.installed ## published problems on which short windows mislead, with pictures in docs/
	$(BIN)/python bench/toys.py

bench-cleaning: .venv/.installed ## hyper-data-cleaning on MNIST (BILEVEL_DATA) with every estimator that applies
	$(BIN)/python bench/hyper_cleaning.py

bench-plan: .venv/.installed ## the memory planner's predictions against what is measured
	$(BIN)/python bench/plan_grid.py

bench-search: .venv/.installed ## what a search costs beside its trials
	$(BIN)/python bench/search_overhead.py

bench-hpo: .venv/.installed ## hyperparameters by hypergradients against black-box search, with pictures in docs/
	$(BIN)/python bench/hpo.py

bench-both: .venv/.installed ## black-box search of everything against hypergradients inside the trials
	$(BIN)/python bench/both_at_once.py

bench-stochastic: .venv/.installed ## the stochastic bilevel methods, and a plain numba reference
	$(BIN)/python bench/stochastic.py

bench-sklearn: .venv/.installed ## the scikit-learn door against grid and random search
	$(BIN)/python bench/sklearn_search.py

bench-learner-steps: .venv/.installed .venv-peers/.installed ## an outer step of every few-shot learner against the fastest peer
	$(BIN)/python bench/learner_steps.py

pictures: .venv/.installed ## the pictures of docs/, from kept figures and small computations
	$(BIN)/python bench/pictures

bench-learners: .venv/.installed ## every few-shot learner on glyphs: time of an outer step, accuracy after a minute of processor time
	$(BIN)/python bench/learners.py

omniglot: .venv/.installed ## MAML on Omniglot, from training to test accuracy
	$(BIN)/bilevel train maml-omniglot --folder runs/omniglot --loop.devices 2
	$(BIN)/bilevel eval runs/omniglot

lock: ## rewrite requirements.lock from pyproject.toml (UPGRADE=--upgrade moves every pin)
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python $(PIP_INSTALL) --quiet uv
	.venv-lock/bin/uv pip compile --quiet $(UPGRADE) --universal --python-version 3.11 \
	  --fork-strategy fewest --generate-hashes --no-emit-index-url --no-annotate \
	  --custom-compile-command "make lock" --extra dev --output-file requirements.lock pyproject.toml
	rm -rf .venv-lock

clean: ## remove the environments and caches; runs/ stays
	rm -rf .venv .venv-peers .venv-lock .pytest_cache .ruff_cache .jax_cache build dist src/*.egg-info
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last, so an interrupted installation starts again from an empty folder.
.venv/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "bilevel needs Python 3.11 or newer, '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | tail -n 1)." \
	    "Name another, as in: make venv PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python $(PIP_INSTALL) --require-hashes -r requirements.lock
	$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

.venv-peers/.installed: bench/peers/requirements.txt
	$(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/python $(PIP_INSTALL) -r bench/peers/requirements.txt
	@touch $@
