"""Glow's ablation (Kingma & Dhariwal 2018, Figure 3): {reverse, shuffle, invertible 1x1} x {additive, affine}, as runs.

python -m reproduce.figure3                                     # CIFAR-10, the paper's model, three seeds: 18 runs
python -m reproduce.figure3 preset=cpu seeds=0                  # a smaller model for two cores, one seed

Further key=value arguments go to every run, as in reproduce/glow_cifar10.py. The runs, figure3.json and figure3.png lie
in out=FOLDER, by default outputs/figure3/<preset, or paper>. Seeds are the outermost loop. The same command, repeated,
runs what is not finished and goes on where it was stopped; other seeds join those that are there. A run that diverges
counts as not finite, and the others go on: delete its diverged.json to try again. One process: where there are several
GPUs give each its seeds.
"""

import sys

sys.path.insert(0, sys.path[0].removesuffix("reproduce"))  # this clone's code, not an install's

import contextlib
import io
import shlex
import statistics
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch
from omegaconf import DictConfig

from lightning_modules.stopping import TRY_AGAIN
from reproduce.arguments import parse_seeds, settings
from reproduce.command import command
from reproduce.config import ConfigError, arguments, compose
from reproduce.launch import processes
from reproduce.run_folder import DIVERGED
from results import figure3, is_number
from results.figure3 import COUPLINGS, NAME, PERMUTATIONS
from results.files import write
from results.runs import read_curve, read_json

EXPERIMENT = "glow_cifar10"
SEEDS = (0, 1, 2)  # three, as the paper
OWN = {  # keys that this command decides, and what to give in their place
    "flow.permutation": "it is what is compared",
    "flow.coupling": "it is what is compared",
    "seed": "give seeds=[...]",
    "run_dir": "give out=FOLDER",
    "resume": "runs always go on from their checkpoints",
}


@command
def main(argv: list[str] | None = None) -> dict | None:
    """All runs that are missing, the table after each; returns the content of figure3.json."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        print(__doc__.strip())
        return None
    seeds, out, overrides = split(words)
    config = compose(
        EXPERIMENT, [*overrides, *run_arguments(PERMUTATIONS[0], COUPLINGS[0], seeds[0])]
    )
    check_one_process(config)
    root = Path(out or Path("outputs", NAME, config.preset or "paper"))
    check_settings(root, overrides)
    todo = [(p, c, seed) for seed in seeds for c in COUPLINGS for p in PERMUTATIONS]
    folders = {run: root / f"{run[0]}-{run[1]}-seed{run[2]}" for run in todo}
    written = None
    with repeatable(words):
        for n, (run, folder) in enumerate(folders.items(), 1):
            if outcome(folder):
                continue
            print(f"\nrun {n} of {len(todo)}: {folder}", flush=True)
            train([*overrides, *run_arguments(*run)], folder)
            written = conclude(root, overrides)
        return written or conclude(root, overrides)


def run_arguments(permutation: str, coupling: str, seed: int) -> list[str]:
    """What one run has of its own."""
    return [f"flow.permutation={permutation}", f"flow.coupling={coupling}", f"seed={seed}"]


def split(words: list[str]) -> tuple[list[int], str | None, list[str]]:
    """The arguments as seeds, `out` and what every run is given. ConfigError: not seeds, or a key of OWN."""
    seeds, out, overrides = list(SEEDS), None, []
    for word in words:
        key, _, value = word.partition("=")
        if key in OWN:
            raise ConfigError(f"{key} is not to be given here: {OWN[key]}")
        if key == "seeds":
            seeds = parse_seeds(value)
        elif key == "out":
            out = value
        else:
            overrides.append(word)
    return seeds, out, overrides


def check_one_process(config: DictConfig) -> None:
    """ConfigError where a run would have several processes: each of them would repeat this whole command."""
    trainer = {
        "devices": config.trainer.devices,
        "num_nodes": config.trainer.num_nodes,
    } | processes()
    on_cpu = config.trainer.accelerator == "cpu"
    one = 1 if on_cpu or torch.cuda.device_count() < 2 else None
    devices = one if trainer["devices"] in ("auto", -1, "-1") else trainer["devices"]
    if (devices, trainer["num_nodes"]) != (1, 1):
        raise ConfigError(
            f"the ablation is one process, not trainer.devices={trainer['devices']} on {trainer['num_nodes']} nodes: "
            "give trainer.devices=1, and each GPU (CUDA_VISIBLE_DEVICES) seeds of its own"
        )


def check_settings(root: Path, overrides: list[str]) -> None:
    """ConfigError, one line, where finished runs in `root` had other settings: they would be compared with these."""
    wanted = settings(overrides, OWN)
    for folder in finished(root):
        result = read_json(outcome(folder))
        used = settings(result.get("overrides", []), OWN)
        if result["experiment"] != EXPERIMENT:
            raise ConfigError(
                f"{folder} is of {result['experiment']}, not of {EXPERIMENT}: give another out=FOLDER"
            )
        keys = [key for key in sorted(wanted | used) if wanted.get(key) != used.get(key)]
        if keys:
            old, new = (
                " ".join(f"{k}={d[k]}" if k in d else f"no {k}" for k in keys)
                for d in (used, wanted)
            )
            raise ConfigError(
                f"{folder} was run with {old}, not with {new}: say the same, or give another out=FOLDER"
            )


def train(words: list[str], folder: Path) -> None:
    """One run in this process. That it diverged is a result too."""
    try:
        import_module(f"reproduce.{EXPERIMENT}").main([*words, f"run_dir={folder}", "resume=auto"])
    except SystemExit as end:
        if (folder / DIVERGED).is_file():
            print(
                f"{end.code}\n{folder} has no number, the other runs go on",
                file=sys.stderr,
                flush=True,
            )
        elif end.code:  # else it had been finished
            raise


@contextlib.contextmanager
def repeatable(words: list[str]) -> Iterator[None]:
    """Where the command was stopped, in a run or between two, say how to go on, and end with exit code 75."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as end:
        code = getattr(
            end, "code", None
        )  # of a run: 75, or the line of one that was interrupted twice
        if code not in (None, TRY_AGAIN) and not str(code).startswith("stopped"):
            raise
        if isinstance(code, str):
            print(code, file=sys.stderr)
        again = shlex.join(["python", "-m", f"reproduce.{NAME}", *words])
        print(f"the ablation goes on with: {again}", file=sys.stderr, flush=True)
        sys.exit(TRY_AGAIN)


def finished(root: Path) -> list[Path]:
    """The folders of runs with an outcome, of whatever seeds, in the order of the table."""
    patterns = [
        f"{permutation}-{coupling}-seed*" for coupling in COUPLINGS for permutation in PERMUTATIONS
    ]
    return [
        folder for pattern in patterns for folder in sorted(root.glob(pattern)) if outcome(folder)
    ]


def outcome(folder: Path) -> Path | None:
    """The file that says what a run came to: result.json, or diverged.json; None as long as it has not ended."""
    return next(
        (path for name in ("result.json", DIVERGED) if (path := folder / name).is_file()), None
    )


def entry(folder: Path) -> dict:
    """A finished run as figure3.json has it. curve: rows [images, seconds, val/bpd or None], from step 0 on."""
    result, curve = read_json(outcome(folder)), read_curve(folder / "curve.csv")
    flow = result["config"]["flow"]
    validated = [row["val/bpd"] for row in curve[1:] if is_number(row.get("val/bpd"))]
    kept = (
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
    return {key: result.get(key) for key in kept} | {
        "permutation": flow["permutation"],
        "coupling": flow["coupling"],
        "test/bpd": result["metrics"].get("test/bpd"),
        "val/bpd": min(validated, default=None),
        "curve": [[row["images"], row["seconds"], row.get("val/bpd")] for row in curve],
    }


def conclude(root: Path, overrides: list[str]) -> dict:
    """Write figure3.json and figure3.png over all that is finished in `root`, print the table."""
    folders = finished(root)
    runs = [entry(folder) for folder in folders]
    config = dict(read_json(outcome(folders[0]))["config"])
    config["flow"] = {
        key: value for key, value in config["flow"].items() if f"flow.{key}" not in OWN
    }
    shared = {key: value for key, value in config.items() if key not in (*OWN, "overrides")}
    content = {
        "experiment": EXPERIMENT,
        "ablation": NAME,
        "name": root.resolve().name,
        "overrides": overrides,
        "config": shared,
        "runs": runs,
    }
    write(root / f"{NAME}.json", figure3.dump(content))
    write(root / f"{NAME}.png", draw(runs))
    print(
        f"\n{figure3.report(runs)}\n\n{root / f'{NAME}.json'}\n{root / f'{NAME}.png'}", flush=True
    )
    return content


def curves(runs: list[dict]) -> dict[int, list[float]]:
    """val/bpd of all seeds by images seen, where every seed has a finite one."""
    each = [
        {images: value for images, _, value in run["curve"] if is_number(value)} for run in runs
    ]
    shared = set.intersection(*(set(points) for points in each)) if each else set()
    return {images: [points[images] for points in each] for images in sorted(shared)}


def draw(runs: list[dict]) -> bytes:
    """The paper's figure as PNG: a panel a coupling, a colour a permutation, mean over seeds and from least to most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels, shown = figure.subplots(1, 2, sharey=True), []
    for axes, coupling in zip(panels, COUPLINGS, strict=True):
        for k, permutation in enumerate(PERMUTATIONS):
            points = curves(list(figure3.seeds_of(runs, permutation, coupling).values()))
            means = [statistics.fmean(values) for values in points.values()]
            low, high = (
                [min(values) for values in points.values()],
                [max(values) for values in points.values()],
            )
            axes.plot(list(points), means, color=f"C{k}", label=permutation, marker=".")
            axes.fill_between(list(points), low, high, color=f"C{k}", alpha=0.2, linewidth=0)
            shown += [value for images, values in points.items() if images > 0 for value in values]
        axes.set(title=coupling, xlabel="training images seen")
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=5)  # with more their numbers touch
    if shown:  # not the value before training, which would flatten the rest
        low, high = min(shown), max(shown)
        panels[0].set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.1 * (high - low) + 0.01)
    panels[0].set_ylabel("val/bpd")
    panels[1].legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


if __name__ == "__main__":
    main()
