# Every target sets itself up: a virtual environment in .venv from requirements.lock, with uv when it is present.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
MODEL := smollm2-135m
ONCE ?=
PORT ?= 8000
# Shorter spinning of OpenMP threads, as `loramux serve` gives its engine (server/engine/client.py says why).
export GOMP_SPINCOUNT ?= 10000

.PHONY: setup model demo test test-slow check bench lock clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "loramux needs Python 3.11 or newer, found $$($(PYTHON) --version)"; exit 1; }
	@if command -v uv >/dev/null; then \
	  uv venv --quiet --allow-existing --seed --python $(PYTHON) $(VENV) && \
	  uv pip install --python $(RUN)/python -r requirements.lock && \
	  uv pip install --python $(RUN)/python --no-deps --no-build-isolation -e . ; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(RUN)/python -m pip install --disable-pip-version-check -r requirements.lock && \
	  $(RUN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e . ; \
	fi
	@touch $@

model: setup
	$(RUN)/loramux pull $(MODEL)

demo: model
	$(RUN)/loramux demo --port $(PORT) $(if $(ONCE),--once)

test: model
	$(RUN)/python -m pytest

test-slow: model
	$(RUN)/python -m pytest -m slow

check: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

bench: model
	$(RUN)/loramux bench

lock:
	uv pip compile --universal --python-version 3.11 --no-header --no-annotate --extra dev \
	  --constraint requirements.in --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
