# Two commands for a fresh machine with Python 3.11 and make:
#   make demo   set up, train with and without apoptosis on the bundled digits, write the report page
#   make test   set up, run all tests
# Everything goes into .venv inside this checkout. PYTHON names another interpreter of 3.11 or newer.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo
# One more than cores: tests of several processes wait for one another.
JOBS ?= $(shell expr $$(nproc) + 1)

# What needs no extra of pyproject.toml: neither the command nor benchmarks nor examples.
CORE := $(foreach name,checkpoint criteria decide engine families graph model modules numerics observe planner \
	storage surgery,tests/$(name))

SOURCES := src tests benchmarks examples docs/site .ci setup.py

.PHONY: help setup demo test test-floor networks check docs dist format clean

help:
	@echo "make demo | test | test-floor | networks | check | docs | dist | format | clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cli,dev,docs,families,lightning,transformers,accelerate,mpi,onnx,baselines]"
	touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/apoptosis compare --data digits --network mlp --widths 1024,1024,1024 --epochs 6 --validation 0.25 --seeds 0 --out $(DEMO)
	$(BIN)/apoptosis report $(DEMO)

# One thread per worker: the tests are small, and workers share the cores. Bytecode is kept, even where the environment
# forbids it: else every process compiles all sources anew. Work that tests share is done once where they stay together.
test: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=15

# The tests of the core on the oldest packages that pyproject.toml admits and on the newest, each in an environment of
# its own: some gigabytes to download, for old and new wheels of torch bring CUDA along.
test-floor: $(VENV)-oldest/.installed $(VENV)-newest/.installed
	for age in oldest newest; do \
		OMP_NUM_THREADS=1 PYTHONPATH=src $(VENV)-$$age/bin/python -m pytest -n $(JOBS) $(CORE) || exit 1; \
	done

$(VENV)-oldest/.installed $(VENV)-newest/.installed: $(VENV)-%/.installed: pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pytest pytest-xdist hypothesis $$($(@D)/bin/python -c "\
	import tomllib; needed = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
	print(*(n.replace('>=', '==') if '$*' == 'oldest' else n.split('>=')[0] for n in needed))")
	touch $@

# Thousands of random networks under the oracles of tests/families; each failure is cut down and printed as source.
NETWORKS ?= 2000
networks: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=src:tests $(BIN)/python -m families.long --networks $(NETWORKS)

check: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	@unused=$$($(BIN)/vulture | grep '^src/'); test -z "$$unused" || { echo "$$unused"; exit 1; }
	$(BIN)/codespell src docs tests benchmarks examples README.md CONTRIBUTING.md CHANGELOG.md

# The site, in build/site; a broken link is an error. The variable spares a notice about
# the versions of mkdocs to come.
docs: $(STAMP)
	PYTHONPATH=src NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What is to be uploaded, and what would go wrong with it: see .ci/dist.py.
dist: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python .ci/dist.py

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -prune -exec rm -rf {} +
