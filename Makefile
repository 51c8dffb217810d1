# Everything that a developer or a newcomer does with this repository; `make help` lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK_FLAGS := --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet

# Some machines forbid bytecode, and importing ccxt without it costs seconds at every start.
unexport PYTHONDONTWRITEBYTECODE

# The blob storage that tests run against; its packages are locked by hash.
AZURITE := data-service/tests/azurite
AZURITE_READY := $(AZURITE)/node_modules/.ready

# Tests wait more than they compute: one process more than there are cores, four at most.
WORKERS := $(shell cores=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((cores < 3 ? cores + 1 : 4)))

# Other people's clients, whose dependencies are none of ours.
PEERS := .venv-peers

# Other engines that read the table of candles.
ENGINES := .venv-engines

.PHONY: help setup run run-live test drill peers engines soak check format image scan bench lock clean

help: ## Show what can be done here
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## Install everything into .venv (done by the other commands when needed)

$(VENV)/.ready: requirements-bootstrap.lock requirements-dev.lock pyproject.toml
	@echo "Setting up $(VENV) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-bootstrap.lock
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip sync --quiet --require-hashes --compile-bytecode requirements-dev.lock
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q data-service/src
	@touch $@

$(AZURITE_READY): $(AZURITE)/package.json $(AZURITE)/package-lock.json
	@command -v npm >/dev/null && command -v node >/dev/null || \
		{ echo "make: tests need node and npm (Node.js 20 or newer) for Azurite; install them" >&2; exit 1; }
	@echo "Setting up Azurite ..."
	@cd $(AZURITE) && npm ci --ignore-scripts --no-audit --no-fund --no-update-notifier --loglevel=error >/dev/null
	@touch $@

run: setup ## Run the service on a simulated market, with BTC and ETH collected (Ctrl-C stops it)
	@exec $(BIN)/python -m demo

run-live: setup ## The same on the real exchanges
	@exec $(BIN)/python -m demo --live

test: setup $(AZURITE_READY) ## Run every test
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

drill: setup ## Kill the service thirty times, lie to it, stop it a hundred times, and compare (20 minutes)
	@CB_TRADE_DRILL=long $(BIN)/python -m pytest -s data-service/tests/drills

$(PEERS)/.ready: $(VENV)/.ready requirements-peers.lock
	@command -v cc >/dev/null || \
		{ echo "make: cryptofeed is compiled, which needs a C compiler and Python's headers; install them" >&2; exit 1; }
	@echo "Setting up $(PEERS) ..."
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv --without-pip $(PEERS)
	@VIRTUAL_ENV=$(CURDIR)/$(PEERS) $(BIN)/uv pip sync --quiet --require-hashes --compile-bytecode \
		--build-constraints requirements-peers.lock requirements-peers.lock
	@touch $@

peers: setup $(PEERS)/.ready ## Let freqtrade and cryptofeed read the sandbox beside the service, and compare (1 minute)
	@CB_TRADE_PEERS=$(CURDIR)/$(PEERS) $(BIN)/python -m pytest -s data-service/tests/peers

$(ENGINES)/.ready: $(VENV)/.ready requirements-engines.lock
	@echo "Setting up $(ENGINES) ..."
	@test -x $(ENGINES)/bin/python || $(PYTHON) -m venv --without-pip $(ENGINES)
	@VIRTUAL_ENV=$(CURDIR)/$(ENGINES) $(BIN)/uv pip sync --quiet --require-hashes --compile-bytecode requirements-engines.lock
	@touch $@

engines: setup $(ENGINES)/.ready ## Let Polars, DuckDB and Daft on Ray read the table of candles as docs/engines.md shows (1 minute)
	@CB_TRADE_ENGINES=$(CURDIR)/$(ENGINES) $(BIN)/python -m pytest -s data-service/tests/engines

soak: setup ## Run the service for 24 hours of a fast market and watch its memory (25 minutes)
	@$(BIN)/python data-service/benchmarks/soak.py

check: setup ## Lint, types and the architecture rules
	@$(BIN)/ruff format --check data-service deploy
	@$(BIN)/ruff check data-service deploy
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest --quiet data-service/tests/unit/test_layers.py
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/zizmor --offline --quiet --persona auditor .github/workflows
	@$(BIN)/yamllint --strict .github environment.yml deploy .yamllint.yaml
	@$(BIN)/hadolint Dockerfile
	@! command -v promtool >/dev/null || promtool check rules --lint=all --lint-fatal deploy/prometheus/alerts.yml >/dev/null
	@! command -v promtool >/dev/null || promtool test rules deploy/prometheus/alerts_test.yml >/dev/null

format: setup ## Format the code and mend what the linter can
	@$(BIN)/ruff format data-service deploy
	@$(BIN)/ruff check --fix data-service deploy

image: ## Build the image, start it and prove that it works: size, health, a coin, SIGTERM (3 minutes)
	@deploy/verify_image.sh

# Python's packages only: the base's own are renewed with the digest that names it. Strict, or a scan that
# could look nothing up would pass; so this project, which no index knows, is left out.
scan: setup ## Look for known vulnerabilities in the packages of an image: make scan IMAGE=name
	@test -n "$(IMAGE)" || { echo "make: name the image: make scan IMAGE=name" >&2; exit 1; }
	@folder=$$(mktemp -d) && container=$$(docker create "$(IMAGE)") && \
		trap 'docker rm --volumes "$$container" >/dev/null; rm -rf "$$folder"' EXIT && \
		docker cp --quiet "$$container:/app/lib/python3.11/site-packages" "$$folder" && \
		rm -r "$$folder"/site-packages/cb_trade_data_service-* && \
		$(BIN)/pip-audit --strict --progress-spinner off --path "$$folder/site-packages"

bench: setup $(AZURITE_READY) ## Run the benchmarks
	@for bench in data-service/benchmarks/bench_*.py; do \
		echo "== $$bench"; $(BIN)/python $$bench || [ $$? -eq 3 ] || exit 1; done  # 3: not all was there to measure

lock: setup ## Make the locks anew from pyproject.toml
	@$(BIN)/uv pip compile $(LOCK_FLAGS) --group bootstrap -o requirements-bootstrap.lock
	@$(BIN)/uv pip compile $(LOCK_FLAGS) --group peers -o requirements-peers.lock
	@$(BIN)/uv pip compile $(LOCK_FLAGS) --group engines -o requirements-engines.lock
	@$(BIN)/uv pip compile $(LOCK_FLAGS) pyproject.toml --extra otel -o requirements.lock
	@$(BIN)/uv pip compile $(LOCK_FLAGS) pyproject.toml --extra otel --group dev -c requirements.lock -o requirements-dev.lock

clean: ## Remove the environment and every cache (collected data stays)
	@rm -rf $(VENV) $(PEERS) $(ENGINES) $(AZURITE)/node_modules .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find data-service -name __pycache__ -prune -exec rm -rf {} +
