"""Who imports whom: the house rules that can be read off the source, without running it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROWS = {  # each package with the others of ours that it may import
    "flows": set(),
    "results": set(),
    "datamodules": set(),
    "lightning_modules": {"flows", "results"},
    "reproduce": {"flows", "results", "datamodules", "lightning_modules"},
    "benchmarks": {"flows", "results", "datamodules", "lightning_modules", "reproduce"},
}
OURS = {*ARROWS, "tests", "cases"}  # tests/cases.py is imported under its own name
SLOW_IMPORTS = {"torchvision", "wandb", "skimage", "sklearn", "matplotlib"}


def sources(pattern):
    return sorted(path for path in ROOT.glob(pattern) if "__pycache__" not in path.parts)


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(node, path):
    """The absolute names of the modules that one import statement asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.level == 0:
        return [node.module]
    package = path.relative_to(ROOT).parts[: -node.level]
    return [".".join([*package, *filter(None, [node.module])])]


def imports(path, top_level_only=False):
    """(line, module) of every import.

    With `top_level_only` those that run when the file itself is imported.
    """
    statements = []
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if top_level_only and is_for_type_checkers(node):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            statements += [(node.lineno, name) for name in imported(node, path)]
        if not (
            top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ):
            nodes += ast.iter_child_nodes(node)
    return sorted(statements)


def is_for_type_checkers(node):
    """Whether a statement is `if TYPE_CHECKING:`, which is not run."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_what_type_checkers_alone_read_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "a.py"
    path.write_text("if TYPE_CHECKING:\n    import wandb\nif True:\n    import json\n")
    assert imports(path, top_level_only=True) == [(4, "json")]
    assert imports(path) == [(2, "wandb"), (4, "json")]


def violations(patterns, forbidden, top_level_only=False):
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for pattern in patterns
        for path in sources(pattern)
        for line, name in imports(path, top_level_only)
        if forbidden(name.split(".")[0])
    ]


def test_the_reader_of_imports_sees_them_all(tmp_path, monkeypatch):
    """The other tests rely on this function."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "flows" / "a.py"
    path.parent.mkdir()
    path.write_text(
        "import math, os.path\nfrom flows.base import Flow\n"
        "from . import base\nfrom .base import Flow\n"
        "try:\n    import numpy as np\nexcept ImportError:\n    pass\n"
        "class A:\n    import json\n    def f(self):\n        from tests.cases import CASES\n"
    )
    top = [
        (1, "math"),
        (1, "os.path"),
        (2, "flows.base"),
        (3, "flows"),
        (4, "flows.base"),
        (6, "numpy"),
        (10, "json"),
    ]
    assert imports(path, top_level_only=True) == top
    assert imports(path) == [*top, (12, "tests.cases")]
    assert violations(["flows/*.py"], lambda name: name == "tests") == [
        "flows/a.py:12 imports tests.cases"
    ]


@pytest.mark.parametrize("package", ARROWS)
def test_a_package_imports_only_what_the_arrows_allow(package):
    forbidden = OURS - ARROWS[package] - {package}
    assert violations([f"{package}/**/*.py"], lambda name: name in forbidden) == []


def test_every_package_of_ours_has_its_arrows():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} <= set(ARROWS)


def test_flows_is_torch_and_the_standard_library():
    allowed = {"torch", "flows", *sys.stdlib_module_names}
    assert violations(["flows/**/*.py"], lambda name: name not in allowed) == []


def test_results_needs_no_torch():
    """Importing torch takes seconds, and the results page is often written."""
    forbidden = {"torch", "torchvision", "torchmetrics", "lightning"}
    assert violations(["results/**/*.py"], lambda name: name in forbidden) == []


def test_slow_packages_are_imported_inside_functions():
    patterns = [f"{package}/**/*.py" for package in ARROWS if package != "benchmarks"]
    assert violations(patterns, lambda name: name in SLOW_IMPORTS, top_level_only=True) == []


def test_no_file_is_called_utils():
    assert [
        path for package in (*ARROWS, "tests") for path in sources(f"{package}/**/utils.py")
    ] == []


def test_importing_a_flow_loads_neither_lightning_nor_torchvision():
    code = "import sys, flows.realnvp; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "flows" in loaded
    assert not loaded & {"lightning", "torchmetrics", *OURS - {"flows"}, *SLOW_IMPORTS}
