# Every target that needs the environment .venv creates it first, with the versions in
# constraints.txt. An environment holds one MPI: the mpich wheel or, with MPI=system, the machine's
# library, which mpi4py finds; MPIEXEC (default: mpiexec from PATH) launches it.

PYTHON ?= python3
MPI ?= mpich
RANKS ?= 4
# Test processes: one more than two cores, because some tests wait.
JOBS ?= 3
ARGS ?=

# Keep compiled code, or every process compiles all of it again.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.ready-$(MPI)
PIP := $(VENV_PYTHON) -m pip --disable-pip-version-check

# The user's choice, before a default replaces it.
NAMED_MPIEXEC := $(MPIEXEC)

ifeq ($(MPI),mpich)
  MPIEXEC := $(VENV)/bin/mpiexec
  MPI_WHEEL := mpich
  TEST_ENV :=
else ifeq ($(MPI),system)
  MPIEXEC ?= mpiexec
  MPI_WHEEL :=
  TEST_ENV := LVXATTN_MPIEXEC="$(MPIEXEC)"
else
  $(error MPI: expected mpich or system, got '$(MPI)')
endif

define NEEDS_PYTHON
@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not found. Python 3.11 or newer is required: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is required, and $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
	    "Select another one: make PYTHON=python3.12" >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo train tutorials lab notebooks slides docs test test-all test-rest test-core
.PHONY: test-models lint soak bench gpu bench-quick scoreboard clean check-mpiexec

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s  %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## Create .venv (PYTHON=python3.12 selects the interpreter, MPI=system the machine's MPI)

demo: check-mpiexec $(STAMP) ## Search a long video on 4 MPI ranks (RANKS=8, ARGS="--video FILE")
	@if [ -t 1 ]; then export LVXATTN_PROGRESS=line; fi; \
	exec $(MPIEXEC) -n $(RANKS) $(VENV_PYTHON) -m mpi4py -m lvxattn.mpi_impl demo $(ARGS)

train: $(STAMP) ## Train a small PyTorch model on 4 ranks to find digits in long clips, 1 to 3 minutes (ARGS="--model llama3v", 7 minutes)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV_PYTHON) -m torch.distributed.run --standalone \
	  --nproc-per-node $(RANKS) -m lvxattn.torch_impl train $(ARGS)

tutorials: check-mpiexec $(STAMP) ## Prepare the environment for the notebooks in tutorials/
	@echo "make lab opens the notebooks in JupyterLab, with the right kernel. Elsewhere:"
	@echo "- VS Code: open tutorials/, Select Kernel, Python Environments, .venv"
	@echo "- your own Jupyter: select the kernel lvxattn after running"
	@echo "    $(VENV_PYTHON) -m ipykernel install --user --name lvxattn"

# Started here, not in tutorials/: JupyterLab follows links only below its root directory.
lab: check-mpiexec $(STAMP) ## Open the tutorials in JupyterLab
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[lab]'
	$(TEST_ENV) $(VENV_PYTHON) -m jupyterlab --notebook-dir . tutorials/00_in_ten_minutes.ipynb $(ARGS)

notebooks: check-mpiexec $(STAMP) ## Run the tutorials' sources and write the notebooks (ARGS="NN_name --fresh")
	$(TEST_ENV) $(VENV_PYTHON) tutorials/build.py $(ARGS)

slides: $(STAMP) ## Make slides.pdf in tutorials/ from the notebooks' pictures
	$(TEST_ENV) $(VENV_PYTHON) tutorials/slides.py $(ARGS)

docs: $(STAMP) ## Build the site in docs/_build/html: README, docs/, tutorials, API
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	$(VENV_PYTHON) -m sphinx -W --keep-going --quiet docs docs/_build/html $(ARGS)
	@echo "Open docs/_build/html/index.html"

# Tests of one file share running processes, so they stay in one worker.
PYTEST := $(TEST_ENV) $(VENV_PYTHON) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test: check-mpiexec $(STAMP) ## Run the tests not marked slow, 10 minutes on 2 cores (ARGS="-k merge" goes to pytest)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: check-mpiexec $(STAMP) ## Run all tests, slow ones too
	$(PYTEST) $(ARGS)

test-rest: check-mpiexec $(STAMP) ## Run only the slow tests, which make test leaves out
	$(PYTEST) -m slow $(ARGS)

# Kernels of OpenBLAS and PyTorch for older processors, which every newer one supports.
CORE ?= $(if $(shell grep -sw avx512f /proc/cpuinfo),Haswell,Nehalem)
NUMERIC := $(addprefix tests/test_,block_attention.py check_golden.py cross_attention.py \
  full_attention.py kernels.py known_defects.py merge.py mpi.py precision.py recompute.py schedules.py \
  torch.py torch_module.py)

test-core: check-mpiexec $(STAMP) ## Run the numeric tests with the kernels of an older processor (CORE=Nehalem)
	OPENBLAS_CORETYPE=$(CORE) ATEN_CPU_CAPABILITY=default $(PYTEST) -m "not slow" $(NUMERIC) $(ARGS)

# The oldest transformers that the models support, beside the environment's own.
OLD_MODELS := $(VENV)/transformers-4

test-models: $(OLD_MODELS) ## Run the quick tests of models with the oldest transformers supported
	@# Without it the tests would be skipped.
	PYTHONPATH=$(abspath $(OLD_MODELS)) $(VENV_PYTHON) -W ignore -c 'import transformers as t; print(t.__version__)'
	PYTHONPATH=$(abspath $(OLD_MODELS)) $(PYTEST) -m "not slow" tests/test_spread.py tests/test_owl3.py $(ARGS)

$(OLD_MODELS): $(STAMP) constraints-transformers-4.txt
	rm -rf $@
	$(PIP) install --quiet --no-deps --target $@ --requirement constraints-transformers-4.txt
	@touch $@

lint: $(STAMP) ## Check style, formatting and types (ruff, mypy)
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy

soak: check-mpiexec $(STAMP) ## Solve and check 1,000 random problems on real ranks, and watch memory
	PYTHONPATH=. OMP_NUM_THREADS=1 $(MPIEXEC) -n 5 $(VENV_PYTHON) -W error -m mpi4py tests/programs/soak.py $(ARGS)

bench: check-mpiexec $(STAMP) ## Run all benchmarks, also on shaped links, 90 minutes; stored in benchmarks/results (Linux, needs root or user namespaces)
	$(VENV_PYTHON) benchmarks/block_attention.py --json benchmarks/results/block-attention.json
	$(VENV_PYTHON) benchmarks/kernels.py --json benchmarks/results/kernels-cpu.json
	$(VENV_PYTHON) benchmarks/recompute.py --json benchmarks/results/recompute.json
	$(VENV_PYTHON) benchmarks/compiled.py --json benchmarks/results/compiled.json
	$(VENV_PYTHON) benchmarks/precision.py --store benchmarks/results --plot docs/precision.png
	$(MPIEXEC) -n 2 $(VENV_PYTHON) -m mpi4py benchmarks/tracing.py
	$(TEST_ENV) $(VENV_PYTHON) benchmarks/merging.py --store benchmarks/results
	$(VENV_PYTHON) benchmarks/rules.py --store benchmarks/results
	$(TEST_ENV) $(VENV_PYTHON) benchmarks/decode.py --store benchmarks/results
	$(TEST_ENV) $(VENV_PYTHON) benchmarks/network.py --store benchmarks/results
	$(TEST_ENV) $(VENV_PYTHON) benchmarks/schedules.py --store benchmarks/results --plot docs/schedules.png
	$(TEST_ENV) $(VENV_PYTHON) benchmarks/models.py --store benchmarks/results --plot docs/models.png

scoreboard: $(STAMP) ## Install published packages, hold them against the oracle, write docs/scoreboard.md, 1 hour, 10 GB, needs a network (ARGS="sdpa --fresh")
	$(VENV_PYTHON) -m benchmarks.scoreboard $(ARGS)

bench-quick: check-mpiexec $(STAMP) ## Run the benchmarks on small problems, some minutes; only printed
	@echo "Small problems, to see that all of it runs: the goals hold for make bench on an idle machine."
	$(VENV_PYTHON) benchmarks/block_attention.py --quick
	$(VENV_PYTHON) benchmarks/kernels.py --quick
	$(VENV_PYTHON) benchmarks/recompute.py --quick
	$(VENV_PYTHON) benchmarks/compiled.py --quick
	$(VENV_PYTHON) benchmarks/precision.py --quick
	$(MPIEXEC) -n 2 $(VENV_PYTHON) -m mpi4py benchmarks/tracing.py --quick
	$(TEST_ENV) $(VENV_PYTHON) benchmarks/merging.py --quick
	$(VENV_PYTHON) benchmarks/rules.py --quick
	$(TEST_ENV) $(VENV_PYTHON) benchmarks/decode.py --quick
	$(TEST_ENV) $(VENV_PYTHON) benchmarks/network.py --quick --only slow bytes cores
	$(TEST_ENV) $(VENV_PYTHON) benchmarks/schedules.py --quick
	$(TEST_ENV) $(VENV_PYTHON) benchmarks/models.py --quick

# Nothing is installed on a GPU machine: PYTHON's own packages are used, with or without a network.
# exec, so that a signal that ends make ends the run.
GPU_MPIEXEC := $(or $(NAMED_MPIEXEC),$(if $(filter system,$(MPI)),$(MPIEXEC)))
gpu: ## Test and measure on this machine's GPUs with PYTHON's own packages, 9 minutes (DRY=1 rehearses without a GPU)
	$(NEEDS_PYTHON)
	@exec $(PYTHON) benchmarks/gpu $(if $(OUT),--out '$(OUT)') $(if $(filter-out 0,$(DRY)),--dry) \
	  $(if $(CUDA_MPI),--cuda-mpi '$(CUDA_MPI)') $(if $(GPU_MPIEXEC),--mpiexec '$(GPU_MPIEXEC)') $(ARGS)

clean: ## Remove .venv and everything built
	rm -rf $(VENV) build dist src/*.egg-info docs/_build demo.png train-run
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an interrupted install is repeated. An environment of another
# interpreter, or one that no longer starts, is created again; any other is updated.
$(STAMP): pyproject.toml constraints.txt src/lvxattn/__init__.py
	$(NEEDS_PYTHON)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) lacks venv or ensurepip." \
	    "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@rm -f $(VENV)/.ready-*
	@echo "Installing into $(VENV), about 2 GB"
	@which='import sys; print(sys.version, sys.base_prefix)'; \
	if [ "$$($(VENV_PYTHON) -c "$$which" 2>/dev/null)" = "$$($(PYTHON) -c "$$which")" ]; \
	then $(PYTHON) -m venv $(VENV); else $(PYTHON) -m venv --clear $(VENV); fi
	$(PIP) install --quiet --constraint constraints.txt setuptools wheel
	$(if $(MPI_WHEEL),,$(PIP) uninstall --quiet --yes mpich)
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation \
	  --editable '.[mpi,train,models,demo,tutorials,test]' $(MPI_WHEEL)
	$(PIP) install --quiet --constraint constraints.txt --no-deps open_flamingo
	@touch $@

check-mpiexec:
	@[ $(MPI) = mpich ] || command -v $(firstword $(MPIEXEC)) >/dev/null || { \
	  echo "MPI=system, but $(firstword $(MPIEXEC)) is not on PATH." \
	    "Name it: make MPI=system MPIEXEC=/path/to/mpiexec" >&2; exit 1; }
