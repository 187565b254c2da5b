# Everything runs from .venv in this folder; nothing outside it is touched. `make` alone lists the targets.
# ARGS is handed on: make train ARGS="seed=2 total_env_steps=1e6", make test ARGS="-k recurrent -x".
# PYTHON names the interpreter to make .venv with; TORCH overrides the choice of torch.

VENV := .venv
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
ARGS ?=
export PYTHON TORCH

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install train test test-service test-slow test-all bench docs lint format clean FORCE

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(RUNTIME)  ## Make .venv and install shoal with MettaGrid (PYTHON=python3.12, TORCH='torch==...')

train: $(RUNTIME)  ## Train the demo: Fast on MettaGrid, on this machine (ARGS="key=value ...")
	@$(VENV)/bin/shoal train --config forage $(ARGS)

# The tiers: tests/*.py are fast; tests/service/ starts Ray, browsers, servers and processes; `slow` takes minutes each.
PYTEST := $(VENV)/bin/python -m pytest --durations=25

test: $(DEV)  ## Run the fast tests (ARGS="-k recurrent", ARGS=tests/service/test_pool.py)
	@$(PYTEST) -n 2 --dist loadfile $(ARGS)

test-service: $(DEV)  ## Run the tests of processes, Ray, browsers and servers
	@$(PYTEST) -n 2 --dist loadfile tests/service $(ARGS)

test-slow: $(DEV)  ## Run the slow tests: learning, compilation and chaos; minutes each
	@# pytest ends with 5 where ARGS selects no test; both parts run, whatever became of the first.
	@failed=0; \
	$(PYTEST) -n 2 --dist worksteal -m "slow and not alone" tests/service $(ARGS) || [ $$? = 5 ] || failed=1; \
	$(PYTEST) -n 0 -m "slow and alone" tests/service $(ARGS) || [ $$? = 5 ] || failed=1; \
	exit $$failed

test-all: $(DEV)  ## Run every tier
	@$(MAKE) --no-print-directory test test-service test-slow

bench: $(RUNTIME)  ## Measure the whole service against this machine's limit
	@$(VENV)/bin/shoal bench limit $(ARGS)

docs: $(DEV)  ## Build the documentation into build/docs; a warning is an error
	@$(VENV)/bin/python -m sphinx --quiet --fail-on-warning --keep-going deploy/docs build/docs
	@echo "build/docs/index.html"

lint: $(DEV)  ## Check style, format and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(DEV)  ## Sort imports and format the code
	@$(VENV)/bin/ruff check --fix-only --quiet .
	@$(VENV)/bin/ruff format .

clean:  ## Remove .venv and the caches; what was trained (runs/) stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A TORCH given on the command line is obeyed even where everything is installed.
$(RUNTIME): pyproject.toml $(if $(findstring command,$(origin TORCH)),FORCE)
	@bash deploy/launch/install/install.sh runtime
	@touch $@

$(DEV): pyproject.toml $(RUNTIME)
	@bash deploy/launch/install/install.sh dev
	@touch $@
