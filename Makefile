# Everything a newcomer needs. Each target sets up .venv by itself (uv when present, else pip).
# PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check bench bench-data bench-sae bench-gpu soak towers clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */  make \1|/p' Makefile | awk -F'|' '{ printf "%-17s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed  ## the planted world from nothing to the report; finished steps are skipped
	$(BIN)/python train.py configs/demo/world.yaml
	$(BIN)/python train.py configs/demo/sae.yaml
	$(BIN)/python train.py configs/demo/probe.yaml
	$(BIN)/python evaluate.py configs/demo/atlas.yaml
	$(BIN)/python evaluate.py configs/demo/shortcuts.yaml
	$(BIN)/python evaluate.py configs/demo/evaluate.yaml

test: $(VENV)/.installed-dev  ## all tests that need no GPU and no network
	$(BIN)/python -m pytest -q

check: $(VENV)/.installed-dev  ## lint, format, types, import contracts, tests: what CI runs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q

bench: $(VENV)/.installed  ## every script in benchmarks/ that needs no GPU
	@for script in $(filter-out benchmarks/sae_gpu.py,$(wildcard benchmarks/*.py)); do \
	    echo "$$script"; $(BIN)/python "$$script" || exit 1; \
	done

bench-data: $(VENV)/.installed  ## activation rows, images and caching, beside the peers that are installed
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/images.py
	$(BIN)/python benchmarks/caching.py

bench-sae: $(VENV)/.installed  ## SAE steps and what they learn, beside the peers that are installed
	$(BIN)/python benchmarks/sae.py
	$(BIN)/python benchmarks/sae.py --quality

bench-gpu: $(VENV)/.installed  ## the same on one CUDA GPU, and every kernel beside its floor
	$(BIN)/python benchmarks/sae_gpu.py

soak: $(VENV)/.installed  ## 10 million rows on two processes that are killed every few seconds
	$(BIN)/python benchmarks/soak.py

towers: $(VENV)/.installed-dev  ## check every tower of open_clip and write docs/towers.md (10 minutes, 9 GB)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.towers_table

clean:  ## remove .venv, caches and runs/
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an interrupted set-up is done again. `.unfinished` marks a .venv
# that this file began and did not complete: half-installed packages cannot be trusted, it goes.
$(VENV)/.installed: pyproject.toml
	@$(call install,.)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	@$(call install,.[dev])
	@touch $(VENV)/.installed $@

define install
set -e; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
    echo "clipattr needs Python 3.11 or newer; found: `$(PYTHON) --version 2>&1`." >&2; \
    echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }; \
if [ -e $(VENV)/.unfinished ]; then rm -rf $(VENV); fi; \
mkdir -p $(VENV); touch $(VENV)/.unfinished; \
if command -v uv >/dev/null 2>&1; then \
    [ -x $(BIN)/python ] || uv venv --quiet --allow-existing --python $(PYTHON) $(VENV); \
    uv pip install --python $(BIN)/python -e '$(1)'; \
else \
    [ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV); \
    $(BIN)/python -m pip install --quiet -e '$(1)'; \
fi; \
rm $(VENV)/.unfinished
endef
