PYTHON ?= python
BUILD := build
CPP_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help install test lint format bench test-gpu bench-gpu aot asan clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install:  ## editable install with everything that the tests and the linters need
	$(PYTHON) -m pip install -c constraints.txt -e '.[test,lint]'

test:  ## all tests
	$(PYTHON) -m pytest -n auto

lint:  ## what CI checks without running anything
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	clang-format --dry-run -Werror $(CPP_SOURCES)

format:  ## formats Python and C++ in place
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP_SOURCES)

bench:  ## benchmarks on this machine
	$(PYTHON) -m pytest benchmarks --benchmark-only

test-gpu:  ## the tests that need a CUDA device
	$(PYTHON) -m pytest -m gpu

bench-gpu:  ## a whole epoch and the kernels on a CUDA device
	$(PYTHON) -m benchmarks.epoch --model sd35-medium --random-weights --baseline --device cuda
	$(PYTHON) -m pytest benchmarks --benchmark-only

aot:  ## compiles every Triton kernel for sm_80, sm_90 and sm_100; needs no GPU
	$(PYTHON) -m gardo_kernels.aot

asan:  ## C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	cmake -S . -B $(BUILD)/asan -DCMAKE_BUILD_TYPE=Debug -DGARDO_PYTHON=OFF -DGARDO_CUDA=OFF \
	  -DGARDO_CORE_TESTS=ON -DGARDO_SANITIZE=ON
	cmake --build $(BUILD)/asan --parallel
	$(BUILD)/asan/gardo_core_tests
	$(BUILD)/asan/gardo_cuda_emulation

clean:  ## build outputs and caches
	rm -rf $(BUILD) dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf kernels/build kernels/dist kernels/*.egg-info
	rm -f kernels/gardo_kernels/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
