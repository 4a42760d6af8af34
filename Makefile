# Every target sets up what it needs. `make help` lists them.
PYTHON ?= python3
DATASET ?= mnist-5k
STUDY ?= batch-size

BIN := .venv/bin
# Bytecode is made at the first import, of the few modules that are imported; pip would make all.
PIP := $(BIN)/python -m pip install --quiet --no-compile --editable
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# Tests run on every processor, so each of their processes keeps to one thread.
ONE_THREAD := OMP_NUM_THREADS=1
EVERY_CORE := -n auto --dist loadscope --no-loadscope-reorder

.PHONY: help install study lab test test-all lint unit notebooks-test papermill-test test-slow \
	test-browser notebooks figures run-times bench gpu-check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed  ## make .venv and install the project and its tools in it

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; say which with make PYTHON=..."; exit 1; }
	@echo "Setting up .venv; torch is large, so this takes a few minutes."
	$(PYTHON) -m venv .venv
	$(PIP) '.[dev]'
	@touch $@

study: install  ## run the main study and show where its figure is (DATASET=mnist for all digits)
	$(BIN)/python -m nbutils run $(STUDY) --dataset $(DATASET)

lab: install  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir notebooks

test: lint unit notebooks-test papermill-test  ## lint, types, unit tests, notebooks: 5 minutes

test-all: test test-slow test-browser  ## the same, and what takes long: kills, cluster, browser

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

unit: install
	$(ONE_THREAD) $(BIN)/python -m pytest -q $(EVERY_CORE) tests

notebooks-test: install
	$(ONE_THREAD) $(BIN)/python -m pytest -q $(EVERY_CORE) --nbval \
		--nbval-cell-timeout 300 --nbval-sanitize-with tests/nbval_sanitize.cfg $(NOTEBOOKS)

papermill-test: install
	@mkdir -p build
	$(ONE_THREAD) $(BIN)/papermill --no-progress-bar notebooks/02_train_batch_size.ipynb \
		build/02.ipynb -p batch_size 512 -p epochs 1
	$(ONE_THREAD) $(BIN)/papermill --no-progress-bar notebooks/03_train_accumulation.ipynb \
		build/03.ipynb -p batch_size 64 -p accumulation_steps 8 -p epochs 1

test-slow: install  ## the long tests alone
	$(ONE_THREAD) $(BIN)/python -m pytest -q $(EVERY_CORE) -m slow tests

test-browser: .venv/browser  ## open every notebook in JupyterLab in a headless Chromium
	$(ONE_THREAD) $(BIN)/python -m pytest -q -rs -m browser tests/test_browser.py

.venv/browser: .venv/installed
	$(PIP) '.[browser]'
	@touch $@

notebooks: install  ## run the notebooks and store their outputs, after a change
	$(ONE_THREAD) TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False \
		--ExecutePreprocessor.store_widget_state=False $(NOTEBOOKS)
	$(BIN)/ruff format notebooks

figures: install  ## make figures/ and the README's numbers from notebooks/reference/
	$(BIN)/python -m nbutils figures

run-times: install  ## time Run All of each notebook, on a quiet machine, and write it at their tops
	$(BIN)/python -m nbutils.report.notebooks

bench: install  ## time the training against the usual DataLoader loop (DATASET=mnist for all digits)
	$(BIN)/python -m nbutils bench --dataset $(DATASET) --out build/bench.json

gpu-check: install  ## on a machine with a GPU: check and measure everything there
	$(BIN)/python -m nbutils gpu-check --out build/gpu

clean:  ## remove the environment and caches; runs/ and data/ stay
	rm -rf .venv build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
