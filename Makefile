# Every target makes .venv first where it is missing. PYTHON=python3.12 make demo takes another
# interpreter.
PYTHON ?= python3
VENV := .venv/bin
PIP := $(VENV)/python -m pip install --quiet --disable-pip-version-check
# The versions to install: constraints.txt (tested), constraints-lowest.txt, or nothing (newest).
CONSTRAINTS ?= constraints.txt

.PHONY: demo test test-lowest test-newest lint hooks results slurm-test

demo: .venv/installed
	$(VENV)/python reproduce/realnvp_cifar10.py preset=demo

test: .venv/installed
	$(VENV)/python -m pytest -n 2 --dist worksteal

# The suite with the lowest or the newest versions that pyproject.toml allows: to be run before one
# of its bounds or a version in a constraints file is moved. Each runs in a clone of the last
# commit, with a .venv of its own. The lowest versions have wheels for Python 3.11 and 3.12 only.
test-lowest:
	rm -rf .lowest && git clone --quiet . .lowest
	$(MAKE) -C .lowest test CONSTRAINTS=constraints-lowest.txt

test-newest:
	rm -rf .newest && git clone --quiet . .newest
	$(MAKE) -C .newest test CONSTRAINTS=

lint: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

# From here on git runs ruff and a few small checks before each commit: .pre-commit-config.yaml.
hooks: .venv/installed
	$(VENV)/pre-commit install

results: .venv/installed
	$(VENV)/python -m results

# A real Slurm on the loopback address. Where it is missing and cannot be installed, its tests are
# skipped.
slurm-test: .venv/installed
	@start=$$(date +%s); .ci/install-slurm; \
	$(VENV)/python -m pytest -m slurm -rs --durations=10; code=$$?; \
	echo "slurm-test: $$(($$(date +%s) - start)) s"; exit $$code

.venv/installed: pyproject.toml constraints.txt constraints-lowest.txt
	$(PYTHON) -m venv .venv
	$(PIP) $(addprefix -c ,$(CONSTRAINTS)) -e ".[dev]"
	$(PIP) --no-deps sweeps==0.3.0  # the schema of sweep files; what it asks for is not needed
	touch $@
