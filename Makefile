PYTHON ?= python3.11
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS_VENV := .venv-benchmarks
INSTALL := python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test fuzz torture benchmarks clean

# Train, pause, resume and evaluate: the first example.
demo: $(VENV)/demo-installed
	$(BIN)/python examples/quickstart.py

# Everything CI asks for.
test: $(VENV)/dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest -n $(JOBS) --cov --cov-fail-under=90

# The laws on 5,000 examples each; SEED=... repeats a run.
fuzz: $(VENV)/dev-installed
	@seed=$${SEED:-$$($(BIN)/python -c 'import random; print(random.getrandbits(32))')}; \
	echo "make fuzz SEED=$$seed"; \
	$(BIN)/pytest -n $(JOBS) property_tests --hypothesis-profile=fuzz --hypothesis-seed=$$seed

# A training run killed with SIGKILL at 200 random moments, alone and with its workers, and at 20 one of several ranks
# under torchrun; SEED=... repeats them.
torture: $(VENV)/dev-installed
	@seed=$${SEED:-$$($(BIN)/python -c 'import random; print(random.getrandbits(32))')}; \
	OMP_NUM_THREADS=1 $(BIN)/python tests/checkpoint_runs.py torture --kills 200 --seed $$seed; alone=$$?; \
	OMP_NUM_THREADS=1 $(BIN)/python tests/distributed_faults.py torture --kills 20 --seed $$seed && exit $$alone

# Ratios against TorchTNT, Ignite and Lightning, in an environment of their own.
benchmarks: $(BENCHMARKS_VENV)/installed
	@set -e; for script in benchmarks/*.py; do echo "$$script"; $(BENCHMARKS_VENV)/bin/python "$$script"; done

clean:
	rm -rf $(VENV) $(BENCHMARKS_VENV) build dist .coverage .coverage.* .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python $(BENCHMARKS_VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || \
	{ echo "$(PYTHON) is not on PATH; Python 3.11 or later is needed: make $(MAKECMDGOALS) PYTHON=python3" >&2; exit 1; }
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)

# A stamp for each set of extras: installed once, and again when what it depends on changes.
$(VENV)/demo-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/$(INSTALL) -e '.[examples]'
	@touch $@

$(VENV)/dev-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/$(INSTALL) -e '.[dev,oracle]'
	@touch $@

$(BENCHMARKS_VENV)/installed: pyproject.toml constraints.txt | $(BENCHMARKS_VENV)/bin/python
	$(BENCHMARKS_VENV)/bin/$(INSTALL) -e '.[benchmarks]'
	@touch $@
