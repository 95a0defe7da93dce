"""What is installed: the versions that pyproject.toml allows, and those that were tested."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = {
    requirement.name.lower(): requirement
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for requirement in [Requirement(text)]
}


def tested_versions() -> dict[str, Version]:
    """The lines of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {name.lower(): Version(version) for name, version in pairs}


@pytest.mark.parametrize(
    ("version", "allowed"),
    [("2.6.1", False), ("2.6.2", False), ("2.6.3", False), ("2.6.5", False), ("2.6.6", True), ("2.7.0", False)],
)
def test_lightning_is_neither_malware_nor_a_version_that_runs_code_from_a_checkpoint(version, allowed):
    """Lightning-AI/pytorch-lightning 21691 (2.6.2 and 2.6.3), 21832 and 21914 (before 2.6.6)."""
    assert REQUIREMENTS["lightning"].specifier.contains(version) == allowed


def test_the_tested_versions_are_of_every_requirement_and_allowed_by_it():
    tested = tested_versions()
    assert tested.keys() == REQUIREMENTS.keys()
    refused = [name for name, version in tested.items() if version not in REQUIREMENTS[name].specifier]
    assert refused == []
