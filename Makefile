# Every target makes .venv first where it is missing. PYTHON=python3.12 make demo: another interpreter.
PYTHON ?= python3
VENV := .venv/bin
# The versions that were tested; empty for the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt

.PHONY: demo test test-newest lint results slurm-test

demo: .venv/installed
	$(VENV)/python reproduce/realnvp_cifar10.py preset=demo

test: .venv/installed
	$(VENV)/python -m pytest -n 2 --dist worksteal

# The suite with the newest versions that pyproject.toml allows, in a copy with a .venv of its own: before a bound in
# pyproject.toml or a version in constraints.txt is moved.
test-newest:
	rm -rf .newest && git clone --quiet . .newest
	$(MAKE) -C .newest test CONSTRAINTS=

lint: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

results: .venv/installed
	$(VENV)/python -m results

# A real Slurm on the loopback address. Where it is missing and cannot be installed, its tests are skipped.
slurm-test: .venv/installed
	@start=$$(date +%s); .ci/install-slurm; \
	$(VENV)/python -m pytest -m slurm -rs --durations=10; code=$$?; \
	echo "slurm-test: $$(($$(date +%s) - start)) s"; exit $$code

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e ".[dev]"
	$(VENV)/python -m pip install --quiet --no-deps sweeps==0.3.0  # W&B's sweep schema; wants numpy<2, so without deps
	touch $@
