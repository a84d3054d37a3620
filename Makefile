# Everything needs Python 3.11 or later and nothing else; the environment is made on the first call.
# `make help` lists the targets.

VENV   ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
            if $$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
            then echo $$p; break; fi; done)
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

# Threads that wait by spinning slow each other down many times over where cores are shared; torch's do by default.
export OMP_WAIT_POLICY ?= passive
test: export OMP_NUM_THREADS ?= 1  # the tests themselves are spread over the cores

.DEFAULT_GOAL := help
.PHONY: help demo test lint types check-memory update-baseline bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{printf "%-22s %s\n", $$1, $$2}'

demo: $(STAMP)  ## scan a model, recommend under a budget, train with the plan beside plain AdamW (under 4 minutes)
	$(PY) examples/demo.py

test: $(STAMP) lint types check-memory  ## lint, types, memory, and every test that needs neither a GPU nor several processes
	$(PY) -m pytest -n auto --dist loadfile --durations=20 --durations-min=15

lint: $(STAMP)  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)  ## mypy on memadvise/
	$(PY) -m mypy

# The project's own memory check: what its examples take, byte for byte, as committed in memadvise.baseline.json.
EXAMPLES := examples/gpt_text.py examples/vit_digits.py examples/cnn_digits.py examples/llama_hf.py

check-memory: $(STAMP)  ## the memory of every example against memadvise.baseline.json
	$(PY) -m memadvise check $(EXAMPLES) --strict --no-progress

update-baseline: $(STAMP)  ## write what the examples take now into memadvise.baseline.json
	$(PY) -m memadvise check $(EXAMPLES) --update-baseline --no-progress

bench: $(STAMP)  ## every benchmark of benchmarks/; each prints one table
	@set -e; for b in benchmarks/*.py; do [ -e "$$b" ] || { echo "benchmarks/ holds no benchmark"; break; }; echo "== $$b"; $(PY) "$$b"; done

clean:  ## remove the environment and every cache
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The build backend comes first and from the same constraints, so that the set-up is reproducible as a whole.
$(STAMP): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.11 or later with the venv module found; install one, or say: make PYTHON=/path/to/python3" >&2; exit 1; }
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
