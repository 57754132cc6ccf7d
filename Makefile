# On a machine with Python and make alone: `make train` and `make test` set everything up and run.
PYTHON ?= python3
VENV ?= .venv
# More arguments for pip, such as another index to take a CPU build of torch from.
PIP_ARGS ?=
BIN := $(VENV)/bin
# The quick start's ranks: the GPUs, or without any the cores, as far as the batch of 8 rows can be shared.
RANKS ?= $(shell $(PYTHON) -c 'import os; from mikoshi.launch.host.gpus import count_visible_gpus; n = count_visible_gpus() or os.cpu_count(); print(max(r for r in (1, 2, 4, 8) if r <= n))')
RUN := configs/runs/quickstart.toml
# Tests that run at once. Many start several ranks, and wait for something in between: one a core is enough.
WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist worksteal
# Folders of the slow tests, where not all of them are wanted.
SLOW ?= tests

.PHONY: help train test test-slow test-soak test-all docs bench bench-train bench-data bench-save bench-launch bench-gpu clean

help:
	@echo "make train      prepare real text, train a GPT on every rank of this machine, report, and let it write"
	@echo "make test       lint, types and tests, about 10 minutes on 2 cores"
	@echo "make test-all   and the slow ones: whole matrices, compilation, and soaks of faults"
	@echo "make docs       the documentation as a site, in site/"
	@echo "make bench      bench-train: speed and memory beside Hugging Face, plain PyTorch and DeepSpeed, on this CPU;"
	@echo "                bench-data: reading beside litdata, mosaicml-streaming, Megatron and datasets, and tokenizing"
	@echo "                bench-save: saving and loading checkpoints beside torch's own"
	@echo "                bench-launch: submitting to a real Slurm, losing a node, the state of 1,000 runs"
	@echo "make bench-gpu  the same on a CUDA device, with GPT-2 124M and 1.5B; and the engines beside each other"

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	touch $@

train: $(VENV)/.run
	$(BIN)/mikoshi prepare $(RUN)
	$(BIN)/mikoshi train $(RUN) --ranks $(RANKS)
	$(BIN)/mikoshi report runs/quickstart
	$(BIN)/mikoshi generate runs/quickstart --prompt "class " --tokens 120 --seed 1

test: $(VENV)/.dev
	$(PYTEST) -m "not slow and not soak"

test-slow: $(VENV)/.dev
	$(PYTEST) -m "slow and not soak" $(SLOW)

test-soak: $(VENV)/.dev
	$(PYTEST) -m soak

test-all: test test-slow test-soak

docs: $(VENV)/.docs
	$(BIN)/python docs/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -P -m mkdocs build --strict --quiet
	@echo "site/index.html"

bench: bench-train bench-data bench-save bench-launch

bench-train: $(VENV)/.dev
	$(BIN)/python -P tests/bench/run.py

# The libraries that are read beside get environments of their own under build/, a few GB, on the first run.
bench-data: $(VENV)/.dev
	$(BIN)/python -P tests/bench/reading.py
	$(BIN)/python -P tests/bench/tokenizing.py
	$(BIN)/python -P tests/bench/preparing.py
	$(BIN)/python -P tests/bench/hedge.py
	$(BIN)/python -P tests/bench/scale.py

bench-save: $(VENV)/.dev
	$(BIN)/python -P tests/bench/saving.py

bench-launch: $(VENV)/.dev
	$(BIN)/python -P tests/bench/board.py
	$(BIN)/python -P tests/bench/launching.py

# Runs with the Python at hand, where torch sees the GPU.
bench-gpu:
	$(PYTHON) tests/bench/run.py --gpu

clean:
	rm -rf $(VENV) build runs site *.egg-info
