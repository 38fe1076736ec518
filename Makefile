# `make demo` and `make test` are all a fresh clone needs: Python >= 3.11, pip and make.
# The first target that runs makes .venv and installs into it; VENV=... puts it elsewhere,
# PYTHON=... chooses the interpreter.

VENV ?= .venv
PYTHON ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CANDIDATES := $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14 python

.PHONY: help demo test slow gpu lint format bench bench-gpu install clean

help:
	@echo "make demo     turn the small checkpoint of this repository into a hybrid, and compare"
	@echo "make test     the fast tests            make slow    the slow ones"
	@echo "make gpu      the tests that need CUDA  make lint    ruff and mypy"
	@echo "make bench    the benchmarks            make format  let ruff rewrite the sources"
	@echo "make bench-gpu  the GPU kernels beside others, and the tests that need CUDA"
	@echo "make install  only make $(VENV)         make clean   remove $(VENV) and the caches"

demo: $(STAMP)
	$(BIN)/morph run demo

# One process per core, each computing on one thread
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not gpu"

slow: $(STAMP)
	$(BIN)/python -m pytest -q -m "slow and not gpu"

gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	@set -e; for file in benchmarks/bench_[!g]*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

bench-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python benchmarks/bench_gpu.py
	$(BIN)/python benchmarks/bench_gpu_sparse.py

install: $(STAMP)

# `python -m venv` cannot bring pip along where the system splits it off (Debian without
# python3-venv); the pip that is there then installs one into the new environment.
$(STAMP): pyproject.toml constraints.txt
	@set -e; for python in $(CANDIDATES) none; do \
	  if [ $$python = none ]; then \
	    echo "morph needs Python 3.11 or newer; found: $$(python3 --version 2>&1 || true)." >&2; \
	    echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
	  fi; \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
	done; \
	echo "Installing into $(VENV) with $$($$python --version) (once; about 2 GB on disk)."; \
	if ! $$python -m venv $(VENV) >/dev/null 2>&1; then \
	  $$python -m venv --without-pip $(VENV); \
	  $$python -m pip --python $(BIN)/python install -q pip; \
	fi; \
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'; \
	touch $@

clean:
	if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf .mypy_cache .pytest_cache .ruff_cache
