"""What keeps the project in order: versions, the suite's settings, hooks, CI, CONTRIBUTING.md.

The files and classes that docs/adding-a-flow.md names are checked here too.
"""

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from test_structure import ARROWS, sources

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
IMPORT_NAMES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "torch-fidelity": "torch_fidelity",
}


def constraints(name):
    """The versions in a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {package.lower(): Version(version) for package, version in pairs}


def requirements():
    """Every requirement of pyproject.toml by its name."""
    texts = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    return {requirement.name.lower(): requirement for requirement in map(Requirement, texts)}


def lower_bound(requirement):
    """The version after `>=`; None without."""
    bounds = [part.version for part in requirement.specifier if part.operator == ">="]
    return next(map(Version, bounds), None)


# Versions


def test_the_lowest_versions_are_the_lower_bounds_and_tools_are_as_tested():
    tested = constraints("constraints.txt")
    expected = {
        name: lower_bound(requirement) or tested[name]
        for name, requirement in requirements().items()
    }
    assert constraints("constraints-lowest.txt") == expected


def test_every_dependency_has_a_lower_bound():
    names = [Requirement(text).name for text in PROJECT["dependencies"]]
    assert [name for name in names if lower_bound(requirements()[name]) is None] == []


def imported_packages():
    """The packages that our code imports, tests included."""
    names = set()
    paths = [path for package in ("tests", *ARROWS) for path in sources(f"{package}/**/*.py")]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    return names


def test_every_requirement_is_imported_or_says_what_needs_it():
    imported = imported_packages()
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    unexplained = []
    for name in requirements():
        [line] = [line for line in lines if re.match(rf'\s+"{re.escape(name)}\b(?!-)', line)]
        if IMPORT_NAMES.get(name, name) not in imported and "# " not in line:
            unexplained.append(name)
    assert unexplained == []


# The suite


def test_the_suite_runs_the_examples_of_all_packages():
    options = SETTINGS["tool"]["pytest"]["ini_options"]
    assert "--doctest-modules" in shlex.split(options["addopts"])
    assert set(options["testpaths"]) == {"tests", *ARROWS}


# Hooks


def test_hooks_have_the_versions_of_lint():
    content = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in content["repos"] for hook in repository["hooks"]]
    installed = {hook["id"]: hook["additional_dependencies"] for hook in hooks}
    ruff = f"ruff=={constraints('constraints.txt')['ruff']}"
    assert installed["ruff-check"] == installed["ruff-format"] == [ruff]
    assert all("==" in package for packages in installed.values() for package in packages)


# CI


def workflow():
    return yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))


def test_the_workflow_runs_the_same_script_and_may_only_read():
    [job] = workflow()["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [
        ".ci/run ${{ matrix.versions }}"
    ]
    assert workflow()["permissions"] == {"contents": "read"}
    assert workflow()["concurrency"]["cancel-in-progress"] is True


def test_the_workflow_starts_with_the_lowest_python():
    [job] = workflow()["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert Version(matrix["python"][0]) in Requirement(f"x{PROJECT['requires-python']}").specifier
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    known = re.findall(r"^(\w+)\) export CONSTRAINTS=", script, flags=re.MULTILINE)
    assert sorted(matrix["versions"]) == sorted(known)


def test_unknown_versions_are_one_line():
    run = subprocess.run(
        ["bash", ROOT / ".ci/run", "oldest"], capture_output=True, text=True, check=False
    )
    line = "error: 'oldest' are no versions: give tested, lowest or newest\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", line)


# CONTRIBUTING.md


def quoted():
    """What two pages have between backquotes, and the lines of their blocks of commands."""
    pages = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "adding-a-flow.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    commands = [line.partition("  #")[0] for block in blocks for line in block.splitlines()]
    return [*re.findall(r"`([^`\n]+)`", rest), *commands]


def test_the_files_that_contributing_names_exist():
    paths = {
        word
        for words in quoted()
        for word in words.split()
        if re.fullmatch(r"[\w./-]+(/|\.(py|yaml|yml|toml|txt|md|cff))", word)
    }
    assert len(paths) > 30
    made = {"data/", "outputs/glow_cifar10/", "results/weights/"}  # by a run, or by its user
    assert [path for path in sorted(paths - made) if not (ROOT / path).exists()] == []


def test_the_targets_and_commands_that_contributing_names_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = {word for words in quoted() for word in re.findall(r"\bmake ([a-z][\w-]*)", words)}
    assert {"test", "lint", "hooks", "results"} <= named <= set(targets)
    modules = {name for words in quoted() for name in re.findall(r"python -m ([\w.]+)", words)}
    of_benchmarks = {"benchmarks", "benchmarks.overhead", "benchmarks.stability"}
    assert modules == {"results", "reproduce.verify", *of_benchmarks}
    markers = {line.split(":")[0] for line in SETTINGS["tool"]["pytest"]["ini_options"]["markers"]}
    assert {name for words in quoted() for name in re.findall(r"-m (\w+)$", words)} == markers - {
        "slurm"
    }


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("flows/base.py", ["Flow", "FlowModel"]),
        ("lightning_modules/objective.py", ["Objective"]),
        ("lightning_modules/optimization.py", ["OptimizedModule"]),
        ("lightning_modules/density.py", ["DensityModule"]),
        ("lightning_modules/metrics.py", ["image_mean"]),
        ("datamodules/dequantization.py", ["Dequantizer"]),
        ("datamodules/stateless.py", ["StatelessDataModule"]),
        ("results/metrics.py", ["Metric"]),
    ],
)
def test_the_classes_that_contributing_names_are_where_it_says(path, names):
    defined = {
        node.name
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    assert set(names) <= defined
    assert set(names) <= {word for words in quoted() for word in re.findall(r"\w+", words)}
