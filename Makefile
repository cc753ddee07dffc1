# The two commands of README.md do all the set-up there is.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: train test lint acceptance bench

train: $(STAMP)
	$(BIN)/jemkit train --backbone sadajem --objective ebjdat

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

acceptance: $(STAMP)
	$(BIN)/python -m pytest -m slow -rs && $(BIN)/python benchmarks/acceptance.py

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py && $(BIN)/python benchmarks/steps.py && \
	$(BIN)/python benchmarks/gradients.py && $(BIN)/python benchmarks/charts.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,metrics]'
	touch $(STAMP)
