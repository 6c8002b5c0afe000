# Works from a clean checkout with GNU Make (3.81 or newer) and Python 3.11 or newer with its venv module.
# Each target sets up what it needs, once: the virtual environment and the locked dependencies in it.

VENV ?= .venv
# The interpreter that makes the virtual environment, when the first of PYTHONS that will do is not the right one.
PYTHON ?=
PYTHONS := python3 python3.13 python3.12 python3.11 python
PYTEST_ARGS ?=
# Test files that run at once: most tests wait most of the time, for a deadline or for a server.
PYTEST_JOBS ?= 2
BENCH_ARGS ?=
PROVE_ARGS ?=
SOAK_ARGS ?=

BIN := $(VENV)/bin
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# The servers that `make bench` measures beside Holdfast, in an environment of their own.
VENV_BASELINE := .venv-baseline

# Named by what was installed, and where: another lock file, or a checkout that was moved, has another stamp.
STAMP := $(VENV)/.installed-$(shell { cat requirements.txt pyproject.toml; pwd; } | cksum | cut -d ' ' -f 1)
STAMP_BASELINE := $(VENV_BASELINE)/.installed-$(shell { cat requirements-baseline.txt; pwd; } | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.SUFFIXES:
.NOTPARALLEL:
.PHONY: help serve test check lint format bench soak prove seed migrate audit lock clean clean-data FORCE

help: ## this list
	@echo "make <target>   [PYTHON=<interpreter for a new $(VENV)>] [VENV=<directory>]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F '|' '{ printf "%-13s %s\n", $$1, $$2 }'

serve: $(STAMP) ## start the server on http://127.0.0.1:4000 (PORT, HOST, .env); Ctrl-C stops it
	@exec $(BIN)/holdfast serve

test: $(STAMP) ## run every test (PYTEST_ARGS="-k name" for some)
	@exec $(BIN)/python -m pytest -n $(PYTEST_JOBS) --dist loadfile $(PYTEST_ARGS)

check: lint test ## what CI asks for: lint, format, types, layers, tests

lint: $(STAMP) ## all of check but the tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff sort imports and format
	$(BIN)/python -m ruff check --select I --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP) $(if $(filter --no-baseline --url%,$(BENCH_ARGS)),,$(STAMP_BASELINE)) ## measure it beside FastAPI, or any server with BENCH_ARGS="--url URL"; a report in .bench
	@exec $(BIN)/python -m tests.bench $(BENCH_ARGS)

soak: $(STAMP) ## overload it for ten minutes, then an hour of work, 80 min in all (SOAK_ARGS="--overload 1m --soak 5m"); a report in .soak
	@exec $(BIN)/python -m tests.proof.soak $(SOAK_ARGS)

prove: $(STAMP) ## the long set of proofs, hours of it (PROVE_ARGS="--sitting --minutes 60" for a part); a report in .proof
	@exec $(BIN)/python -m tests.proof.prove $(PROVE_ARGS)

seed: $(STAMP) ## empty the development database and fill it with sample data
	@exec $(BIN)/holdfast seed

migrate: $(STAMP) ## bring the schema of the database up to date
	@exec $(BIN)/holdfast migrate

audit: $(STAMP) ## check every invariant on the database
	@exec $(BIN)/holdfast audit

lock: ## choose the newest dependencies that pyproject.toml allows, for the requirements files (needs uv)
	@PATH="$(CURDIR)/$(BIN):$$PATH"; \
	command -v uv >/dev/null || { echo "make lock needs uv: see https://docs.astral.sh/uv" >&2; exit 1; }; \
	export="uv export --frozen --quiet --no-emit-project --no-annotate --no-header --format requirements-txt"; \
	uv lock --upgrade && $$export --group dev --output-file requirements.txt >/dev/null && \
	$$export --only-group baseline --output-file requirements-baseline.txt >/dev/null

clean: ## remove the virtual environment and all caches, not the data
	@if [ -e "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	@rm -rf "$(VENV_BASELINE)"
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist tests/clients/node/node_modules
	@find . -path ./.holdfast -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-data: ## delete .holdfast, the embedded database with all its data (only with FORCE=1)
	@if [ "$(FORCE)" != 1 ]; then \
	    echo "This deletes .holdfast with all its data: make clean-data FORCE=1" >&2; exit 1; fi
	@if pid=`head -n 1 .holdfast/postgres/postmaster.pid 2>/dev/null` && kill -0 "$$pid" 2>/dev/null; then \
	    echo "The database in .holdfast is running (process $$pid): stop Holdfast first." >&2; exit 1; fi
	@rm -rf .holdfast

# A virtual environment whose interpreter has gone, with an upgrade of the system, is made again.
ifneq ($(shell "$(BIN)/python" -c "$(IS_NEW_ENOUGH)" 2>/dev/null && echo good),good)
$(STAMP): FORCE
endif

# Each candidate is really run: a shim may exist and fail. PIP_USER would install beside the environment.
$(STAMP):
	@if "$(BIN)/python" -c "$(IS_NEW_ENOUGH)" 2>/dev/null; then chosen="$(BIN)/python"; else \
	    chosen=; bare=; \
	    for python in $(if $(PYTHON),"$(PYTHON)",$(PYTHONS)); do \
	        "$$python" -c "$(IS_NEW_ENOUGH)" >/dev/null 2>&1 || continue; \
	        if "$$python" -c "import venv, ensurepip" >/dev/null 2>&1; then chosen=$$python; break; fi; \
	        bare=$${bare:-$$python}; \
	    done; \
	    if [ -z "$$chosen" ] && [ -n "$$bare" ]; then \
	        echo "$$bare has no venv module: install it (Debian, Ubuntu: apt install python3-venv)," \
	             "or name another Python: make PYTHON=/path/to/python" >&2; exit 1; \
	    elif [ -z "$$chosen" ]; then \
	        echo "Holdfast needs Python 3.11 or newer, and none runs as $(or $(PYTHON),$(PYTHONS)):" \
	             "install one, or name it: make PYTHON=/path/to/python" >&2; exit 1; \
	    fi; \
	    "$$chosen" -m venv --clear "$(VENV)" || exit 1; \
	fi; \
	if ! "$(BIN)/python" -m pip --version >/dev/null 2>&1; then "$(BIN)/python" -m ensurepip >/dev/null || exit 1; fi
	@echo "Installing the locked dependencies into $(VENV), once ..."
	@export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1; \
	"$(BIN)/python" -m pip install --quiet --require-hashes -r requirements.txt && \
	"$(BIN)/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.installed-*
	@touch $@

$(STAMP_BASELINE): $(STAMP)
	@echo "Installing what the benchmark compares with into $(VENV_BASELINE), once ..."
	@"$(BIN)/python" -m venv --clear "$(VENV_BASELINE)"
	@export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1; \
	"$(VENV_BASELINE)/bin/python" -m pip install --quiet --require-hashes -r requirements-baseline.txt
	@rm -f $(VENV_BASELINE)/.installed-*
	@touch $@
