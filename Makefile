# `make demo` and `make test` work from a fresh clone: they create .venv, install pinned versions and build
# the native code. Needs Python 3.11 or newer, make and a C++ compiler.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Each takes its files one by one; what is built for a file is built once.
TEST_JOBS   ?= 2

# The compiled module is rebuilt when a native source or the build script changes.
NATIVE := $(shell find csrc build_support -type f -not -name '*.pyc' 2>/dev/null) setup.py

.DEFAULT_GOAL := help
.PHONY: help demo test coverage test-slow properties lint format bench bench-quick bench-compare gpu-check bench-gpu wheel wheel-check clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@# A second opinion on scores. Without dependencies: it asks for a numpy older than everything else here needs.
	$(PIP) install --quiet --no-deps mlm-bias==0.1.7
	touch $@

demo: $(STAMP) ## fine-tune a BERT with ERM and with Group DRO, compare loss and bias
	$(BIN)/robustdebias demo $(DEMO_ARGS)

test: $(STAMP) ## build and run the whole suite but the slow tests and those for a GPU
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" $(PYTEST_ARGS)

coverage: ## the same, with coverage, which slows the interpreted kernels down
	$(MAKE) test PYTEST_ARGS="--cov --cov-report=term $(PYTEST_ARGS)"

test-slow: $(STAMP) ## run the slow tests
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# A failing case is printed as it can be called again; `make test` tries a few hundred, the same each time.
CASES ?= 100000

properties: $(STAMP) ## try CASES=100000 random cases, with fresh seeds, against the float64 oracle
	RD_KERNELS_PROPERTY_CASES=$(CASES) $(BIN)/python -m pytest tests/test_properties.py -n $(TEST_JOBS) $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, mypy, clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/mypy

format: $(STAMP) ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

# A run leaves .benchmarks/latest.json and plots; a failed test still gets its table.
RESULT     := .benchmarks/latest.json
BENCH_ARGS ?=
TOLERANCE  ?= 0.15
MEASURE     = $(BIN)/python -m pytest benchmarks --ignore benchmarks/test_sparse_backward.py -q -rfEx --benchmark-quiet --result $(RESULT) $(BENCH_ARGS)
REPORT      = $(BIN)/python -m benchmarks.report

bench: $(STAMP) ## time everything beside its peers (20 min on 2 cores); table, plots, result file
	$(MEASURE); status=$$?; $(REPORT) table $(RESULT) && $(REPORT) plot $(RESULT) && exit $$status

bench-quick: $(STAMP) ## the headline cases only (2 min)
	$(MEASURE) --quick; status=$$?; $(REPORT) table $(RESULT) && $(REPORT) plot $(RESULT) && exit $$status

bench-compare: $(STAMP) ## ratios of RESULT (default: the last run) against BASELINE=benchmarks/results/...json
	$(REPORT) compare $(BASELINE) $(RESULT) --tolerance $(TOLERANCE)

# A machine with a GPU often has a torch of its own: GPU_PYTHON=python3 leaves .venv alone.
GPU_PYTHON ?= $(BIN)/python
GPU_ARGS   ?=
GPU_STAMP  := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))

gpu-check: $(GPU_STAMP) ## on a machine with a GPU: build, tests, sanitizers, benchmarks; logs in .gpu-check/
	$(GPU_PYTHON) -m tools.gpu_check $(GPU_ARGS)

bench-gpu: $(GPU_STAMP) ## on a machine with a GPU: time both ops and a BERT step beside their peers (25 min)
	PYTHONPATH=.:python $(GPU_PYTHON) -m benchmarks.gpu $(GPU_ARGS)

# What an earlier build left would be packed again; docs/building.md has the variables of the build.
wheel: ## build a wheel for this Python into dist/, with the CUDA backend where nvcc is found
	rm -rf build/lib* dist/*.whl
	$(PYTHON) -m pip --disable-pip-version-check wheel --no-deps --wheel-dir dist .

# WHEEL_CHECK_ARGS="--cuda yes --expect-tag manylinux_2_28_x86_64 --torch 2.14.1": --help explains them.
WHEEL_CHECK_ARGS ?=
wheel-check: $(STAMP) ## look into the wheel in dist/, then use it in a clean environment
	$(BIN)/python -m tools.check_wheel $(WHEEL_CHECK_ARGS)

clean: ## remove what was built, but not .venv
	rm -rf build dist *.egg-info rd_kernels/_*.so demo-output .coverage
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
