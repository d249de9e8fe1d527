# Two commands for a fresh machine with Python 3.11 and make:
#   make demo   set up, train twins on the bundled digits, write the report page
#   make test   set up, run all tests
# Everything goes into .venv inside this checkout. PYTHON names another interpreter of 3.11 or newer.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo
JOBS ?= 2

.PHONY: help setup demo test networks check format clean

help:
	@echo "make demo | test | networks | check | format | clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cli,dev,families,mpi,rivals]"
	touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/apoptosis compare --data digits --network mlp --widths 1024,1024,1024 --epochs 6 --validation 0.25 --seeds 0 --out $(DEMO)
	$(BIN)/apoptosis report $(DEMO)

# One thread per worker: the tests are small, and workers share the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

# Thousands of random networks under the oracles of tests/families; each failure is cut down and printed as source.
NETWORKS ?= 2000
networks: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=src:tests $(BIN)/python -m families.long --networks $(NETWORKS)

check: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -prune -exec rm -rf {} +
