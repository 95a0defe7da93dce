"""The pages for readers: their commands run, and the links, keys and files that they name exist.

A block that runs is marked by a comment on the line before it, which readers do not see:

    <!-- run -->        its commands run in this process, with few steps of small models
    <!-- run: slow -->  its commands run as processes of their own, under `pytest -m slow`

The blocks of a page run from top to bottom in one folder, so that a block may use what an earlier
one of its page has made.
"""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from newcomer import (
    EXPERIMENTS,
    PAGES,
    ROOT,
    blocks,
    commands,
    experiment_of,
    furnish,
    reduced,
    run,
)

from reproduce.config import CONFIGS, compose, override
from reproduce.grid import rows
from results import load_claims, papers_with_recipe

MARKS = ("", "run", "run: slow")
BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
COMMANDS = [(block, words) for block in SHELL for words in commands(block)]
BY_NAME = {page.relative_to(ROOT).as_posix(): page for page in PAGES}
RUNNABLE = [
    name
    for name, page in BY_NAME.items()
    if any(block.mark == "run" for block in BLOCKS if block.page == page)
]
# Files and folders that the pages name and that a run or a reader makes.
MADE = ("outputs/", "data/", "photos/", "pets/", "wandb/", "results/weights/")
# What is there after the blocks of a page have run.
LEFT_BEHIND = {
    "README.md": [
        *("outputs/photos/result.json", "outputs/photo-samples/grid.png", "scores.csv"),
        *("outputs/photo-model/model.safetensors", "outputs/photo-model/README.md"),
    ],
    "docs/clusters.md": ["outputs/mine/checkpoints/step-00000003.ckpt"],
    "docs/data.md": ["outputs/photos/result.json", "cache/paperflows"],
    "docs/models.md": [
        *("outputs/demo/result.json", "outputs/demo-samples/000003.png"),
        *("outputs/enlarged/000_x4_1.png", "outputs/enlarged/000_x4_strip.png"),
    ],
    "docs/papers-and-code.md": [
        *("outputs/glow/pictures/attributes-cat.png", "results/runs/realnvp_cifar10/mine.json"),
    ],
}
# What makes the commands of slow blocks quick, by module.
QUICK = {
    "benchmarks": ["rounds=1", "settings=K8 L3 H128 B16"],
    "reproduce.figure3": [
        *("seeds=0", "flow.depth=1", "flow.hidden_channels=4", "optim.warmup_steps=1"),
        *("data.name=photos", "data.size=8", "data.n_train=64", "data.n_val=16", "data.n_test=16"),
        *("data.batch_size=16", "trainer.max_steps=2", "trainer.val_check_interval=1"),
    ],
}


def content(path):
    """The text of a file, by its path or its name in the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


# What runs


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_blocks_of_a_page_run(name, tmp_path, monkeypatch):
    furnish(tmp_path, monkeypatch)
    if name == "README.md":  # whose command skips it
        (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(BY_NAME[name]):
        if block.mark != "run" or rows_without_weights(block):
            continue
        if block.language == "python":
            # Line numbers of a traceback are those of the page.
            text = "\n" * block.line + block.text
            exec(compile(text, str(block.page), "exec"), names)
        else:
            for words in commands(block):
                run(words, tmp_path)
    missing = [path for path in LEFT_BEHIND.get(name, ()) if not (tmp_path / path).exists()]
    assert missing == []


def rows_without_weights(block):
    """The recorded runs that a block loads although their weights are not in this repository."""
    rows = re.findall(r'load\("(\w+/[\w-]+)"\)', block.text)
    recorded = [row for row in rows if (ROOT / "results" / "runs" / f"{row}.json").is_file()]
    weights = ROOT / "results" / "weights"
    return [row for row in recorded if not (weights / f"{row}.safetensors").is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in SHELL if b.mark == "run: slow"], ids=str)
def test_a_slow_block_runs_as_processes_of_its_own(block, tmp_path, monkeypatch):
    furnish(tmp_path, monkeypatch)
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {**os.environ, "PATH": os.pathsep.join(folders), "PYTHONPATH": str(ROOT)}
    for words in commands(block):
        done = subprocess.run(
            quick(words),
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, f"{shlex.join(quick(words))}\n{done.stdout}"


def quick(words):
    """A command of a slow block with few steps, on photographs that need no files."""
    experiment = experiment_of(words)
    if experiment is None:
        return override(words, QUICK[words[2]])
    name, arguments = experiment
    start = words[: len(words) - len(arguments)]
    return [*start, *reduced(name, [*arguments, "data.name=photos"])]


def test_marks_are_known_and_blocks_have_a_language():
    assert [f"{block}: {block.mark}" for block in BLOCKS if block.mark not in MARKS] == []
    languages = {"bash", "python", "yaml", "text"}
    assert [str(block) for block in BLOCKS if block.language not in languages] == []
    texts = [content(page) for page in PAGES]
    n_marks = sum(len(re.findall(r"^<!-- run\b", text, flags=re.MULTILINE)) for text in texts)
    assert n_marks == sum(bool(block.mark) for block in BLOCKS)  # each is beside its block
    python = [block for block in BLOCKS if block.language == "python"]
    assert [str(block) for block in python if block.mark != "run"] == []


# What the commands that do not run here name


def test_the_settings_of_every_command_are_accepted():
    for block, words in COMMANDS:
        experiment = experiment_of(words)
        if experiment is None:
            continue
        name, arguments = experiment
        settings = [word for word in arguments if re.match(r"\w+(\.\w+)*=", word)]
        assert compose(name, settings).experiment == name, f"{block}: {shlex.join(words)}"


def test_the_modules_targets_and_files_of_commands_exist():
    targets = re.findall(r"^([\w-]+):", content("Makefile"), flags=re.MULTILINE)
    for block, words in COMMANDS:
        line = f"{block}: {shlex.join(words)}"
        for before, word in pairwise(words):
            if before == "-m" and words[0] == "python":
                assert find_spec(word), line
            if before == "make":
                assert word in targets, line
            if word.startswith(("reproduce/", "configs/", "tests/", "benchmarks/")):
                assert (ROOT / word.split("::")[0]).exists(), line


def test_an_array_has_a_task_for_each_row_of_its_grid():
    arrays = []
    for block, words in COMMANDS:
        if "--grid" in words:
            file = words[words.index("--grid") + 1]
            arrays.append(f"--array=0-{len(rows(ROOT / file)) - 1}")
            assert arrays[-1] in words, str(block)
    assert arrays


# What the text names


def prose(page):
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", content(page), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=BY_NAME)
def test_links_and_pictures_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    targets += re.findall(r'(?:src|href)="([^"]+)"', prose(page))
    broken = []
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        is_known = file.exists() and (not anchor or anchor in anchors(file))
        if not is_known:
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=BY_NAME)
def test_lines_have_at_most_100_characters(page):
    lines = [line for line in content(page).splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 100] == []


def test_readme_is_read_in_five_minutes():
    lines = prose(ROOT / "README.md").splitlines()
    words = [word for line in lines if not line.startswith("|") for word in line.split()]
    assert len(words) < 950  # links included, but not the tables, which grow with the results


def test_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\(([\w./-]+\.md)", content("README.md")))
    assert set(BY_NAME) - {"README.md"} <= linked


@cache
def known_keys():
    """The dotted keys of all recipes, data sets and presets."""
    files = [*CONFIGS.glob("*.yaml"), *(CONFIGS / "data").glob("*.yaml")]
    keys = set()
    for path in files:
        for section, values in yaml.safe_load(content(path)).items():
            if isinstance(values, dict):
                keys |= {f"{section}.{key}" for key in values}
    return keys


@pytest.mark.parametrize("page", PAGES, ids=BY_NAME)
def test_the_keys_that_a_page_names_exist(page):
    sections = {key.partition(".")[0] for key in known_keys()}
    words = re.findall(r"`(\w+\.\w+)(?:=[^`]*)?`", prose(page))
    named = {word for word in words if word.partition(".")[0] in sections}
    assert sorted(named - known_keys()) == []


@pytest.mark.parametrize("page", PAGES, ids=BY_NAME)
def test_the_files_and_modules_that_a_page_names_exist(page):
    words = re.findall(r"`([^`\n]+)`", prose(page))
    paths = [word for word in words if re.fullmatch(r"[\w.-]+/[\w./-]*", word)]
    folders = {path.name for path in ROOT.iterdir()}
    of_ours = [path for path in paths if path.split("/")[0] in folders]
    missing = [path for path in of_ours if not (ROOT / path).exists()]
    assert [path for path in missing if not path.startswith(MADE)] == []
    modules = re.findall(r"python -m ((?:reproduce|results|benchmarks)[\w.]*)", prose(page))
    assert [module for module in modules if find_spec(module) is None] == []


# README's table of experiments


def experiments_table():
    """The cells of README's table of experiments, by experiment."""
    lines = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .partition("| experiment | what |")[2]
        .splitlines()[2:]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {}
    for row in rows:
        if len(row) < 2:
            break
        for name in re.findall(r"`(\w+)`", row[0]):
            table[name] = row
    return table


def test_every_experiment_is_in_readme_with_the_papers_number():
    table = experiments_table()
    assert table.keys() == EXPERIMENTS
    claims = load_claims()
    for name, row in table.items():
        paper = compose(name, []).paper
        numbers = re.findall(r"\d+\.\d+", row[-1])
        if paper is None:
            assert numbers == [], name
        else:
            claim = claims[paper if isinstance(paper, str) else paper[0]]
            assert numbers[0] == f"{claim['value']:.2f}", name


def test_the_papers_with_a_recipe_are_linked():
    text = content("README.md")
    papers = papers_with_recipe(EXPERIMENTS)
    assert {"glow", "realnvp"} <= papers.keys()
    for paper in papers.values():
        assert f"arxiv.org/abs/{paper['arxiv']}" in text
