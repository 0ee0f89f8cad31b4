# make demo    install, then the paper's main job on small data: prune, fine-tune, evaluate, Table 1, Figures 3 and 7 (usrnet: Tables 4 and 6, Figure 5)
# make paper   install, then all tables and figures of a profile as one resumable batch (Snakefile): make paper PROFILE=demo, TARGETS="table_1 figure_3", CORES=2 GPUS=0
# make test    install, then every check: export, clean notebooks, library notebooks, pytest, experiments in the smoke profile
# make lab     JupyterLab on the notebooks
#
# Choices:  make demo NETWORK=deq|varnet|e2e-varnet|usrnet  PROFILE=demo|gpu|…  ARGUMENTS="--acceleration 8"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo paper plan test lab install check-export check-clean check-notebooks check-tests check-experiments clean

NETWORK ?= varnet
TARGETS ?= all
CORES ?= $(shell nproc)
GPUS ?= $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
PROFILE ?= demo
ARGUMENTS ?=
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
VENV ?= .venv
BIN := $(VENV)/bin
# torch is named with its exact version: a bare name may pull gigabytes of GPU libraries onto a machine without one
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
FASTMRI := $(shell grep '^fastmri==' constraints.txt)
INPUTS := constraints.txt settings.ini setup.py pyproject.toml

demo: $(VENV)/.installed
	$(BIN)/python -m spade.batch demo --network $(NETWORK) --profile $(PROFILE) $(ARGUMENTS)

# Goes on after a failing job; the index then shows what there is. Run it again and only what is missing or changed is done.
paper: $(VENV)/.installed-batch
	@test -f config/$(PROFILE).yaml || { echo "spade: unknown profile '$(PROFILE)': choose one of $(basename $(notdir $(wildcard config/*.yaml)))" >&2; exit 2; }
	@done=0; $(BIN)/snakemake $(TARGETS) --configfile config/$(PROFILE).yaml --cores $(CORES) --resources gpu=$(GPUS) --keep-going --rerun-incomplete --quiet rules $(ARGUMENTS) || done=$$?; \
	$(if $(filter -n --dry-run --dryrun,$(ARGUMENTS)),,$(BIN)/python -m spade.batch index --profile $(PROFILE) $(patsubst results=%,--out %,$(filter results=%,$(ARGUMENTS)));) exit $$done

plan: $(VENV)/.installed-batch
	$(BIN)/python -m spade.batch plan --profile $(PROFILE)

lab: $(VENV)/.installed-dev
	$(BIN)/python -m jupyter lab --notebook-dir nbs

install: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and f"spade needs Python 3.11 or newer, found {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "on Debian: apt-get install python3.11-venv"; exit 1; }

# The stamps are newer than what they depend on once an installation is complete, so it is not repeated.
$(VENV)/.installed: $(INPUTS) | $(VENV)/bin/python
	@echo "Installing spade into $(VENV) (once, a few minutes) ..."
	$(PIP) $(TORCH) -e .
	@touch $@

$(VENV)/.installed-batch: $(VENV)/.installed
	@echo "Installing what the batch needs ..."
	$(PIP) $(TORCH) -e '.[batch]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests and JupyterLab need ..."
	$(PIP) $(TORCH) -e '.[dev]'
	$(PIP) --no-deps $(FASTMRI)
	@touch $@

test: check-export check-clean check-notebooks check-tests check-experiments
	@echo "All checks passed."

# spade/ must be what the notebooks export. On a difference the tree is in step afterwards: look at it and commit.
check-export: $(VENV)/.installed-dev
	@echo "== export in step with the notebooks"
	@before=$$(mktemp -d); trap 'rm -rf "$$before"' EXIT; cp -r spade "$$before"; \
	$(BIN)/nbdev_export; \
	diff -r -x __pycache__ "$$before/spade" spade || { echo "spade/ was not in step with nbs/; nbdev_export has just updated it"; exit 1; }

check-clean: $(VENV)/.installed-dev
	@echo "== notebooks clean"
	@before=$$(mktemp -d); trap 'rm -rf "$$before"' EXIT; cp -r nbs "$$before"; \
	$(BIN)/nbdev_clean; \
	diff -rq -x .ipynb_checkpoints "$$before/nbs" nbs || { echo "these notebooks were not clean; nbdev_clean has just cleaned them"; exit 1; }

check-notebooks: $(VENV)/.installed-dev
	@echo "== library notebooks"
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 MPLBACKEND=agg $(BIN)/nbdev_test --n_workers 2 --timing

# Two files at a time, those that take longest first.
check-tests: $(VENV)/.installed-dev
	@echo "== pytest"
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 MPLBACKEND=agg $(BIN)/python -m pytest -q --durations 10 -n 2 --dist loadfile --no-loadscope-reorder \
	    tests/test_slurm.py tests/test_snakefile.py tests/test_experiments.py tests

# Every experiment notebook, for every network, from data to figure. The folder is fresh, so nothing is skipped. Photographs need nothing of MRI, so they go side by side.
check-experiments: $(VENV)/.installed-dev
	@echo "== experiments in the smoke profile"
	@out=$$(mktemp -d); trap 'kill $$(jobs -p) 2>/dev/null || true; wait; rm -rf "$$out"' EXIT; \
	$(BIN)/python -m spade.batch demo --network usrnet --profile smoke --out "$$out/results" & photographs=$$!; \
	for network in varnet e2e-varnet deq; do \
	    $(BIN)/python -m spade.batch demo --network $$network --profile smoke --data "$$out/data" --out "$$out/results"; \
	done; \
	wait $$photographs; \
	$(BIN)/snakemake "$$out/results/runs/varnet-R6-0.40-supervised-random-seed0/result.json" --configfile config/smoke.yaml --config results="$$out/results" acquisitions="$$out/data" --cores 2 --quiet rules progress; \
	$(BIN)/snakemake all --configfile config/smoke.yaml --config partial=true results="$$out/results" acquisitions="$$out/data" --cores 2 --quiet rules progress

clean:
	rm -rf $(VENV) build dist *.egg-info
