"""A newcomer's folder, in which the commands of README and docs/ run with few steps.

The folder looks like a clone, with small data in the places that the pages name. Commands run in
this process if possible: `python reproduce/x.py ...` becomes `reproduce.x.main([...])`.
"""

import hashlib
import pickle
import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
from idx_files import make_official
from idx_files import write as write_idx
from PIL import Image

from datamodules import cifar10
from reproduce.config import CONFIGS, compose, override

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPERIMENTS = {path.stem for path in CONFIGS.glob("*.yaml")} - {"base"}

# The settings that make a run quick. They replace those of a page.
FEW_STEPS = [
    *("trainer.accelerator=cpu", "trainer.precision=32-true"),
    *("trainer.val_check_interval=1", "checkpoint.every_n_steps=1", "eval.bn_images=16"),
    *("samples.n=2", "samples.every_n_steps=2", "logger.name=none"),
]
SMALL_FLOWS = {
    "glow": ["flow.depth=1", "flow.hidden_channels=4"],
    "realnvp": ["flow.n_blocks=1", "flow.hidden_channels=4"],
    "realnvp_moons": ["flow.n_couplings=2", "flow.hidden_channels=4"],
    "srflow": [
        *("flow.depth=1", "flow.hidden_channels=4", "flow.encoder_blocks=2", "flow.stacked=[0,1]"),
        *("flow.encoder_channels=4", "flow.encoder_growth=2", "optim.warmup_steps=1"),
    ],
    "rrdb": ["flow.n_blocks=2", "flow.channels=4", "flow.growth=2", "optim.warmup_steps=1"],
    "glow_cifar10_modern": ["optim.warmup_steps=1", "optim.cooldown_steps=1"],
}
SMALL_DATA = {
    "photos": ["data.size=8", "data.n_train=64", "data.n_val=16", "data.n_test=16"],
    "cifar10": ["data.n_val=30"],
    "mnist": ["data.n_val=30"],
    "fashion_mnist": ["data.n_val=30"],
    "super_resolution": ["data.crop=32", "data.epoch_images=32", "metrics.lpips=[]"],
    "two_moons": ["data.n_train=256", "data.n_val=64", "data.n_test=64"],
}
BATCH = "data.batch_size=16"
FEW_IMAGES = {  # keys of commands that are no experiments
    "reproduce.pictures": ["n=2", "n_images=40"],
    "reproduce.sample": ["n=4"],
    "reproduce.upscale": ["samples=1"],
    "reproduce.score": [],
    "reproduce.evaluate": [],
    "reproduce.ood": ["n=12", "sets=[constant,noise]"],
    "reproduce.export": [],
}


class Block(NamedTuple):
    """A fenced block of a page: where it begins, its language, how it is marked, its text.

    mark: `run`, `run: slow`, or an empty text where it is not run.
    """

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


BLOCK = re.compile(r"(?:<!-- (run\b[^>]*?) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    content = page.read_text(encoding="utf-8")
    return [
        Block(page, content[: found.start(3)].count("\n"), found[2], found[1] or "", found[3])
        for found in BLOCK.finditer(content)
    ]


def commands(block: Block) -> list[list[str]]:
    """The commands of a block of shell commands, as words, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line]


def experiment_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The experiment that a command runs, and its key=value words; None for any other command."""
    for number, word in enumerate(words):
        name = word.removeprefix("reproduce/").removesuffix(".py").removeprefix("reproduce.")
        is_script = word in (f"reproduce/{name}.py", f"reproduce.{name}")
        is_job = number > 0 and words[number - 1] == "reproduce/slurm.sh"
        if name in EXPERIMENTS and (is_script or is_job):
            return name, words[number + 1 :]
    return None


def reduced(experiment: str, words: list[str]) -> list[str]:
    """The words of a run with few steps of a small model on few data."""
    data = compose(experiment, [word for word in words if not word.startswith("-")]).data.name
    family = experiment.partition("_")[0]
    flow = SMALL_FLOWS.get(experiment, [])
    if not any(word.startswith("flow.hidden_channels") for word in flow):
        flow = [*SMALL_FLOWS[family], *flow]
    steps = "trainer.max_steps=2"
    if any(word.startswith("trainer.max_steps=") for word in words):  # a longer run
        steps = "trainer.max_steps=3"
    return override(words, [*FEW_STEPS, steps, *flow, BATCH, *SMALL_DATA.get(data, [])])


def run(words: list[str], folder: Path) -> None:
    """Run a command of a page with few steps, in this process; `folder` is the current folder.

    AssertionError: it ends with an exit code other than 0, or it is none that can run here.
    """
    try:
        _run(words, folder)
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"{shlex.join(words)}: {end.code}") from end


def _run(words: list[str], folder: Path) -> None:
    if words[0] == "make":
        for line in recipe(words[1]):
            _run(line, folder)
        return
    experiment = experiment_of(words)
    if experiment is not None:
        name, arguments = experiment
        import_module(f"reproduce.{name}").main(reduced(name, arguments))
        return
    assert words[:2] == ["python", "-m"], f"{shlex.join(words)} cannot run in this process"
    module, *arguments = words[2:]
    if module == "results":
        code = import_module("results.__main__").main(arguments, root=folder / "results")
        assert code == 0, shlex.join(words)
        return
    import_module(module).main(override(arguments, FEW_IMAGES[module]))


def recipe(target: str) -> list[list[str]]:
    """The commands of a target of the Makefile, as if everything were installed."""
    printed = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/installed", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in printed.stdout.splitlines() if not line.startswith("make")]
    return [["python", *shlex.split(line)[1:]] for line in lines]


def furnish(folder: Path, monkeypatch) -> None:
    """Fill a newcomer's folder: a clone's folders, own images, and small data sets under data/."""
    for name in ("reproduce", "configs", "tests"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "results", folder / "results")
    monkeypatch.setattr("results.ROOT", folder / "results")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # of decoded images
    shutil.copy(ROOT / "README.md", folder)
    rng = np.random.default_rng(0)
    write_images(folder / "photos", 60, rng)
    for name in ("cat", "dog"):
        write_images(folder / "pets" / name, 40, rng)
    write_cifar10(folder / "data" / "cifar-10-batches-py", monkeypatch, rng)
    idx_files = make_official(monkeypatch, 100, 40)
    for name in ("mnist", "fashion_mnist"):
        write_idx(folder / "data" / name, idx_files.contents)


def write_images(folder: Path, n: int, rng: np.random.Generator) -> None:
    """Write n images of different sizes and formats, each a colour with some noise."""
    folder.mkdir(parents=True)
    for number in range(n):
        height, width = rng.integers(36, 48, 2)
        colour = rng.integers(30, 200, 3)
        pixels = colour + rng.integers(0, 50, (height, width, 3))
        suffix = ("jpg", "png", "webp")[number % 3]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.{suffix}")


def write_cifar10(folder: Path, monkeypatch, rng: np.random.Generator) -> None:
    """Write the six files of CIFAR-10 with 40 images each, and let them pass for the official."""
    folder.mkdir(parents=True)
    names = {f"data_batch_{number}": cifar10.TRAIN_MD5 for number in range(1, 6)}
    for name, table in (names | {"test_batch": cifar10.TEST_MD5}).items():
        images = rng.integers(0, 256, (40, 3072), dtype=np.uint8)
        batch = {b"data": images, b"labels": rng.integers(0, 10, 40).tolist()}
        content = pickle.dumps(batch)
        (folder / name).write_bytes(content)
        monkeypatch.setitem(table, name, hashlib.md5(content).hexdigest())
