# Everything sets itself up: `make demo` and `make test` need Python >= 3.11 and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?=
INSTALLED := $(VENV)/.installed
# Processes that share the tests, file by file; on two cores a third works while others wait. Each test of a launch has
# one to four more for a while.
TEST_PROCESSES ?= 3
PYTEST := $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-slurm lint bench clean

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | column -t -s '|'

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[demo,test,lint,bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt torch-fidelity # without torchvision
	@touch $@

demo: $(INSTALLED) ## train on real digits with two processes and draw samples, in minutes, on a CPU
	$(BIN)/python -m launch.demo

test: $(INSTALLED) ## the tests that every change must pass
	$(PYTEST)

test-all: test ## the slow tests too
	$(PYTEST) -m "slow and not slurm"

test-slurm: $(INSTALLED) ## jobs on a SLURM that is started for it; as root, on Debian or with slurmctld and slurmd
	tests/slurm/lab.sh install
	$(BIN)/python -m pytest -m slurm -rs tests/slurm

lint: $(INSTALLED) ## style, format, types, shell scripts, and the reference of the configuration
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m trainer.config.reference --check
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch tests/slurm/*.sh .ci/run

bench: $(INSTALLED) ## our steps, sampling, data, checkpoints beside others', at sizes that fit this machine
	@# without what it depends on: torchvision, which only its reading of files needs
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps denoising-diffusion-pytorch==2.3.4
	$(BIN)/python -m benchmarks

clean: ## remove the environment, and nothing that was trained
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
