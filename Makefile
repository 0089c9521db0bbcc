# Every target sets itself up: a virtual environment in .venv from requirements.lock, with uv when it is present.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
MODEL := smollm2-135m
ENCODER := all-minilm-l6-v2
ONCE ?=
# Processes that run tests.
WORKERS ?= 2
PORT ?= 8000
# Shorter spinning of OpenMP threads, as `loramux serve` gives its engine (server/engine/client.py says why).
export GOMP_SPINCOUNT ?= 10000

.PHONY: setup model tools demo test test-slow test-clients test-lm-eval soak gpu-test check bench bench-gpu load-gpu study lock clean

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
	$(RUN)/loramux pull $(ENCODER)

demo: model
	$(RUN)/loramux demo --port $(PORT) $(if $(ONCE),--once)

test: model
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# What some slow tests run: a browser, promtool, kubectl. Needs Debian and root where they are not there yet.
TOOLS := chromium:chromium chromedriver:chromium-driver promtool:prometheus kubectl:kubernetes-client
tools:
	@missing=""; for tool in $(TOOLS); do command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; done; \
	[ -z "$$missing" ] || { apt-get update -qq && apt-get install --yes -qq --no-install-recommends $$missing; }

test-slow: model tools
	$(RUN)/python -m pytest -m slow

# Clients whose dependencies exclude ours run in an environment of their own, and meet the server on a socket only.
CLIENTS := $(VENV)/clients
test-clients: model $(CLIENTS)/.ready
	$(RUN)/python -m pytest -m slow tests/server/test_instructor.py tests/server/test_schemathesis.py

$(CLIENTS)/.ready: requirements-clients.lock | setup
	$(RUN)/python -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check -r requirements-clients.lock
	@touch $@

# What lm-eval needs beyond the other tests is 400 MB and makes every start of the encoder slower, so it comes last.
test-lm-eval: model
	$(RUN)/python -m pip install --disable-pip-version-check --constraint requirements.lock "lm-eval[api,hf]==0.4.13"
	$(RUN)/python -m pytest -m slow tests/server/test_lm_eval.py

# Mixed traffic with faults; the invariants must hold. STORES: local (SQLite, files), remote (PostgreSQL, S3) or auto.
MINUTES ?= 10
# SEED gives the order of the faults.
STORES ?= auto
SEED ?= 0
soak: model
	$(RUN)/python -m loadtests.soak --model $$($(RUN)/loramux pull $(MODEL) | tail -1) --minutes $(MINUTES) --stores $(STORES) --seed $(SEED)

# Every kernel and the engine on this machine's GPU; compute-sanitizer comes with CUDA's toolkit.
gpu-test: model
	$(RUN)/python -m pytest -m "gpu or not slow" tests/kernels tests/model tests/engine tests/gpu
	PYTHON=$(RUN)/python deploy/gpu_sanitize.sh

check: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

bench: model
	$(RUN)/loramux bench
	$(RUN)/python -m loadtests.adapters --model $$($(RUN)/loramux pull $(MODEL) | tail -1)
	$(RUN)/python -m server.bench_keys
	$(RUN)/python -m server.bench_front --model $$($(RUN)/loramux pull $(MODEL) | tail -1)
	$(RUN)/python -m deploy.ray_serve.bench --model $$($(RUN)/loramux pull $(MODEL) | tail -1)
	$(RUN)/python -m server.bench_burst --model $$($(RUN)/loramux pull $(MODEL) | tail -1) \
	  --encoder $$($(RUN)/loramux pull $(ENCODER) | tail -1)
	$(RUN)/python -m server.bench_observe --model $$($(RUN)/loramux pull $(MODEL) | tail -1)
	$(RUN)/python -m server.bench_first_token --model $$($(RUN)/loramux pull $(MODEL) | tail -1)
	$(RUN)/python -m routing.bench
	$(RUN)/python -m routing.bench_encoder --model $$($(RUN)/loramux pull $(ENCODER) | tail -1)
	$(RUN)/python -m loadtests.routing --model $$($(RUN)/loramux pull $(MODEL) | tail -1)

# All figures of docs/results.md's GPU section, about 25 minutes; `make bench-gpu MODELS=8b` measures one model.
MODELS := 8b 1b smollm2-135m
bench-gpu: setup
	mkdir -p docs/results
	for model in $(MODELS); do \
	  $(RUN)/python -m kernels.bench --model $$model --tune && \
	  $(RUN)/python -m kernels.bench --model $$model --out docs/results/kernels-$$model.json && \
	  $(RUN)/python -m server.engine.bench --model $$model --scenario throughput,decode --out docs/results/engine-$$model.json || exit 1; \
	done
	$(RUN)/python -m server.engine.bench --model 8b --scenario latency --adapters 0,1,8,64 --out docs/results/latency-8b.json
	$(RUN)/python -m server.engine.bench --model 8b --scenario many_adapters,loads,memory --out docs/results/memory-8b.json
	$(RUN)/python -m server.engine.bench --model 8b --scenario many_adapters --many 10000 --rank 8 --seconds 6 --out docs/results/many-8b.json
	$(RUN)/python -m server.engine.bench --model 8b --scenario grammar --adapters 0 --rows 8,64 --steps 150 --out docs/results/grammar-8b.json
	$(RUN)/python -m server.engine.bench --model 8b --scenario gated --repeats 1 --out docs/results/gated-8b.json
	$(RUN)/python -m server.engine.results docs/results/*.json
	$(RUN)/python -m kernels.bench --model 8b --ops meteora --adapters 28 --top-k 2 --rows 8,64,4096 --out docs/results/routing/meteora-8b.json
	$(RUN)/python -m routing.bench_prompt --model 8b

# The 8B shape behind HTTP, on this machine's GPU: S-LoRA's and Punica's workloads, and what automatic choice costs.
LOADS ?= loads
LARGE = $(LOADS)/8b --rank 8 --targets q_proj,v_proj --serve=--encoder=none --serve=--host-memory=16GiB \
  --serve=--kernel-cache=$(abspath $(LOADS))/kernels
load-gpu: model
	$(RUN)/python -m loadtests.random_model --shape 8b --tokenizer $$($(RUN)/loramux pull $(MODEL) | tail -1) --out $(LOADS)/8b
	for adapters in 64 1000; do \
	  $(RUN)/python -m loadtests.run slora --model $(LARGE) --adapters $$adapters --rate 20 --out $(LOADS)/slora-$$adapters || exit 1; \
	done
	for popularity in distinct uniform skewed identical; do \
	  $(RUN)/python -m loadtests.run punica --model $(LARGE) --popularity $$popularity --requests 256 --longest 1024 \
	    --out $(LOADS)/punica-$$popularity || exit 1; \
	done
	$(RUN)/python -m loadtests.routing --model $(LOADS)/8b --encoder $$($(RUN)/loramux pull $(ENCODER) | tail -1) --adapters 60 \
	  --requests 96 --at-once 32 --tokens 64 --rounds 3 --page-memory 4GiB --out $(LOADS)/routing.json

# Trains and evaluates the routers inside the model on tasks of your own, in groups `small` and `medium`; after LIMIT seconds
# it stops, and the same command goes on. `make study TASKS=FOLDER SCALE=cuda JOBS=12`; with STEPS=eval-milora,longer
# only these steps run, and what they need
TASKS ?= tasks
STUDY ?= study
SCALE ?= cuda
JOBS ?= 1
LIMIT ?= 540
STEPS ?=
study: model
	$(RUN)/python -m routing.evaluate.study --model $$($(RUN)/loramux pull $(MODEL) | tail -1) --tasks $(TASKS) \
	  --out $(STUDY) --scale $(SCALE) --jobs $(JOBS) --seconds $(LIMIT) --steps "$(STEPS)"

lock:
	uv pip compile --universal --python-version 3.11 --no-header --no-annotate --extra dev \
	  --constraint requirements.in --output-file requirements.lock pyproject.toml
	uv pip compile --universal --python-version 3.11 --no-header --no-annotate \
	  --output-file requirements-clients.lock requirements-clients.in

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
