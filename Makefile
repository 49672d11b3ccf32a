# make quickstart: the main job on real text, from nothing.   make test: the suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test science lint types clean

quickstart: $(VENV)/.installed
	$(BIN)/isoscale quickstart $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

science: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m science $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check src tests benchmarks

types: $(VENV)/.installed-test
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("isoscale needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# mup comes without its dependencies: it asks for torchvision, whose builds fit one torch each, and uses none of it here.
# torch comes first and pinned, so that no other package picks a build of its own.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[report]"
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps mup
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
