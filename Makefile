# The two commands of README.md do all the set-up there is.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# The oldest torch that pyproject.toml allows, and the tests of all that depends on torch's version.
OLDEST := .venv-oldest
OLDEST_TORCH := torch==2.11.0 torchvision==0.26.0
CORE := $(addprefix tests/,attacks/test_pgd.py laws/test_golden.py models plugins/test_ebjdat.py \
	plugins/test_objectives.py runtime/test_memory.py runtime/test_microbatch.py \
	runtime/test_modes.py runtime/test_out_of_memory.py runtime/test_recomputing.py runtime/test_rng.py sampling \
	test_updaters.py training/test_resume.py)

# The plug-ins of examples/ that are distributions with tests of their own.
GUESTS := vitjem hmc multitargeted
GUEST := build/guests

.PHONY: train test test-oldest test-guests lint rehearse acceptance bench docs docs-serve notebooks

train: $(STAMP)
	$(BIN)/jemkit train --backbone sadajem --objective ebjdat

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -rs $(CORE)

# Built as wheels, and installed with jemkit's wheel in an environment that takes the rest from .venv.
test-guests: $(STAMP)
	rm -rf $(GUEST)
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(GUEST)/wheels \
		. $(addprefix ./examples/,$(GUESTS))
	$(BIN)/python -m venv --without-pip $(GUEST)/venv
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$site" >"$$($(GUEST)/venv/bin/python -c "$$site")/outer.pth"
	$(BIN)/pip --python $(GUEST)/venv install --quiet --no-deps --ignore-installed \
		$(GUEST)/wheels/*.whl
	$(BIN)/pip --python $(GUEST)/venv install --quiet --constraint constraints.txt \
		$(GUEST)/wheels/*.whl || echo "SKIPPED: timm could not be installed, tests skip"
	OMP_NUM_THREADS=1 $(GUEST)/venv/bin/python -P -m pytest -rs examples

rehearse: $(STAMP)
	$(BIN)/python benchmarks/gpu/pack --out build/gpu \
		--python $$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
	cd build/gpu/kit && $(CURDIR)/$(BIN)/python benchmarks/gpu/run --rehearse \
		--out ../records --work ../work

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

acceptance: $(STAMP)
	$(BIN)/python -m pytest -m slow -rs && $(BIN)/python benchmarks/acceptance.py

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py && $(BIN)/python benchmarks/steps.py && \
	$(BIN)/python benchmarks/gradients.py && $(BIN)/python benchmarks/charts.py

notebooks: .venv/.notebooks
	$(BIN)/python examples/notebooks/execute.py

.venv/.notebooks: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[notebooks]'
	touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Open site/index.html in a browser, or run 'make docs-serve' to search it too."

docs-serve: docs
	@echo "http://127.0.0.1:8000/ (Ctrl-C ends it)"
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory site 8000 >/dev/null 2>&1

.venv/.docs: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

.venv/.show: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[show]'
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,metrics,figures]'
	touch $(STAMP)

$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^torch(vision)?==' constraints.txt >$(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt $(OLDEST_TORCH) --editable '.[test]'
	touch $@
