# Every target sets up its own environment in .venv on first use; a stamp keeps it from being done twice.
PYTHON ?= python3
VENV   ?= .venv
WORKERS ?= 2
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TESTED := llava_fast kernels bench tests setup.py
# One thread a process: the suite's parallelism is its worker processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help demo test test-interpreter test-aot test-main test-fast test-online test-gpu lint format aot bench bench-long bench-check report gpu tune tune-check clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Without a GPU the CUDA extension could not run: not compiling it makes the demo start sooner.
# Threads that sleep instead of spinning: on a busy machine of two cores a step takes 0.3 s with them and 4 s without.
demo: ## install, train a small model through every stage on generated visual questions, answer held-out ones
	@if ! nvidia-smi -L >/dev/null 2>&1; then export LLAVA_FAST_CUDA=$${LLAVA_FAST_CUDA:-0}; fi; $(MAKE) --no-print-directory $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/llava-fast demo

# In this order, and each in a process of its own.
test: lint test-interpreter test-aot test-main ## lint and every test that needs neither network nor GPU

test-interpreter: $(STAMP)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter

test-aot: $(STAMP)
	$(BIN)/python -m bench.aot --check

test-main: $(STAMP)
	$(PYTEST)

test-fast: $(STAMP) ## the tests to run while working
	$(PYTEST) -m "not slow and not online"

test-online: $(STAMP) ## tests against released checkpoints (needs the network)
	LLAVA_FAST_ONLINE=1 $(BIN)/python -m pytest -m online

test-gpu: $(STAMP) ## Triton kernels against fp64 references, on a GPU
	$(BIN)/python -m pytest tests/gpu

lint: $(STAMP) ## ruff, mypy, clang-format
	$(BIN)/ruff check $(TESTED)
	$(BIN)/ruff format --check $(TESTED)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

format: $(STAMP) ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix $(TESTED)
	$(BIN)/ruff format $(TESTED)
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

bench: $(STAMP) ## every benchmark against its baselines, with the limits of this machine; results under bench/results/
	$(BIN)/python -m bench

bench-long: $(STAMP) ## those that take minutes each; the goals of the larger sizes are held against them
	$(BIN)/python -m bench --long

bench-check: $(STAMP) ## measure again, and fail where a ratio fell by more than 7 % against the committed one
	rm -rf build/bench-check
	$(BIN)/python -m bench --results build/bench-check
	$(BIN)/python -m bench.check build/bench-check

report: $(STAMP) ## render docs/performance.md, its pictures and the README's table from bench/results/
	$(BIN)/python -m bench.report

aot: $(STAMP) ## compile every Triton kernel and .cu without a GPU; rewrites aot.csv
	$(BIN)/python -m bench.aot

gpu: ## build, test and measure on a GPU machine, offline, in nine minutes; results under bench/results/ or $$OUT
	$(PYTHON) -m bench.gpu

tune: $(STAMP) ## time the candidates of every Triton kernel on this GPU; rewrites kernels/tuned.json
	$(BIN)/python -m bench.tune

tune-check: $(STAMP) ## compile every candidate of `tune` without a GPU
	$(BIN)/python -m bench.tune --check

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info llava_fast/*.so

# The build tools come first, under the constraints: pip's isolated builds would not see them.
$(STAMP): pyproject.toml setup.py constraints.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools wheel pybind11
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
