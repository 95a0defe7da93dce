"""What is installed: allowed versions, tested versions, and all files that code reads."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.version import Version

from lightning_modules.stopping import TRY_AGAIN, RunStopped
from reproduce import provenance
from reproduce.command import resumable
from results import papers_with_recipe

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
PACKAGES = SETTINGS["tool"]["setuptools"]["packages"]
REQUIREMENTS = {
    requirement.name.lower(): requirement
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    for requirement in [Requirement(text)]
}


def versions_in_constraints() -> dict[str, Version]:
    """The lines of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {name.lower(): Version(version) for name, version in pairs}


@pytest.mark.parametrize(
    ("version", "allowed"),
    [
        ("2.6.1", False),
        ("2.6.2", False),
        ("2.6.3", False),
        ("2.6.5", False),
        ("2.6.6", True),
        ("2.7.0", False),
    ],
)
def test_lightning_is_neither_malware_nor_a_version_that_runs_code_from_a_checkpoint(
    version, allowed
):
    """Lightning-AI/pytorch-lightning 21691 (2.6.2 and 2.6.3), 21832 and 21914 (before 2.6.6)."""
    assert REQUIREMENTS["lightning"].specifier.contains(version) == allowed


def test_the_versions_in_constraints_are_of_every_requirement_and_allowed_by_it():
    tested = versions_in_constraints()
    assert tested.keys() == REQUIREMENTS.keys()
    refused = [
        name for name, version in tested.items() if version not in REQUIREMENTS[name].specifier
    ]
    assert refused == []


def test_every_folder_with_code_or_with_yaml_that_code_reads_is_a_package():
    tops = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    folders = {path.parent for top in tops for path in top.rglob("__init__.py")}
    folders |= {
        path.parent for name in ("configs", "results") for path in (ROOT / name).rglob("*.yaml")
    }
    assert set(PACKAGES) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert SETTINGS["tool"]["setuptools"]["package-data"] == {"*": ["*.yaml", "*.j2"]}


def test_every_paper_with_a_recipe_is_cited():
    recipes = [path.stem for path in (ROOT / "configs").glob("*.yaml")]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert [
        stem
        for stem, paper in papers_with_recipe(recipes).items()
        if f"arxiv.org/abs/{paper['arxiv']}" not in citation
    ] == []


# ------------------------------------------------------------------------------- pip install .


def git(folder, *words):
    identity = [
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@example.invalid",
        "-c",
        "commit.gpgsign=false",
    ]
    done = subprocess.run(
        ["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def repository(folder):
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "--quiet")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "of another project")
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which a copy of this repository was installed.

    It lies in a repository of another project.
    """
    folder = tmp_path_factory.mktemp("installed")
    for top in {name.split(".")[0] for name in PACKAGES}:  # setuptools leaves build/ beside it
        shutil.copytree(
            ROOT / top, folder / "source" / top, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    target = repository(folder / "project") / "packages"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--target", target, folder / "source"], check=True, timeout=120)
    return target


def python(installed, cwd, *words):
    """An interpreter that has the installed copy and not this repository."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


IN_AN_INSTALLED_COPY = """
import contextlib, io, json
import reproduce, results
from reproduce import glow_photos, load, realnvp_cifar10
from reproduce.config import CONFIGS
from reproduce.provenance import git_state
from results.__main__ import main as write_page

def printed(main, *words):
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        try:
            code = main(list(words))
        except SystemExit as stop:
            code = stop.code
    return code, output.getvalue()

print(json.dumps({
    "files": [reproduce.__file__, str(CONFIGS)],
    "config": printed(glow_photos.main, "preset=demo", "--print-config"),
    "help": printed(realnvp_cifar10.main, "--help"),
    "claims": sorted(results.load_claims()),
    "git": git_state(),
    "page": printed(write_page),
    "add": printed(write_page, "add", "outputs/x/y"),
}))
"""


def test_an_installed_copy_has_its_recipes_and_claims(installed, tmp_path):
    """`reproduce.load` is imported, --help and --print-config answer, and nothing is written."""
    before = sorted(path for path in installed.rglob("*") if path.suffix != ".pyc")
    done = python(installed, tmp_path, "-c", IN_AN_INSTALLED_COPY)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert all(Path(file).is_relative_to(installed) for file in answers["files"])
    code, text = answers["config"]
    assert code == 0
    assert {"experiment: glow_photos", "preset: demo", "  name: photos"} <= set(text.splitlines())
    code, text = answers["help"]
    assert code == 0
    assert "  flow.n_blocks=8  # section 4.1: residual blocks in a coupling" in text.splitlines()
    assert {"glow.cifar10", "realnvp.cifar10"} <= set(answers["claims"])
    assert answers["git"] == [None, False]  # not the commit of the project around it
    for code, text in (answers["page"], answers["add"]):
        assert (code, text.count("\n")) == (1, 1)
        assert "is an installed copy without recorded runs: run this in a clone" in text
    assert sorted(path for path in installed.rglob("*") if path.suffix != ".pyc") == before


@pytest.mark.slow
def test_an_installed_copy_trains(installed, tmp_path):
    done = python(installed, tmp_path, "-m", "reproduce.glow_photos", "preset=demo", "run_dir=run")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["experiment"], result["images"], result["commit"]) == ("glow_photos", 6400, None)
    assert 0 < result["metrics"]["test/bpd"] < 8


@pytest.mark.parametrize(
    ("cwd", "program"),
    [(ROOT, "reproduce/realnvp_moons.py"), (ROOT / "tests", "-m reproduce.realnvp_moons")],
    ids=["in the clone", "elsewhere"],
)
def test_how_to_go_on_is_a_command_that_works_there(monkeypatch, cwd, program):
    """An installed copy has no reproduce/ folder where it is run."""
    monkeypatch.chdir(cwd)
    config = OmegaConf.create(
        {"experiment": "realnvp_moons", "overrides": ["seed=1"], "run_dir": "r"}
    )
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=None))
    with pytest.raises(RunStopped) as stop, resumable(config, trainer):
        raise RunStopped("stopped", TRY_AGAIN)
    assert (
        stop.value.message == f"stopped; go on with: python {program} seed=1 run_dir=r resume=auto"
    )


GENERATED_FILES = (
    "README.md",
    "results/README.md",
    "results/index.html",
    "results/runs/realnvp_moons/a.json",
    "results/ablations/a.png",
    "results/benchmarks/a.json",
    "results/stability/a.json",
    "results/thumbnails/a.webp",
    "results/ood/a.json",
)


def change(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("a line\n")


def test_a_commit_is_reported_only_of_a_checkout_of_this_repository(tmp_path, monkeypatch):
    """Not of a repository in which the package lies unknown to it, or in a folder of it."""

    def state(root):
        monkeypatch.setattr(provenance, "ROOT", root)
        return provenance.git_state()

    checkout = repository(tmp_path / "checkout")
    file = checkout / "reproduce" / "provenance.py"
    file.parent.mkdir()
    file.write_text("a = 1\n")
    assert state(checkout) == (None, False)  # installed into the root of another project
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "ours")
    assert state(checkout) == (git(checkout, "rev-parse", "HEAD"), False)
    file.write_text("a = 2\n")
    assert state(checkout) == (git(checkout, "rev-parse", "HEAD"), True)
    git(checkout, "commit", "--quiet", "--all", "-m", "changed")
    for name in GENERATED_FILES:  # as `python -m results add` rewrites them
        change(checkout / name)
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "-m", "with results")
    head = git(checkout, "rev-parse", "HEAD")
    for name in GENERATED_FILES:
        change(checkout / name)
    assert state(checkout) == (head, False)
    change(checkout / "results" / "page.py")
    assert state(checkout) == (head, False)  # not tracked
    git(checkout, "add", ".")
    assert state(checkout) == (head, True)
    vendor = repository(tmp_path / "project") / "vendor"
    (vendor / "reproduce").mkdir(parents=True)
    (vendor / "reproduce" / "provenance.py").write_text("a = 1\n")
    git(vendor, "add", ".")
    git(vendor, "commit", "--quiet", "-m", "with a copy of ours")
    assert state(vendor) == (None, False)
    assert state(tmp_path) == (None, False)
