# Needs Python 3.10+ with venv, make and a C++17 compiler (gcc 11+ or clang 12+). Everything lands in .venv and build/.
#   make demo     install, quantize the sample model, ask it one question
#   make test     install and run all tests
#   make lint     ruff, mypy, clang-format
#   make fuzz     the parsers' fuzzers, a minute each, two at a time
#   make sanitize  the kernel tests, the hostile files and two fuzzers with AddressSanitizer and UBSan
#   make bench    measure the expert engine against this machine's own ceilings
#   make docs     rewrite the generated pages of docs/
#   make clean    remove what was built (distclean: .venv too)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
DEMO := build/demo
ASAN := $(CURDIR)/build/asan
# Files that break every rule of their format, read as far as a program would.
HOSTILE := tests/checkpoint/test_gguf_hostile.py tests/checkpoint/test_safetensors_header.py tests/checkpoint/test_checkpoint.py \
	tests/checkpoint/test_fp8.py tests/families/test_gpt_oss.py tests/runtime/test_pack.py tests/engine/test_dequantize.py
# Bindings beyond the kernels: steps of a layer, errors of a conversion, blocks into packs and back.
BINDINGS := tests/engine/test_steps.py tests/engine/test_gqa_step.py tests/quantize/test_report.py tests/quantize/test_blocks.py
# Bounds the memory of a process, in which the sanitizer keeps what was freed.
MEMORY := tests/checkpoint/test_checkpoint.py::test_memory_holds_one_tensor

# Python's own build asks for gcc by name; where only clang is installed, say so.
ifeq ($(shell command -v g++ 2>/dev/null),)
ifneq ($(shell command -v clang++ 2>/dev/null),)
export CC := clang
export CXX := clang++
endif
endif

NATIVE := $(wildcard setup.py csrc/*.cpp csrc/*.h csrc/isa/*.cpp csrc/isa/*.h)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/isa/*.cpp csrc/isa/*.h tests/csrc/*.cpp tests/engine/native/*.cpp)

.PHONY: install dev demo test lint fuzz sanitize bench docs clean distclean

install: $(VENV)/.installed
dev: $(VENV)/.dev

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and pinned, so that nothing else in the resolution gets to choose it.
$(VENV)/.torch: constraints.txt | $(VENV)/.created
	$(PIP) torch
	touch $@

$(VENV)/.installed: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(PIP) setuptools pybind11
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.installed
	$(BIN)/python -c 'from importlib.metadata import requires; d = "extra == \"dev\""; print(*[r.replace(f" and {d}", "").replace(f"; {d}", "") for r in requires("kttools") if d in r], sep="\n")' > $(VENV)/dev.txt
	$(PIP) -r $(VENV)/dev.txt
	touch $@

demo: install
	rm -rf $(DEMO)
	$(BIN)/kttools quantize samples/ds3-nano -o $(DEMO)/ds3-nano-int8-int4
	$(BIN)/kttools chat $(DEMO)/ds3-nano-int8-int4 -p "What is a mixture-of-experts model?" -n 128 --temp 0

test: dev
	$(BIN)/python -m pytest

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

fuzz: dev
	$(BIN)/python -m tests.fuzz.run --seconds 60 --jobs 2 --most 240 --save build/fuzz

# A second build in build/asan; the sanitizer's runtime must be in the process before Python's own allocations.
sanitize: dev
	KTTOOLS_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build --build-base $(ASAN) --build-lib $(ASAN)/lib
	PYTHONPATH=$(ASAN)/lib ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	sh -c '$(BIN)/python -m pytest -m "isa and not slow" tests/engine \
	&& $(BIN)/python -m pytest -m "not isa" $(BINDINGS) \
	&& $(BIN)/python -m pytest $(HOSTILE) --deselect $(MEMORY) && $(BIN)/python -m tests.fuzz.run gguf safetensors --save build/fuzz'

bench: install
	$(BIN)/kttools bench experts

docs: install
	$(BIN)/python docs/generate_cli.py

clean:
	rm -rf build out dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info runtime/kttools_runtime/_kernels*.so
	find kttools runtime tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed $(VENV)/.dev

distclean: clean
	rm -rf $(VENV)
