# From a bare machine to a running distributed job. `make` alone lists what there is to do.
#
# Each step of the set-up leaves a stamp in .venv, so the second run of any command starts at once; a step is run
# again when what it depends on has changed, and all of them once .venv is deleted.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# Side by side, the steps' output would be unreadable; each uses all processors where it can.
.NOTPARALLEL:

PYTHON ?= python3
export PYTHON
VENV := .venv
STAMPS := $(VENV)/.stamps
BUILD := $(wildcard adacons_hvd/horovod_build/*.py adacons_hvd/horovod_build/patches/*.patch)

# How the environment's programs are run: found by name first, as launchers look for them, and one thread per rank,
# since ranks share the machine and would otherwise wait for one another.
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}"

# What needs one process, and one job beside the oracle for each binding and launcher.
QUICK := $(addprefix tests/, test_aggregators.py test_plain.py engine docs/test_layers.py tensorflow/test_tf_operations.py \
	conformance/test_random.py fsdp/test_fsdp_oracle.py keras/test_keras_oracle.py)

.PHONY: help
help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  make test PYTEST_ARGS='-k name -x'    passes arguments on to pytest"
	@echo "  make PYTHON=/path/to/python3.11 ...   makes .venv with another Python (after make clean)"

.PHONY: setup
setup: $(STAMPS)/package ## system packages, .venv, pinned stack, Horovod; done by every other command

.PHONY: demo
demo: setup ## a distributed training run on this machine: an average, AdaCons and Curvature side by side
	@$(RUN) python examples/demo.py $(DEMO_ARGS)

.PHONY: test
test: lint ## lint, types and every test
	@$(RUN) python -m pytest --streams 2 $(PYTEST_ARGS)

.PHONY: test-quick
test-quick: setup ## the tests for between two edits, in a minute or two
	@$(RUN) RANDOM_CASES=6 python -m pytest --streams 2 $(QUICK) $(PYTEST_ARGS)

.PHONY: test-trainers
test-trainers: $(STAMPS)/trainers ## the adapters, with the real Lightning, Accelerate, Transformers and Ray
	@$(RUN) $(VENV)/trainers/bin/python -m pytest tests/trainers $(PYTEST_ARGS)

.PHONY: lint
lint: setup ## formatting, lint and types
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy

.PHONY: bench
bench: setup ## what AdaCons costs beside averaging, on this machine; BENCH_ARGS=--full for every configuration
	@$(RUN) python -m benchmarks $(BENCH_ARGS)

.PHONY: page
page: setup ## docs/measurements.md and its charts, from the data in benchmarks/results
	@$(RUN) python -m benchmarks.page

.PHONY: evidence
evidence: setup ## which aggregator helps: the studies of docs/evidence.md, up to eleven hours of one core
	@$(RUN) python -m benchmarks.evidence $(EVIDENCE_ARGS)

.PHONY: sick-workers
sick-workers: setup ## how often SickWorkers is right: the table of docs/sick-workers.md; SICK_ARGS=--record new.json anew
	@$(RUN) python -m benchmarks.sick_workers $(SICK_ARGS)

.PHONY: docs
docs: setup ## the documentation as a site, in out/site
	@$(RUN) python -m sphinx -W --keep-going -q -E -b html docs out/site

.PHONY: soak
soak: setup ## the long tests: endurance, an hour of random jobs, every number of ranks
	@$(RUN) python -m pytest -m soak $(PYTEST_ARGS)

.PHONY: docker-test
docker-test: ## build the Docker image, run the MPI tests in it and across a two-node cluster
	@docker/test.sh

.PHONY: release-check
release-check: setup ## build the release, install it into empty environments and try it there
	@$(RUN) python tests/release_check.py

.PHONY: gpu-test
gpu-test: ## what needs a GPU: tests and benchmarks with PYTHON's PyTorch; GPU_WHEELS=dir where there is no registry
	@tests/gpu/run.sh

.PHONY: clean
clean: ## remove .venv and what tools left; the wheel cache outside the checkout stays
	@rm -rf $(VENV) build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/system: .ci/setup
	@.ci/setup python
	@.ci/setup system
	@mkdir -p $(@D) && touch $@

$(STAMPS)/venv: $(STAMPS)/system
	@.ci/setup venv
	@mkdir -p $(@D) && touch $(STAMPS)/system $@

$(STAMPS)/stack: pyproject.toml $(STAMPS)/venv
	@.ci/setup stack
	@touch $@

$(STAMPS)/horovod: $(BUILD) $(STAMPS)/stack
	@.ci/setup horovod
	@touch $@

$(STAMPS)/package: pyproject.toml $(STAMPS)/horovod
	@.ci/setup package
	@touch $@

$(STAMPS)/trainers: pyproject.toml $(STAMPS)/package
	@.ci/setup trainers
	@touch $@
