# Two commands do all the set-up: `make reproduce` and `make test`. `make` alone explains.
PROFILE ?=
PYTHON ?= python3
BIN := .venv/bin
# What people name is quoted for the shell and never expanded by make, which does so to export.
unexport PROFILE PYTHON NAME MODEL ROWS CORES ENGINE ENGINE_OPTIONS PARTIAL MINUTES PIECES TO HAVE ONLY MB
quoted = '$(subst ','\'',$(value $(1)))'
option = $(if $(value $(1)),$(2)=$(call quoted,$(1)))
# The code of this folder, also where .venv was copied with it from another.
NEFT := PATH="$$PWD/$(BIN):$$PATH" PYTHONPATH="$$PWD" $(BIN)/python -m neft_utils
WITH := $(call option,PROFILE,--profile)
.DEFAULT_GOAL := help
.PHONY: help env plan check profile smoke reproduce figures compare bench bench-gpu gpu-queue gpu-parcel gpu-unpack promote resume report test test-gpu test-slurm test-faults test-all lint strip clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

.venv/installed: requirements.txt pyproject.toml
	@$(call quoted,PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "error: Python 3.11, 3.12 or 3.13 is needed, this one is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11 ...")'
	@test -x $(BIN)/python || $(call quoted,PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or print("Python %d.%d: the stored numbers come from 3.11, yours may differ in the last digits" % v)'
	@command -v nvidia-smi > /dev/null || test -n "$$PIP_FIND_LINKS$$PIP_EXTRA_INDEX_URL$$PIP_INDEX_URL" || echo "no GPU here: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu picks the small CPU build of torch"
	@echo "installing the pinned packages into .venv (minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

env: .venv/installed  ## create .venv with the pinned packages

plan: env  ## print steps, sizes and estimates of PROFILE without running
	@$(NEFT) plan $(WITH) $(call option,CORES,--cores)

profile: env  ## begin a profile of your own: NAME=mine MODEL=folder ROWS=rows.json writes mine.yaml
	@$(NEFT) profile $(WITH) $(call option,NAME,--name) $(call option,MODEL,--model) $(call option,ROWS,--rows)

check: env  ## look at machine, model and rows of PROFILE before a run
	@$(NEFT) check $(WITH)

smoke: env  ## run the whole chain at tiny sizes (3 to 7 minutes on 2 cores)
	@$(NEFT) reproduce --profile smoke

reproduce: env  ## run all notebooks of PROFILE (default: cpu, or gpu-small with a GPU), ENGINE=slurm on a cluster
	@$(NEFT) reproduce $(WITH) $(call option,CORES,--cores) $(call option,ENGINE,--engine) $(call option,ENGINE_OPTIONS,--engine-options)

figures: env  ## make figures and tables again from stored results, in seconds
	@$(NEFT) figures $(WITH)

compare: env  ## hold local results against results/reference
	@$(NEFT) compare $(WITH)

bench: env  ## time training and answering beside plain TRL (idle machine, a quarter of an hour)
	@$(NEFT) bench $(WITH)

bench-gpu: env  ## time a 7B-shaped QLoRA on one GPU beside plain TRL (random weights)
	@$(NEFT) bench-gpu $(call option,MINUTES,--minutes)

gpu-queue: env  ## on a rented card: do what is missing and fits into MINUTES=15 (PIECES=gpu-small: that alone), and go on the next time
	@$(NEFT) gpu-queue --minutes $(call quoted,MINUTES) $(call option,PIECES,--pieces)

gpu-parcel: env  ## pack model, rows and packages for a card without a network, in pieces of 60 MB
	@$(NEFT) gpu-parcel $(call option,TO,--to) $(call option,MB,--mb) $(call option,HAVE,--have) $(call option,ONLY,--only)

gpu-unpack: env  ## put the pieces of gpu-parcel where they are looked for
	@$(NEFT) gpu-unpack $(call option,TO,--of)

promote: env  ## copy a complete run at a clean commit to results/reference (PARTIAL=yes: the complete runs, to results/partial)
	@$(NEFT) promote $(WITH) $(if $(PARTIAL),--partial)

resume: env  ## go on from the runs in results/partial, which another machine kept; then make reproduce
	@$(NEFT) resume $(WITH)

report: env  ## a static HTML site of the results, index.html and a page a notebook
	@$(NEFT) report $(WITH)

test: env  ## lint, unit tests, nano and smoke chain (20 to 40 minutes on 2 cores)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@PYTHONPATH="$$PWD" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: env  ## also what is slow or needs a GPU, Slurm, vLLM or the network
	@PYTHONPATH="$$PWD" $(BIN)/python -m pytest -m ""

test-gpu: env  ## the tests that need a card (gpu-queue runs them first)
	@$(NEFT) gpu-tests

test-faults: env  ## kill the nano chain at twenty points, fill its disk, interrupt it (half an hour)
	@PYTHONPATH="$$PWD" $(BIN)/python -m pytest tests/make/test_faults.py -m "faults or not faults" -p no:cacheprovider

test-slurm: env  ## run the nano chain on a one-node Slurm, started here (Debian: slurmctld slurmd munge)
	@PYTHONPATH="$$PWD" $(BIN)/python -m pytest -m slurm

lint: env  ## ruff over package, tests and notebooks
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

strip: env  ## clear outputs of the source notebooks
	@$(NEFT) strip

clean:  ## delete local results, processed data and rounded copies of models (downloads stay)
	rm -rf results/local data/processed data/models/*-nf4_dequantized .snakemake
