# Needs Python 3.11+, a C++ compiler and make. With your own interpreter that has torch and pytest,
# without network or a virtual environment:  make test PYTHON=python3 VENV=

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
# Threads of the demo's training; 0 lets torch choose. The number changes the last digits of results.
THREADS ?= 0
# The version for development and tests; the package accepts 2.11 and later.
TORCH ?= torch==2.13.0

# The tests run the losses and trainer of the newest and the oldest published version, without its
# dependencies. The oldest is installed in a separate folder.
OPEN_CLIP := open_clip_torch==3.3.0
OPEN_CLIP_OLDEST := open_clip_torch==0.2.0
# Libraries whose losses `accelerate` knows; also without dependencies (benchmarks/baselines/libraries.py).
LOSSES := sentence-transformers==6.2.0 pytorch-metric-learning==2.9.0 lightly==1.6.0
LOSSES_OLDEST := sentence-transformers==2.3.0 pytorch-metric-learning==1.0.0 lightly==1.1.0

# Prerequisites of a rebuild of the extension, which has no CUDA kernel yet.
CSRC := $(filter-out csrc/cuda/% csrc/emulate/%,$(shell find csrc -name '*.cpp' -o -name '*.h'))

PATH_OUTSIDE := $(PATH)
ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
BUILT := in-place
READY := in-place
else
PY := $(VENV)/bin/python
BUILT := $(VENV)/.himo-built
READY := $(VENV)/.himo-tools
# The environment's tools (ninja, clang-format) take precedence over the machine's.
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif
PIP := $(PY) -m pip --disable-pip-version-check

BENCH_OUT ?= benchmarks/results/cpu
GPU_OUT ?= $(if $(DRY_RUN),build/gpu-dry,benchmarks/results/cuda)
# This tree's packages take precedence over an installed copy.
IN_TREE := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
BENCH := $(IN_TREE) $(PY) -m benchmarks.run

# Some images set this. Each of the suite's hundreds of processes then compiles torch again: 6 s, not 3.
unexport PYTHONDONTWRITEBYTECODE

# torch's default, the number of cores plus two, exhausts the memory of small machines.
export MAX_JOBS ?= 2

.PHONY: help setup test test-all classes fuzz emulate lint aot sanitize docs wheel sdist install-check bench gpu gpus demo effect clean in-place

help:
	@echo "make setup   create $(or $(VENV),no environment), install $(TORCH) and the package, build the extension"
	@echo "make test    set up where needed and run the tests, without the slow ones"
	@echo "make test-all  every test: larger sizes, killed runs, corpora of bad input, each processor class"
	@echo "make classes  the operators' tests as on processors with AVX2, or without"
	@echo "make fuzz    the corpora of bad input alone"
	@echo "make emulate  the CUDA C++ kernels on the host, under sanitizers; needs no GPU"
	@echo "make lint    ruff, mypy and clang-format; changes nothing"
	@echo "make aot     compile every Triton kernel for sm_80 and sm_90; needs no GPU"
	@echo "make sanitize  the operators' tests on an extension with address and undefined-behaviour sanitizers"
	@echo "make docs    the documentation in build/site; every code block of it is run by the tests"
	@echo "make wheel   a wheel with the extension in dist/, for this platform, Python and minor version of torch"
	@echo "make sdist   the source distribution in dist/; needs no torch"
	@echo "make install-check  the README's install lines, the wheel and the sdist, in empty environments; needs network"
	@echo "make bench   time every operator on this machine's CPU, about 30 minutes: $(BENCH_OUT)"
	@echo "make gpu     compile, test, check, tune and time on a GPU, 10 minutes: $(GPU_OUT); DRY_RUN=1 here"
	@echo "make gpus    the exchange over two and more GPUs, checked, profiled and timed: $(GPUS_OUT)"
	@echo "make demo    render scenes, train two small models, evaluate them, write demo/report.html"
	@echo "make effect  what the component loss changes over learning rates and seeds; goes on where it was stopped"
	@echo "make clean   remove what was built; the environment stays"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH)"
	@echo "VENV= (empty) uses PYTHON as it is: builds in place, installs nothing, needs no network."

setup: $(READY)
	@echo "ready: $(PY)"

# torch is pinned in the first command, so that no later package chooses another version. pip
# installs the Python part; the extension is built below, incrementally by file. Bytecode is written
# on first import instead of for all of torch.
$(VENV)/.himo-installed: pyproject.toml
	@test -x $(PY) || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing $(TORCH), the build tools and the package"
	@$(PIP) install --quiet --no-compile "$(TORCH)" "setuptools>=77" wheel ninja
	@HIMO_KERNELS_NO_EXTENSION=1 $(PIP) install --quiet --no-compile --no-build-isolation -e ".[himo]"
	@touch $@

# What tests, benchmarks and lint need in addition. The demo does not.
$(VENV)/.himo-tools: $(VENV)/.himo-installed | $(BUILT)
	@echo "installing the tools of tests and lint"
	@HIMO_KERNELS_NO_EXTENSION=1 $(PIP) install --quiet --no-build-isolation -e ".[dev]"
	@$(PIP) install --quiet --no-deps $(OPEN_CLIP) $(LOSSES)
	@$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/open_clip_oldest $(OPEN_CLIP_OLDEST)
	@$(PIP) install --quiet --no-deps --upgrade --target $(VENV)/losses_oldest $(LOSSES_OLDEST)
	@touch $@

define BUILD_IN_PLACE
@echo "building the extension in place"
@$(PY) setup.py build_ext --inplace
endef

$(VENV)/.himo-built: $(VENV)/.himo-installed setup.py $(CSRC)
	$(BUILD_IN_PLACE)
	@touch $@

# Always runs, since it also depends on the interpreter and its torch. Takes seconds without changes.
in-place:
	$(BUILD_IN_PLACE)

# Two files in parallel if the environment is ours and has pytest-xdist: Triton's interpreter takes
# most of the time and uses one core. PYTEST_FLAGS="-n 0" runs sequentially.
PARALLEL := $(if $(strip $(VENV)),-n 2 --dist loadfile --no-loadscope-reorder)
# Fewer random examples per property, if hypothesis is installed.
SHORT = $(shell $(PY) -c "import hypothesis" 2>/dev/null && echo --hypothesis-profile=short)
RUN_TESTS := $(IN_TREE) $(PY) -m pytest $(PARALLEL) --durations=10
test: $(READY)
	$(RUN_TESTS) -m "not slow" $(SHORT) $(PYTEST_FLAGS)

test-all: $(READY)
	$(RUN_TESTS) $(PYTEST_FLAGS)
	@$(MAKE) --no-print-directory classes

# The operators' tests as on older processors: the newest instructions ATEN, oneDNN and MKL may use.
CLASSES := default:SSE41:SSE4_2 avx2:AVX2:AVX2
CLASS_TESTS := tests/covariance/test_covariance.py tests/normalize/test_normalize.py tests/pca \
  tests/info_nce tests/sigmoid_loss tests/himo_loss tests/test_nn.py tests/himo/test_precision.py
classes: $(READY)
	@set -e; for class in $(CLASSES); do \
	  aten=$${class%%:*}; rest=$${class#*:}; \
	  echo "== as on a processor of class $$aten"; \
	  ATEN_CPU_CAPABILITY=$$aten ONEDNN_MAX_CPU_ISA=$${rest%%:*} MKL_ENABLE_INSTRUCTIONS=$${rest#*:} \
	    $(RUN_TESTS) -m "not slow and not gpu" $(SHORT) -k "(cpu or precision) and not triton and not memory and not ctrl_c" \
	    $(CLASS_TESTS); \
	done

fuzz: $(READY)
	$(RUN_TESTS) $(PYTEST_FLAGS) tests/fuzz

# Each test builds what it runs: with address and undefined-behaviour sanitizers, or with the thread
# sanitizer. `make test-all` runs them too.
emulate: $(READY)
	$(RUN_TESTS) $(PYTEST_FLAGS) tests/emulate

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	find csrc \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 | xargs -0 clang-format --dry-run -Werror

aot: $(READY)
	$(PY) -m himo_kernels.aot

# The operators' tests with every memory access of the extension checked. The build is separate from
# the in-place build. The first finding ends the run. Not checked:
# - leaks (detect_leaks=0): the interpreter and torch leak at exit, which would hide our leaks;
# - vptr (setup.py): torch hides the type information that it compares;
# - reference and triton: they do not use the extension.
# libstdc++ is preloaded because torch throws through it and the sanitizer must find it. The quarantine
# is 1 MiB instead of 256, as memory tests count it. Only Python's output is captured, so that
# sanitizer reports are printed.
SANITIZED := $(CURDIR)/build/sanitize/lib
SANITIZERS = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=1 UBSAN_OPTIONS=print_stacktrace=1
sanitize: $(READY)
	@echo "building the extension with sanitizers in build/sanitize"
	@mkdir -p build
	@HIMO_KERNELS_SANITIZE=1 $(PY) setup.py build --build-base build/sanitize --build-lib $(SANITIZED) \
	  >build/sanitize.log 2>&1 || { cat build/sanitize.log; exit 1; }
	$(SANITIZERS) PYTHONSAFEPATH=1 PYTHONPATH="$(SANITIZED):$(CURDIR)" $(PY) -m pytest \
	  -p no:cacheprovider --capture=sys -m "not slow" -k "not reference and not triton" $(PYTEST_FLAGS) \
	  $(or $(SANITIZE_TESTS),tests/covariance tests/normalize tests/pca tests/info_nce tests/sigmoid_loss tests/himo_loss tests/test_operators.py tests/test_memory.py tests/test_bad_input.py)

# An environment of its own, as the site is built without torch: mkdocstrings reads the sources.
DOCS := $(if $(strip $(VENV)),$(VENV)-docs)
DOCS_PY := $(if $(DOCS),$(DOCS)/bin/python,$(PY))
DOCS_EXTRA := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")
$(DOCS)/.installed: pyproject.toml
	@test -x $(DOCS_PY) || { echo "creating $(DOCS)"; $(PYTHON) -m venv $(DOCS); }
	@$(DOCS_PY) -c '$(DOCS_EXTRA)' >$(DOCS)/requirements.txt
	@$(DOCS_PY) -m pip --disable-pip-version-check install --quiet -r $(DOCS)/requirements.txt
	@touch $@

# The variable: a warning that mkdocs-material prints at each build, about a later mkdocs.
docs: $(if $(DOCS),$(DOCS)/.installed)
	NO_MKDOCS_2_WARNING=1 $(DOCS_PY) -m mkdocs --quiet build --strict
	@echo "the site: file://$(CURDIR)/build/site/index.html; with search: $(DOCS_PY) -m http.server -d build/site"

# Without what an earlier build left in build/lib*, which would be packed too.
wheel: $(READY)
	@rm -rf build/lib* build/bdist* dist/*.whl
	@$(PY) setup.py -q bdist_wheel
	@$(PY) -m zipfile -l dist/*.whl | grep 'himo_kernels/_C' >/dev/null || { \
	  echo "make wheel: the extension was left out" >&2; rm dist/*.whl; exit 1; }
	@ls dist/*.whl

sdist: $(if $(strip $(VENV)),$(VENV)/.himo-installed)
	@rm -rf dist/*.tar.gz
	@HIMO_KERNELS_NO_EXTENSION=1 $(PY) setup.py -q sdist
	@ls dist/*.tar.gz

install-check:
	@PATH="$(PATH_OUTSIDE)" TORCH="$(TORCH)" .ci/install-check

# Rows, charts, and the tables of both READMEs. Needs an otherwise idle machine.
bench: $(READY)
	@echo "timing every operator on the CPU: about 30 minutes, rows in $(BENCH_OUT)"
	$(BENCH) --device cpu --all --seconds 0.5 --budget-minutes 30 --out $(BENCH_OUT)
	$(IN_TREE) $(PY) -m benchmarks.ranks --out $(BENCH_OUT)
	$(IN_TREE) $(PY) -m benchmarks.plot $(BENCH_OUT) --svg $(BENCH_OUT) --update README.md benchmarks/README.md

# Kernels compiled, tested, checked, tuned and measured within GPU_MINUTES; rows, logs and tests in one
# folder and in one tar (benchmarks/gpu.py). The extension is built in a step, with all cores.
# DRY_RUN=1 runs the steps here, on a CPU.
GPU_TAR ?= build/$(notdir $(GPU_OUT)).tar.gz
GPU_MINUTES ?= 9.5
gpu: MAX_JOBS := $(shell nproc)
gpu: $(if $(strip $(VENV)),$(VENV)/.himo-tools)
	@$(IN_TREE) $(PY) -m benchmarks.gpu --out $(GPU_OUT) --tar $(GPU_TAR) --minutes $(GPU_MINUTES) \
	  $(if $(DRY_RUN),--dry-run) $(GPU_FLAGS)

# Two and more GPUs: the exchange over NCCL checked, profiled and timed (benchmarks/gpus.py).
GPUS_OUT ?= $(if $(DRY_RUN),build/gpus-dry,benchmarks/results/cuda-ranks)
GPUS_MINUTES ?= 20
gpus: $(if $(strip $(VENV)),$(VENV)/.himo-tools)
	@$(IN_TREE) $(PY) -m benchmarks.gpus --out $(GPUS_OUT) --tar build/$(notdir $(GPUS_OUT)).tar.gz \
	  --minutes $(GPUS_MINUTES) $(if $(DRY_RUN),--dry-run) $(GPUS_FLAGS)

# Trains a tiny model from scratch on rendered scenes, once with the HiMo loss and once with CLIP's.
DEMO_TRAIN := --model tiny --batch-size 64 --epochs 6 --lr 1e-3 --wd 0.1 --warmup 20 \
  --seed $(SEED) --val-frequency 2 --threads $(THREADS)
demo: $(BUILT)
	@rm -rf demo/logs
	$(PY) -m himo synth --out demo/data --num 2000 --held-out 500 --seed 0 --overwrite
	@set -e; for loss in himo clip; do \
	  echo "== training with the $$loss loss"; \
	  $(PY) -m himo train --train-data demo/data/train.json --val-data demo/data/test.json \
	    --loss $$loss $(DEMO_TRAIN) --logs demo/logs --name $$loss; \
	  $(PY) -m himo eval --pretrained demo/logs/$$loss/checkpoints/epoch_6.safetensors \
	    --data demo/data/test.json --out demo/logs/$$loss/eval.json; \
	done
	$(PY) -m himo report demo/logs/himo demo/logs/clip --out demo/report.html
	@echo "the report: file://$(CURDIR)/demo/report.html"
	@echo "what the component loss changes on such scenes: $(BENCH_OUT)/effect.html, of make effect"

# Small towers on the demo's kind of scenes, one thread each: the rows and page of the effect. A stopped
# run goes on; rm -r demo/effect begins anew, which a change of the code needs.
effect: $(BUILT)
	$(IN_TREE) OMP_NUM_THREADS=1 $(PY) -m benchmarks.effect --runs demo/effect --out $(BENCH_OUT)

clean:
	rm -rf build dist *.egg-info himo_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV:%=%/.himo-built)
	find himo_kernels tests benchmarks himo -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
