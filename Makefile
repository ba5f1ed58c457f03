# Two commands do all the set-up: `make reproduce` and `make test`. `make` alone explains.
PROFILE ?=
PYTHON ?= python3
BIN := .venv/bin
NEFT := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m neft_utils
WITH := $(if $(PROFILE),--profile '$(subst ','\'',$(PROFILE))')
.DEFAULT_GOAL := help
.PHONY: help env plan check smoke reproduce figures compare bench bench-gpu promote report test test-slurm test-faults test-all lint strip clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "error: the reproduction is pinned for Python 3.11, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11 ...")'
	@test -d .venv || $(PYTHON) -m venv .venv
	@command -v nvidia-smi > /dev/null || test -n "$$PIP_FIND_LINKS$$PIP_EXTRA_INDEX_URL$$PIP_INDEX_URL" || echo "no GPU here: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu picks the small CPU build of torch"
	@echo "installing the pinned packages into .venv (minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

env: .venv/installed  ## create .venv with the pinned packages

plan: env  ## print steps, sizes and estimates of PROFILE without running
	@$(NEFT) plan $(WITH) $(if $(CORES),--cores $(CORES))

check: env  ## look at machine, model and rows of PROFILE before a run
	@$(NEFT) check $(WITH)

smoke: env  ## run the whole chain at tiny sizes (about 3 minutes on 2 cores)
	@$(NEFT) reproduce --profile smoke

reproduce: env  ## run all notebooks of PROFILE (default: cpu, or gpu-small with a GPU), ENGINE=slurm on a cluster
	@$(NEFT) reproduce $(WITH) $(if $(CORES),--cores $(CORES)) $(if $(ENGINE),--engine $(ENGINE)) $(if $(ENGINE_OPTIONS),--engine-options="$(ENGINE_OPTIONS)")

figures: env  ## make figures and tables again from stored results, in seconds
	@$(NEFT) figures $(WITH)

compare: env  ## hold local results against results/reference
	@$(NEFT) compare $(WITH)

bench: env  ## time training and answering beside plain TRL (idle machine, a quarter of an hour)
	@$(NEFT) bench $(WITH)

bench-gpu: env  ## time a 7B-shaped QLoRA on one GPU beside plain TRL (random weights)
	@$(NEFT) bench-gpu

promote: env  ## copy a complete run at a clean commit to results/reference (PARTIAL=yes: what is whole, to results/partial)
	@$(NEFT) promote $(WITH) $(if $(PARTIAL),--partial)

report: env  ## a static HTML site of the results, index.html and a page a notebook
	@$(NEFT) report $(WITH)

test: env  ## lint, unit tests, nano and smoke chain (a quarter of an hour on 2 cores)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: env  ## also what is slow or needs a GPU, Slurm, vLLM or the network
	@$(BIN)/python -m pytest -m ""

test-faults: env  ## kill the nano chain at twenty points, fill its disk, interrupt it (half an hour)
	@$(BIN)/python -m pytest tests/make/test_faults.py -m "faults or not faults" -p no:cacheprovider

test-slurm: env  ## run the nano chain on a one-node Slurm, started here (Debian: slurmctld slurmd munge)
	@$(BIN)/python -m pytest -m slurm

lint: env  ## ruff over package, tests and notebooks
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

strip: env  ## clear outputs of the source notebooks
	@$(NEFT) strip

clean:  ## delete local results, processed data and rounded copies of models (downloads stay)
	rm -rf results/local data/processed data/models/*-nf4_dequantized .snakemake
