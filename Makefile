# Everything here is a short name for a command; what it does is in that command.
PYTHON ?= python3
BIN := $(or $(TUNEGATE_VENVS),.venv)/control/bin
export DEVICE
# Byte code is kept, whatever the caller's shell says: compiling Prefect and MLflow anew costs 6 s a process.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test image test-container test-gpu lint up down locks locks-check clean

help:         ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 20

setup:        ## make the locked environments (DEVICE=cuda for a GPU host)
	@$(PYTHON) -m pipeline.environments

demo: setup   ## from a base model to an approved, promoted release that answers
	@$(BIN)/tunegate demo

test: setup   ## all tests but those that need a GPU or a container engine
	@$(PYTHON) -m pipeline.environments autoawq judges
	@$(BIN)/python -m pytest -m "not gpu and not container" -n 2 --dist loadfile --no-loadscope-reorder

image:        ## build the CPU serving image where no registry is reachable (Debian 12, root)
	@docker/build-local

test-container: setup ## the tests that need a container engine and that image
	@$(BIN)/python -m pytest -m container

test-gpu:     ## what needs a GPU: its tests, Banking77 and a Llama of 8 B (GPU_HOST="…": options of tests/gpu/gpu_host.py)
	@$(PYTHON) tests/gpu/gpu_host.py $(GPU_HOST)

lint: setup   ## ruff, mypy --strict and the import contracts
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

up: setup     ## start Prefect's and MLflow's pages, the worker and the deployments
	@$(BIN)/tunegate up

down:         ## stop everything that runs
	@$(BIN)/tunegate down

locks:        ## resolve pyproject.toml into locks/ anew
	@$(BIN)/python -m pipeline.environments.locks

locks-check:  ## prove that the locks are fresh and resolve for Python 3.11 and 3.12
	@$(BIN)/python -m pipeline.environments.locks --check

clean:        ## remove caches (the environments are .venv, the runs mlruns)
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .import_linter_cache dist *.egg-info
	@find flows pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
