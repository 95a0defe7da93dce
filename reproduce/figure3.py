"""Glow's ablation (Kingma & Dhariwal 2018, Figure 3) as runs: three permutations x two couplings.

python -m reproduce.figure3                     # CIFAR-10, the paper's model, three seeds: 18 runs
python -m reproduce.figure3 preset=cpu seeds=0  # a smaller model for two cores, one seed

The permutations are reverse, shuffle and invertible 1x1, the couplings additive and affine. Further
key=value arguments go to every run, as in reproduce/glow_cifar10.py. The runs, figure3.json and
figure3.png lie in out=FOLDER, by default outputs/figure3/<preset, or paper>. All combinations of
one seed are run before the next seed.

The same command, repeated, continues a run that was stopped and trains the missing ones. With other
seeds it adds runs to those in the folder. A run that diverges is listed as not finite, and the
others are still trained; delete its diverged.json to try it again. The ablation is one process: on
several GPUs, start one ablation on each, with different seeds.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib
import io
import shlex
import statistics
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from datamodules.checks import expand_home
from lightning_modules.stopping import TRY_AGAIN
from reproduce.arguments import parse_seeds, settings
from reproduce.command import command
from reproduce.config import ConfigError, arguments, compose, parse
from reproduce.launch import processes
from reproduce.run_folder import DIVERGED
from reproduce.streams import say
from results import figure3, is_number
from results.figure3 import COUPLINGS, NAME, PERMUTATIONS
from results.files import write
from results.runs import read_curve, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXPERIMENT = "glow_cifar10"
SEEDS = (0, 1, 2)  # three, as in the paper
OWN = {  # keys that this command decides, and what to give in their place
    "flow.permutation": "it is what is compared",
    "flow.coupling": "it is what is compared",
    "seed": "give seeds=[...]",
    "run_dir": "give out=FOLDER",
    "resume": "runs always continue from their checkpoints",
}
RECORDED = (  # keys of a run's result that figure3.json keeps
    "seed",
    "images",
    "seconds",
    "skipped_steps",
    "commit",
    "dirty",
    "device",
    "precision",
    "parameters",
)


@command
def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Train the missing runs, print the table after each; return the content of figure3.json."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return None
    seeds, out, overrides = split(words)
    first = run_arguments(PERMUTATIONS[0], COUPLINGS[0], seeds[0])
    config = compose(EXPERIMENT, [*overrides, *first])
    check_one_process(config)
    root = out or Path("outputs", NAME, config.preset or "paper")
    check_settings(root, overrides)
    runs = [(p, c, seed) for seed in seeds for c in COUPLINGS for p in PERMUTATIONS]
    written = None
    with repeatable(words):
        for number, (permutation, coupling, seed) in enumerate(runs, 1):
            folder = root / f"{permutation}-{coupling}-seed{seed}"
            if outcome(folder):
                continue
            say(f"\nrun {number} of {len(runs)}: {folder}")
            train([*overrides, *run_arguments(permutation, coupling, seed)], folder)
            written = conclude(root, overrides)
        return written or conclude(root, overrides)


def run_arguments(permutation: str, coupling: str, seed: int) -> list[str]:
    """The key=value arguments in which one run differs from the others."""
    return [f"flow.permutation={permutation}", f"flow.coupling={coupling}", f"seed={seed}"]


def split(words: list[str]) -> tuple[list[int], Path | None, list[str]]:
    """Split the arguments into the seeds, the folder `out`, and the overrides of every run.

    ConfigError: `seeds` is no list of seeds, a key is one of OWN, or a key comes twice.
    """
    seeds = list(SEEDS)
    out = None
    overrides = []
    for key, value in parse(words).items():
        if key in OWN:
            raise ConfigError(f"{key} is not to be given here: {OWN[key]}")
        if key == "seeds":
            seeds = parse_seeds(value)
        elif key == "out":
            out = expand_home("out", value)
        else:
            overrides.append(f"{key}={value}")
    return seeds, out, overrides


def check_one_process(config: DictConfig) -> None:
    """ConfigError: a run would have several processes, each of which would repeat this command."""
    started = {"devices": config.trainer.devices, "num_nodes": config.trainer.num_nodes}
    started |= processes()
    devices = started["devices"]
    is_one_device = devices == 1
    if devices in ("auto", -1):  # all devices of this machine
        is_one_device = config.trainer.accelerator == "cpu" or torch.cuda.device_count() < 2
    if not is_one_device or started["num_nodes"] != 1:
        raise ConfigError(
            f"the ablation is one process, not trainer.devices={started['devices']} on "
            f"{started['num_nodes']} nodes: give trainer.devices=1, and each GPU "
            "(CUDA_VISIBLE_DEVICES) seeds of its own"
        )


def check_settings(root: Path, overrides: list[str]) -> None:
    """ConfigError, one line: a finished run in `root` had other settings than the new ones."""
    own = settings(overrides, OWN)
    for folder, path in finished(root):
        result = read_json(path)
        used = settings(result.get("overrides", []), OWN)
        if result["experiment"] != EXPERIMENT:
            raise ConfigError(
                f"{folder} is of {result['experiment']}, not of {EXPERIMENT}: "
                "give another out=FOLDER"
            )
        keys = [key for key in sorted(own | used) if own.get(key) != used.get(key)]
        if keys:
            raise ConfigError(
                f"{folder} was run with {_listed(used, keys)}, not with {_listed(own, keys)}: "
                "say the same, or give another out=FOLDER"
            )


def _listed(values: dict[str, object], keys: list[str]) -> str:
    """'a=1 no b': keys with their values, and with `no` the keys that a command line lacks."""
    words = []
    for key in keys:
        words.append(f"{key}={values[key]}" if key in values else f"no {key}")
    return " ".join(words)


def train(words: list[str], folder: Path, experiment: str = EXPERIMENT) -> None:
    """Train one run in this process. A run that diverges is a result too, and raises nothing."""
    script = import_module(f"reproduce.{experiment}")
    try:
        script.main([*words, f"run_dir={folder}", "resume=auto"])
    except SystemExit as end:
        if (folder / DIVERGED).is_file():
            line = f"{end.code}\n{folder} has diverged; the other runs continue"
            print(line, file=sys.stderr, flush=True)
        elif end.code:  # code 0: the run had been finished before
            raise


@contextlib.contextmanager
def repeatable(words: list[str], name: str = NAME) -> Iterator[None]:
    """If this block is stopped, in a run or between two, say how to continue; exit code 75.

    name: of the command, a module of reproduce/.
    """
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as end:
        # A run that was stopped has code 75; one that was interrupted twice has a line for it.
        code = getattr(end, "code", None)
        if code not in (None, TRY_AGAIN) and not str(code).startswith("stopped"):
            raise
        if isinstance(code, str):
            print(code, file=sys.stderr)
        again = shlex.join(["python", "-m", f"reproduce.{name}", *words])
        print(f"continue the ablation with: {again}", file=sys.stderr, flush=True)
        sys.exit(TRY_AGAIN)


def finished(root: Path) -> Iterator[tuple[Path, Path]]:
    """The folders of all ended runs, each with its `outcome`, in the order of the table."""
    for coupling in COUPLINGS:
        for permutation in PERMUTATIONS:
            for folder in sorted(root.glob(f"{permutation}-{coupling}-seed*")):
                path = outcome(folder)
                if path is not None:
                    yield folder, path


def outcome(folder: Path) -> Path | None:
    """The file with a run's outcome, result.json or diverged.json; None if it has not ended."""
    for name in ("result.json", DIVERGED):
        if (folder / name).is_file():
            return folder / name
    return None


def entry(folder: Path, path: Path) -> dict[str, Any]:
    """The entry of an ended run in figure3.json.

    Its `curve` has rows [images, seconds, val/bpd or None], from step 0 on.
    """
    result = read_json(path)
    curve = read_curve(folder / "curve.csv")
    flow = result["config"]["flow"]
    validated = [row["val/bpd"] for row in curve[1:] if is_number(row.get("val/bpd"))]
    return {key: result.get(key) for key in RECORDED} | {
        "permutation": flow["permutation"],
        "coupling": flow["coupling"],
        "test/bpd": result["metrics"].get("test/bpd"),
        "val/bpd": min(validated, default=None),
        "curve": [[row["images"], row["seconds"], row.get("val/bpd")] for row in curve],
    }


def conclude(root: Path, overrides: list[str]) -> dict[str, Any]:
    """Write figure3.json and figure3.png for all ended runs in `root`, and print the table."""
    ended = list(finished(root))
    runs = [entry(folder, path) for folder, path in ended]
    _, first = ended[0]
    config = dict(read_json(first)["config"])
    flow = config["flow"]
    config["flow"] = {key: value for key, value in flow.items() if f"flow.{key}" not in OWN}
    content = {
        "experiment": EXPERIMENT,
        "ablation": NAME,
        "name": root.resolve().name,
        "overrides": overrides,
        "config": {key: config[key] for key in config if key not in (*OWN, "overrides")},
        "runs": runs,
    }
    table = root / f"{NAME}.json"
    figure = root / f"{NAME}.png"
    write(table, figure3.dump(content))
    write(figure, draw(runs))
    say(f"\n{figure3.report(runs)}\n", table, figure)
    return content


def curves(runs: list[dict[str, Any]]) -> dict[int, list[float]]:
    """val/bpd of all seeds by images seen, at the points where all seeds have a finite value."""
    each = []
    for run in runs:
        each.append({images: value for images, _, value in run["curve"] if is_number(value)})
    if not each:
        return {}
    shared = set.intersection(*(set(points) for points in each))
    return {images: [points[images] for points in each] for images in sorted(shared)}


def draw(runs: list[dict[str, Any]]) -> bytes:
    """The paper's figure as PNG: a panel for each coupling, a colour for each permutation.

    A line is the mean over seeds, the band around it reaches from the least to the greatest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    shown: list[float] = []
    for axes, coupling in zip(panels, COUPLINGS, strict=True):
        shown += _draw_panel(axes, runs, coupling)
    if shown:
        least = min(shown)
        height = max(shown) - least
        panels[0].set_ylim(least - 0.05 * height - 0.01, least + 1.1 * height + 0.01)
    panels[0].set_ylabel("val/bpd")
    panels[1].legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _draw_panel(axes: "Axes", runs: list[dict[str, Any]], coupling: str) -> list[float]:
    """Draw one coupling; return its values for the limits of the axis.

    The values before training are left out, since they would flatten the rest.
    """
    shown: list[float] = []
    for number, permutation in enumerate(PERMUTATIONS):
        points = curves(list(figure3.seeds_of(runs, permutation, coupling).values()))
        images = list(points)
        colour = f"C{number}"
        means = [statistics.fmean(values) for values in points.values()]
        low = [min(values) for values in points.values()]
        high = [max(values) for values in points.values()]
        axes.plot(images, means, color=colour, label=permutation, marker=".")
        axes.fill_between(images, low, high, color=colour, alpha=0.2, linewidth=0)
        for seen, values in points.items():
            if seen > 0:
                shown += values
    axes.set(title=coupling, xlabel="training images seen")
    axes.grid(alpha=0.3)
    axes.locator_params(axis="x", nbins=5)  # the labels of more ticks would touch
    return shown


if __name__ == "__main__":
    main()
