# The commands of README.md; `.ci/run` runs the same.
PYTHON ?= python3
BIN := .venv/bin
TOOLS := chromium chromedriver ip bwrap
PACKAGES := chromium chromium-driver iproute2 bubblewrap
# Two ranks share this machine's cores; more threads than cores only wait for each other.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo board test test-oldest test-newest test-python test-3.12 test-3.13 test-gpu test-cuda-host test-slurm test-faults test-trackers bench bench-gpu tools check clean

demo: .venv/installed          ## learn a preference on two processes, in minutes
	$(BIN)/python -m dpo.demo

board: .venv/installed         ## the demo's dashboard in a browser
	$(BIN)/tensorboard --logdir runs/demo

test: .venv/installed          ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-oldest test-newest: test-%: .venv-%/installed  ## the quick tests with the oldest or newest torch and transformers
	.venv-$*/bin/python -m pytest -n 2 --dist loadgroup -m quick

test-python: test-3.12 test-3.13  ## the quick tests with newer Pythons, where they are found

test-3.12 test-3.13: test-%:
	@found=$$($(PYTHON) -m tests.pythons $*) || { echo 'no python$* was found: nothing is tested with it'; exit 0; }; \
	$(MAKE) --no-print-directory PYTHON="$$found" .venv-$*/installed && \
	.venv-$*/bin/python -m pytest -n 2 --dist loadgroup -m quick

test-gpu: .venv/installed      ## tests that need a GPU, with two GPUs also NCCL; prints what it skips
	DPO_TEST_GPU=1 $(BIN)/python -m pytest tests/gpu -rs

# Needs torch's CUDA wheel, which pip takes by itself on Linux where no CPU build is pinned or preferred: 5 GB on the disk.
test-cuda-host: .venv-cuda/installed  ## host-side CUDA tests without a GPU, on stub CUDA libraries (gcc, Python.h)
	.venv-cuda/bin/python -m pytest tests/gpu/test_host_side.py tests/gpu/test_flex_compiles.py -rs

bench-gpu: .venv/installed     ## speed, memory and the first step's check on the GPUs of one node, as a row for a table
	$(BIN)/torchrun --standalone --nproc-per-node gpu -m tests.bench.device

test-slurm: .venv/installed    ## jobs on a real SLURM of two nodes on this machine (root; apt installs it), in minutes
	$(BIN)/python -m tests.slurm.cluster $(BIN)/python -m pytest tests/slurm || test $$? = 77  # no such cluster here: it prints why

test-faults: .venv/installed   ## storms with a seed: damaged files, kill -9, signals in every phase; under half an hour
	$(BIN)/python -m tests.faults.storm --count 200 --seed 1
	$(BIN)/python -m tests.faults.kills --seed 1 --count 20
	$(BIN)/python -m tests.faults.signals

test-trackers: .venv-trackers/installed  ## a killed run in W&B and trackio, without a network
	.venv-trackers/bin/python -m pytest tests/trackers -rs

bench: .venv/installed-bench .venv-trl/installed  ## tables and plots of speed and memory into bench/, in two hours on an idle machine
	$(BIN)/python -m tests.bench.peer
	$(BIN)/python -m tests.bench.scaling
	$(BIN)/python -m tests.bench.planning
	$(BIN)/python -m tests.bench.checkpoints
	$(BIN)/python -m tests.bench.estimate_check
	$(BIN)/python -m tests.bench.million
	$(BIN)/python -m tests.bench.many_ranks 4 8 16 32
	$(BIN)/python -m tests.bench.measured_estimate

tools:                         ## Debian packages that some tests use, by apt; without them these tests are skipped
	which $(TOOLS) > /dev/null || { apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $(PACKAGES) > /dev/null; } || \
	echo 'no apt-get, or not root: tests that need a browser, network namespaces or a container are skipped'

check: .venv/installed         ## style, spelling, types, and which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

NEW_ENOUGH = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'

.venv/installed: pyproject.toml constraints.txt
	$(NEW_ENOUGH)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv-oldest/installed .venv-newest/installed: .venv-%/installed: pyproject.toml constraints-%.txt
	$(NEW_ENOUGH)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-$*.txt -e '.[dev]'
	touch $@

.venv-3.12/installed .venv-3.13/installed .venv-cuda/installed: .venv-%/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Without compiling all of torch to byte code, the environment takes half the time.
.venv-trackers/installed: pyproject.toml constraints-trackers.txt
	$(NEW_ENOUGH)
	$(PYTHON) -m venv .venv-trackers
	.venv-trackers/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints-trackers.txt -e '.[dev,wandb,trackio]'
	touch $@

.venv/installed-bench: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

.venv-trl/installed: tests/bench/trl-requirements.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

clean:                         ## remove everything that make created
	rm -rf .venv .venv-oldest .venv-newest .venv-3.12 .venv-3.13 .venv-cuda .venv-trackers .venv-trl runs bench
