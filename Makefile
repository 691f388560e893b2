# `make` lists the targets.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := kvstore server/kvstore_server client/kvstore_client proto/kvstore_proto \
	kernels/kvstore_kernels engines/kvstore_engines engines/kvstore_integrations benchmarks examples

.DEFAULT_GOAL := help
.PHONY: help demo cluster-demo test test-long test-sim test-vllm test-sglang test-lmcache test-gpu bench-gpu lint format bench proto clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@# Without a GPU the CPU build of torch comes first, so that nothing pulls in CUDA packages.
	@command -v nvidia-smi >/dev/null || $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[all,ucxx,demo,dev]'
	@touch $@

demo: $(READY) ## a real model answers through the store; tokens equal to the run without it
	$(BIN)/python -m kvstore_engines.demo

cluster-demo: $(READY) ## three servers, one killed while an engine reads from it; tokens equal
	$(BIN)/python -m kvstore_engines.cluster_demo

test: lint ## lint and the whole test suite, but for the long hunts; in two processes
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(READY) ## the long hunts: millions of reads, deep random histories, large pools
	$(BIN)/python -m pytest -m long --ignore tests/cluster/sim

test-sim: $(READY) ## clusters under faults by 500 seeds of each plan; SIM_NIGHT=1: by 20,000 of one
	$(BIN)/python -m pytest -m long -n 2 tests/cluster/sim $(if $(SIM_NIGHT),-k night,-k "not night")

# Each engine's environment is made on first use, under .cache/integrations: some minutes, 3 GB.
test-vllm test-sglang test-lmcache: $(READY) ## a real engine on our store, in its own environment
	SERVER_PYTHON=$(abspath $(BIN))/python \
		$$($(BIN)/python tests/integrations/environment.py $(@:test-%=%))/bin/python -m pytest \
		-c tests/integrations/real/pytest.ini --rootdir=tests tests/integrations/real/$(@:test-%=%)

# On a machine with a GPU, and a Python that has torch, Triton and pytest; nothing is installed.
GPU_PYTHON ?= python3

test-gpu: ## the kernels on a GPU, against float64 and a hundred times each
	PYTHONPATH=kernels:engines:. $(GPU_PYTHON) -m pytest -c tests/gpu/pytest.ini --rootdir=tests tests/gpu

bench-gpu: ## the kernels' speed beside others and the GPU's own limits
	PYTHONPATH=kernels:engines:. $(GPU_PYTHON) -m benchmarks.gpu

lint: $(READY) ## ruff, mypy strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/lint-imports --no-cache

format: $(READY) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## speed beside the peers and this machine's limits; takes 15 minutes, 18 GB of memory
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	mkdir -p docs/benchmarks
	$(BIN)/python -m benchmarks.peers --table docs/benchmarks/peers.md \
		--json docs/benchmarks/peers.json --plot docs/benchmarks/peers.png
	$(BIN)/python -m benchmarks.growth --json docs/benchmarks/growth.json \
		--plot docs/benchmarks/growth.png > docs/benchmarks/growth.md
	$(BIN)/python -m benchmarks.load --json docs/benchmarks/load.json > docs/benchmarks/load.md
	@# fio is what the NVMe tier is compared with; FOLDER: on the disk that is meant.
	$(BIN)/python -m benchmarks.nvme --folder $(or $(FOLDER),.cache) $(if $(TRACE),--trace $(TRACE)) \
		--json docs/benchmarks/nvme.json > docs/benchmarks/nvme.md
	$(BIN)/python -m benchmarks.nvme_engines --folder $(or $(FOLDER),.cache) \
		--json docs/benchmarks/nvme-engines.json > docs/benchmarks/nvme-engines.md
	$(BIN)/python -m benchmarks.restart --folder $(or $(FOLDER),.cache) \
		--json docs/benchmarks/restart.json > docs/benchmarks/restart.md
	$(BIN)/python -m benchmarks.transfer --json docs/benchmarks/transfer.json \
		> docs/benchmarks/transfer.md
	$(BIN)/python -m benchmarks.cluster --json docs/benchmarks/cluster.json \
		> docs/benchmarks/cluster.md
	$(BIN)/python -m benchmarks.scale $(TRACE) --json docs/benchmarks/scale.json \
		> docs/benchmarks/scale.md
	@# TRACE: requests as in Mooncake's FAST 25 release, for hit rates; 5 minutes more.
	$(if $(TRACE),$(BIN)/python -m benchmarks.replay $(TRACE) --json docs/benchmarks/replay.json \
		--plot docs/benchmarks/replay.png > docs/benchmarks/replay.md)

proto: $(READY) ## generate the protocol's code and the asyncio client anew
	$(BIN)/python proto/generate.py
	$(BIN)/python client/generate_async.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
