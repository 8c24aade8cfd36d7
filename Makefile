# make demo | test | test-all | lint | bench | bench-table | clean. Each creates .venv first, with uv where there is one, else with pip.
#   make PYTHON=/path/to/python3.11 test    another interpreter
#   make PYTEST="-k seeds" test             arguments for pytest

SHELL := bash
PYTHON ?= python3.11
UV ?= $(shell command -v uv)
PYTEST ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test test-all lint bench bench-table clean .venv

demo: $(INSTALLED)
	$(BIN)/popalign demo

test: lint
	$(BIN)/python -m pytest $(PYTEST)

# With the tests that start Prefect's server and workers, kill them, and look at the user interface.
test-all: lint
	$(BIN)/python -m pytest -m "not gpu and not benchmark" $(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/pyright

# Results are rows of a workspace of their own, bench-workspace; those marked gpu are skipped where there is none.
bench: $(INSTALLED)
	$(BIN)/python -m pytest -m benchmark -s $(PYTEST) tests/benchmarks

# Writes the table of docs/performance.md from those rows.
bench-table: $(INSTALLED)
	$(BIN)/python -m tasks.benchmarks bench-workspace docs/performance.md

# Leaves .venv (several GB to fetch again) and every workspace.
clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv: $(INSTALLED)

ifneq ($(UV),)
CREATE := [ -x $(BIN)/python ] || "$(UV)" venv --quiet --python "$(PYTHON)" .venv
# Compiled once here (40 s on 2 cores), and not in every process of a run or a test that starts (8 s each).
INSTALL := "$(UV)" pip install --quiet --compile-bytecode --python $(BIN)/python
else
CREATE := $(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv .venv
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

# An environment that is there is completed, not replaced. The lock names every package, so nothing is resolved, and
# setuptools is in it, so the project is built with that one and no other is fetched.
$(INSTALLED): requirements.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "popalign needs Python 3.11, and $(PYTHON) is not there or is another version."; \
	  echo "Install it with its venv module, or name one: make PYTHON=/path/to/python3.11 test"; \
	  exit 1; } >&2
	@echo "installing the locked packages into .venv with $(if $(UV),uv,pip); this happens once"
	@$(CREATE)
	@$(INSTALL) --no-deps --requirement requirements.lock
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@
