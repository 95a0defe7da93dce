# Every target makes .venv first where it is missing. PYTHON=python3.12 make demo: another interpreter.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: demo test lint results

demo: .venv/installed
	$(VENV)/python reproduce/realnvp_cifar10.py preset=demo

test: .venv/installed
	$(VENV)/python -m pytest

lint: .venv/installed
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

results: .venv/installed
	$(VENV)/python -m results

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
