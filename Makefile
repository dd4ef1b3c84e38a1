# Everything a newcomer types; `.ci/run` types the same.
PYTHON ?= python3
BIN := .venv/bin
# Two ranks share this machine's cores; more threads than cores only wait for each other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check clean

demo: .venv/installed          ## learn a preference on two processes, in minutes
	$(BIN)/python -m dpo.demo

test: .venv/installed          ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: .venv/installed         ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:                         ## what make made
	rm -rf .venv runs
