# Two commands do everything: make quickstart, make test. The others are parts of them.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
RANKS ?= 2

.PHONY: quickstart test lint test-gpu clean

quickstart: $(INSTALLED)
	$(BIN)/python -m data_prep stdlib --out data/stdlib --validation-fraction 0.05
	$(BIN)/torchrun --nproc-per-node $(RANKS) train.py configs/quickstart.yaml run.name=quickstart

test: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

# Without a GPU the CPU build of torch comes first, so that nothing draws in CUDA packages.
$(INSTALLED): pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs data
