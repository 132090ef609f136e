# make demo: the main job end to end on real data.  make test: every check and test.
# Each sets up .venv with what it needs; both work alone on a fresh clone.

VENV := .venv
BIN := $(VENV)/bin

# The first Python 3.11 or 3.12 that really runs; `make PYTHON=...` names another.
PYTHON := $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	2>/dev/null && echo $$p && break; done)

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py demo-output

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.test
	$(BIN)/python benchmarks/resnet_step.py

$(VENV)/.pip:
	@test -n "$(PYTHON)" || { \
		echo "splitonnx needs Python 3.11 or 3.12 with venv; none was found on the PATH" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[cpu]" "scikit-learn>=1.5"
	@touch $@

$(VENV)/.test: $(VENV)/.pip pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[cpu]" --group dev
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output
