# The front door: `make` alone lists what there is.
#
#   PYTHON=python3.13 make test      another interpreter (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Kept between runs, one for each user: an image and templates of the tests are in it.
export VMSANDBOX_TEST_HOME ?= /var/tmp/vmsandbox-test-$(shell id -u)
# Without its bytecode each command compiles half of the package anew: 0.3 s, thousands of times in the tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help session setup test unit check bench packages test-packages doctor clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

session: doctor ## set everything up, then run a session on this repository (first run: minutes)
	@echo "== a session: this repository goes into a guest, scripts/in-the-guest.sh runs there, the guest goes away"
	VMSANDBOX_ALLOW_EMULATION=1 $(BIN)/vmsandbox session . --accept none -- sh scripts/in-the-guest.sh

test: check ## set everything up, then lint, types, layers, unit tests and tests with real guests
	@echo "== daemons for the tests with guests (these allow emulation: what runs in them is this repository's own)"
	VMSANDBOX_ALLOW_EMULATION=1 $(BIN)/vmsandbox doctor --fix
	@echo "== tests without guests"
	$(BIN)/python -m pytest -n 2 -m "not guest" $(PYTEST_ARGS)
	@echo "== tests with real guests (a first run builds an image: minutes)"
	VMSANDBOX_ALLOW_EMULATION=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m guest --durations=12 $(PYTEST_ARGS)

unit: $(VENV)/.dev ## the tests without guests: seconds
	$(BIN)/python -m pytest -n 2 -m "not guest" $(PYTEST_ARGS)

check: $(VENV)/.dev ## lint, types and layers, no tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev ## measure: a guest's start, a project's way in and back, the broker
	$(BIN)/python benchmarks/startup.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/transfer.py
	$(BIN)/python benchmarks/egress.py

setup: packages $(VENV)/.user ## Debian packages and a virtual environment, nothing else
	@$(BIN)/vmsandbox --help > /dev/null

packages:
	@PYTHON=$(PYTHON) scripts/packages.sh

test-packages: packages
	@PYTHON=$(PYTHON) scripts/packages.sh cpio chromium fonts-dejavu-core curl openssl

# Says what this host can do, and mends it. Emulation is allowed here alone: what runs in the demonstration is this
# repository's own. A session of yours refuses it unless you say so.
doctor: setup
	@echo "== vmsandbox doctor --fix"
	@VMSANDBOX_ALLOW_EMULATION=1 $(BIN)/vmsandbox doctor --fix

# The stamps keep pip away while nothing changed.
$(VENV)/.user: pyproject.toml | packages
	@echo "== Python packages into $(VENV) (libvirt's bindings are compiled: half a minute)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | test-packages $(VENV)/.user
	@echo "== tools for tests into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean: ## remove the virtual environment, caches and the tests' home (your images and records stay)
	rm -rf "$(VMSANDBOX_TEST_HOME)" $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
