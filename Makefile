# Each target starts from a fresh clone with Python and make only. To choose another Python, torch or package index:
#     make test PYTHON=python3.13 TORCH=torch==2.14.0 PIP_ARGS="--index-url URL"
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
FUZZ_SECONDS ?= 600

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --disable-pip-version-check $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help test demo lint types mutants fuzz bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

test: $(VENV)/test.stamp ## run the tests, the doctests and the README's examples
	$(RUN) -m pytest $(PYTEST_ARGS)

demo: $(VENV)/demo.stamp ## run the examples: arcsin, and the orbits of K2-24's planets
	$(RUN) examples/arcsin.py
	$(RUN) examples/k2_24.py

lint: $(VENV)/lint.stamp ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/test.stamp $(VENV)/lint.stamp ## check the types
	$(VENV)/bin/pyright --pythonpath $(RUN)

mutants: $(VENV)/test.stamp ## break the code on purpose and see that the tests notice
	$(RUN) -m tests.mutants

fuzz: $(VENV)/test.stamp ## draw random problems with random faults for FUZZ_SECONDS=600
	BACKSOLVE_FUZZ_SECONDS=$(FUZZ_SECONDS) $(RUN) -m pytest -s tests/adversarial/test_fuzz.py

bench: $(VENV)/bench.stamp ## measure speed and memory beside other packages (BENCH_ARGS=--quick: two minutes)
	$(RUN) -m benchmarks $(BENCH_ARGS)

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp stands for an installed requirements file, so that a second call installs nothing. torch comes first and
# alone: nothing that is installed after it may bring another one.
CHOICE := $(PYTHON) $(TORCH)
ifneq ($(CHOICE),$(shell cat $(VENV)/torch.stamp 2>/dev/null))
.PHONY: $(VENV)/torch.stamp
endif

$(VENV)/torch.stamp: requirements/torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The versions in requirements/ need Python 3.11 or newer; choose one: make PYTHON=python3.13 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) --constraint requirements/torch.txt '$(TORCH)'
	@echo '$(CHOICE)' > $@

$(VENV)/%.stamp: $(wildcard requirements/*.txt) pyproject.toml $(VENV)/torch.stamp
	$(PIP) --requirement requirements/$*.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
