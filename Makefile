# make demo    install, then one network on small data: prune, fine-tune, measure time, tables and figures
# make paper   install, then all tables and figures of a configuration as one resumable batch (workflow/Snakefile)
# make plan    list the jobs of the full reproduction and estimate their run time
# make test    install, then all checks
# make bench   measure, for MINUTES=30, what is missing in outputs/bench/: pruned against unpruned, ours against other libraries
# make docs    the website of the notebooks, results and functions, in _site/
# make lab     JupyterLab on the notebooks
#
# Choices:  NETWORK=deq|varnet|e2e-varnet|usrnet|edsr-sr  CONFIG=demo|gpu|... (config/*.yaml)  TARGETS="table_1 figure_3"  CORES=2  GPUS=0
#           ARGUMENTS="--config acceleration=8": further options of Snakemake, or of JupyterLab: ARGUMENTS="--no-browser --allow-root"
#           TORCH=cpu|cuda|cu126|cu130|...: the build of torch that the first `make` installs; without it, or with cuda, the package index's

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SILENT:
.PHONY: demo paper plan test bench docs lab install check-export check-clean check-types check-notebooks check-tests check-experiments clean

NETWORK ?= varnet
CONFIG ?= demo
TARGETS ?= all
CORES ?= $(shell nproc)
GPUS ?= $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
JOBS_PER_GPU ?= 1
ARGUMENTS ?=
MINUTES ?= 30
DEVICE ?= cpu
export JOBS_PER_GPU
TORCH ?= cuda
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
VENV ?= .venv
BIN := $(VENV)/bin
# Snakemake, IPython, Jupyter and matplotlib keep files in the home: where that cannot be written, they are in the checkout
ifeq ($(shell test -w "$$HOME" && echo yes),)
export XDG_CACHE_HOME ?= $(CURDIR)/.snakemake/cache
export IPYTHONDIR ?= $(CURDIR)/.snakemake/ipython
export JUPYTER_CONFIG_DIR ?= $(CURDIR)/.snakemake/jupyter
export JUPYTER_DATA_DIR ?= $(CURDIR)/.snakemake/jupyter
export MPLCONFIGDIR ?= $(CURDIR)/.snakemake/matplotlib
endif
# The package index has one build of a version of torch: on Linux with an Intel or AMD processor that for CUDA, 5.2 GB with its libraries. Builds
# for the CPU (1.5 GB), or another CUDA, are in PyTorch's own index, under cpu, cu126, cu130, ... A version that is installed stays.
TORCH_PIN := $(shell grep '^torch==' constraints.txt)
# Python compiles what it imports and keeps it: not compiling all that is installed saves half a minute. Images of containers often set a
# variable against keeping; then each of the jobs and tests would compile torch and all the others again, for 5 s or more.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
PIP = $(PIP_INSTALL) $(TORCH_PIN)
OPTIONS = --configfile config/$(CONFIG).yaml --cores $(CORES) --resources gpu=$(shell expr $(GPUS) \* $(JOBS_PER_GPU)) --quiet rules $(ARGUMENTS)
CHECK = OMP_NUM_THREADS=1 TQDM_DISABLE=1 MPLBACKEND=agg $(BIN)/python

ifeq ($(origin PROFILE),command line)
$(error PROFILE= is not an option: name a file of config/ with CONFIG=$(PROFILE))
endif
$(if $(shell printf %s '$(JOBS_PER_GPU)' | grep -x '[1-9][0-9]*'),,$(error JOBS_PER_GPU must be a whole number of at least 1, got $(JOBS_PER_GPU)))
ifeq ($(wildcard config/$(CONFIG).yaml),)
$(error CONFIG must be one of $(basename $(notdir $(wildcard config/*.yaml))), got $(CONFIG))
endif
$(if $(filter cpu cuda cu1% rocm% xpu,$(TORCH)),,$(error TORCH must be cpu, cuda or a build of PyTorch's index such as cu126, got $(TORCH)))
$(if $(filter $(NETWORK),varnet deq e2e-varnet usrnet edsr-sr),,$(error NETWORK must be one of varnet deq e2e-varnet usrnet edsr-sr, got $(NETWORK)))
$(if $(filter-out all fmp fmp_table_2 fmp_table_3 fmp_table_4 fmp_figure_1 demo_% outputs/% /% figure_steps $(addprefix table_,1 2 3 4 5 6) $(addprefix figure_,1 2 3 4 5 6 7 8),$(TARGETS)),$(error TARGETS must be all, table_1 ... table_6, figure_1 ... figure_8, figure_steps, fmp, fmp_table_2 ... fmp_table_4, fmp_figure_1 or demo_<network>, got $(TARGETS)))

demo: $(VENV)/.installed
	$(BIN)/snakemake demo_$(NETWORK) $(OPTIONS)
	$(BIN)/python workflow/scripts/progress.py $(if $(filter edsr-sr,$(NETWORK)),outputs/$(CONFIG)/fmp_table_3.csv,outputs/$(CONFIG)/demo_$(NETWORK)/table_*.csv)

# Continues after a failed job. The same command again runs only what is missing or outdated.
paper: $(VENV)/.installed
	$(BIN)/snakemake $(TARGETS) $(OPTIONS)

plan: $(VENV)/.installed
	$(BIN)/snakemake $(TARGETS) --dry-run $(OPTIONS)
	@$(BIN)/python -c 'from spade.workflow import estimate; print(estimate("$(CONFIG)"))'

# Continues where it stopped. Best on a machine that does nothing else.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m spade.bench --minutes $(MINUTES) --device $(DEVICE)

docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html -c docs . _site
	@rm -rf jupyter_execute; echo "Open _site/index.html"

lab: $(VENV)/.hooks
	$(BIN)/python -m jupyter lab --ServerApp.root_dir=. nbs/index.ipynb $(ARGUMENTS)

# Once: git merges notebooks cell by cell (.gitattributes) and trusts them after a pull, by the nbdev of this environment. nbdev_install_hooks
# would write into ~/.jupyter, too, and replace a hook of the user.
$(VENV)/.hooks: $(VENV)/.installed-dev
	@if hooks=$$(git rev-parse --git-path hooks 2>/dev/null); then \
		git config merge.nbdev-merge.driver '"$(abspath $(BIN))/nbdev_merge" %O %A %B %P' && mkdir -p "$$hooks"; \
		if [ ! -e "$$hooks/post-merge" ]; then \
			printf '#!/bin/sh\nexec "%s"\n' '$(abspath $(BIN))/nbdev_trust' >"$$hooks/post-merge" && chmod +x "$$hooks/post-merge"; \
		fi; \
	fi
	@touch $@

install: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and f"spade needs Python 3.11 or newer, found {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "on Debian: apt-get install python3.11-venv"; exit 1; }

$(VENV)/.installed: constraints.txt settings.ini setup.py pyproject.toml | $(VENV)/bin/python
	@echo "Installing spade into $(VENV) (once, a few minutes) ..."
	$(if $(filter-out cuda,$(TORCH)),$(PIP_INSTALL) $(TORCH_PIN)+$(TORCH) --extra-index-url https://download.pytorch.org/whl/$(TORCH))
	@$(BIN)/python -m pip uninstall --quiet --yes spade 2>/dev/null || true  # an older name of this distribution
	$(PIP) -e '.[batch]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests and JupyterLab need ..."
	$(PIP) -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(shell grep '^fastmri==' constraints.txt)
	@touch $@

# The types are checked beside the notebooks: mypy takes one core.
test: check-export check-clean
	@$(MAKE) --no-print-directory -j 2 check-types check-notebooks
	@$(MAKE) --no-print-directory check-tests check-experiments
	@echo "All checks passed."

# spade/ must equal the export of the notebooks. After a difference the files are updated: review and commit them.
check-export: $(VENV)/.installed-dev
	@before=$$(mktemp -d); trap 'rm -rf "$$before"' EXIT; cp -r spade "$$before"; $(BIN)/nbdev_export; \
	diff -r -x __pycache__ "$$before/spade" spade || { echo "spade/ was not in step with nbs/; nbdev_export has just updated it"; exit 1; }

check-clean: $(VENV)/.installed-dev
	$(BIN)/ruff format --check nbs tests
	$(BIN)/ruff check nbs tests
	@before=$$(mktemp -d); trap 'rm -rf "$$before"' EXIT; cp -r nbs "$$before"; $(BIN)/nbdev_clean; \
	diff -rq -x .ipynb_checkpoints "$$before/nbs" nbs || { echo "these notebooks were not clean; nbdev_clean has just cleaned them"; exit 1; }

check-types: $(VENV)/.installed-dev
	$(BIN)/mypy

# Executes each library notebook once and compares the stored outputs with the fresh ones, numbers masked.
check-notebooks: $(VENV)/.installed-dev
	$(CHECK) tests/execute_notebooks.py

# Two files at a time, those that take longest first.
check-tests: $(VENV)/.installed-dev
	$(CHECK) -m pytest -q --durations 10 -n 2 --dist loadfile --no-loadscope-reorder \
		tests/test_slurm.py tests/test_workflow.py tests/test_failures.py tests/test_experiments.py tests/test_zoo.py tests/test_docs.py tests

# Each experiment notebook in a batch, with every network. Tables 2, 5, 6 and Figures 4, 6, 8 are the same notebooks with other parameters, and
# the demo of VarNet makes Figures 3 and 7.
SMOKE := $(foreach n,1 3 4,table_$(n)) $(foreach n,1 2 5 steps,figure_$(n)) demo_varnet fmp

check-experiments: $(VENV)/.installed-dev
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	$(BIN)/snakemake $(SMOKE) --configfile config/smoke.yaml --config results="$$out/results" acquisitions="$$out/data" --cores $(CORES) --quiet rules

clean:
	rm -rf $(VENV) _site docs/api build dist *.egg-info
