# Own virtual environment in .venv, made once: a second `make` finds the stamp and goes on at once.
#
#   make demo                     the whole path on this computer
#   make test                     the quick tests (make test-all: all tests and transformers' own, with the newest and the oldest versions)
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu     PyTorch's CPU build instead of the CUDA one of several GB

PYTHON ?= python3
TORCH_VERSION := 2.13.0
OLDEST_TORCH ?= 2.11.0
TORCH_INDEX ?=
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/installed
CONSTRAINTS := constraints.txt
EXTRAS := dev,quant,trl
# One thread a worker: two that share two cores are slower with more. Each begins with its own share of the files
# (worksteal), so most fixtures of a file are made once.
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=10

.PHONY: install demo test test-all test-oldest lint clean

install: $(STAMP)

%/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' || { echo "Python's venv is missing: apt install python3-venv"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH_VERSION) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	@touch $@

demo: install
	$(BIN)/qwhisper demo

test: install
	$(PYTEST) -m "not slow"

test-all: install
	-$(BIN)/python -m tests.huggingface.mixins
	$(PYTEST)
	$(MAKE) test-oldest
	@$(BIN)/python -m tests.huggingface.mixins --report

# All tests with the oldest versions that pyproject.toml allows. trl needs a newer accelerate.
test-oldest: BIN := .venv-oldest/bin
test-oldest: TORCH_VERSION := $(OLDEST_TORCH)
test-oldest: CONSTRAINTS := constraints-oldest.txt
test-oldest: EXTRAS := dev,quant
test-oldest: .venv-oldest/installed
	-$(BIN)/python -m tests.huggingface.mixins
	$(PYTEST)
	@$(BIN)/python -m tests.huggingface.mixins --report

.venv-oldest/installed: constraints-oldest.txt

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf .venv .venv-oldest build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
