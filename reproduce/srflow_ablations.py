"""SRFlow's ablations (Lugmayr et al. 2020) as runs: fewer steps, more channels, and no parts.

python -m reproduce.srflow_ablations            # DIV2K, the paper's model, one seed: 7 runs
python -m reproduce.srflow_ablations experiment=srflow_bsds_x4 preset=cpu seeds=0,1,2 \
  flow.encoder_checkpoint=outputs/rrdb_bsds_x4/RUN

rows:
  full            the recipe's flow
  steps12, steps8, steps4
                  12, 8 and 4 of 16 conditional steps a level; of a preset with 4 steps 3, 2 and 1
  channels196     196 instead of 64 channels in the networks; of another width as many times more
  no_transition   without the steps after a squeeze that have no coupling
  no_injector     without affine injectors

rows=[full,no_injector] trains some of them. Further key=value arguments go to every run. The runs
and ablations.json lie in out=FOLDER, by default outputs/srflow_ablations/<experiment>-<preset, or
paper>. The same command, repeated, continues a run that was stopped and trains the missing ones. A
run that diverges has no figures, and the others are still trained. Bicubic interpolation, which the
models have to be above, is measured by python -m reproduce.bicubic.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: take the packages beside this script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
from typing import Any

from omegaconf import DictConfig

from datamodules.checks import expand_home
from reproduce.arguments import parse_seeds, settings
from reproduce.command import command
from reproduce.config import ConfigError, arguments, compose, nearest, parse
from reproduce.figure3 import check_one_process, outcome, repeatable, train
from reproduce.streams import say
from results import is_number
from results.blocks import Table, markdown
from results.files import portable, write
from results.runs import read_json

NAME = "srflow_ablations"
EXPERIMENTS = tuple(f"srflow_{data}" for data in ("div2k_x4", "div2k_x8", "bsds_x4", "photos_x4"))
STEPS = 16  # of the paper's model
CHANNELS = 64
SHARES = {"steps12": 12 / STEPS, "steps8": 8 / STEPS, "steps4": 4 / STEPS}
ROWS = ("full", *SHARES, "channels196", "no_transition", "no_injector")
METRICS = {  # shown with so many decimals
    "test/bpd_noisy": 3,
    "test/psnr": 2,
    "test/ssim": 3,
    "test/lpips": 3,
    "test/lr_psnr": 2,
    "test/diversity": 2,
}
RECORDED = ("seed", "images", "seconds", "commit", "dirty", "device", "precision", "parameters")
OWN = {  # keys that this command decides, and what to give in their place
    "seed": "give seeds=[...]",
    "run_dir": "give out=FOLDER",
    "resume": "runs always continue from their checkpoints",
    "flow.depth": "it is what is compared",
    "flow.hidden_channels": "it is what is compared",
    "flow.transition_depth": "it is what is compared",
    "flow.injector": "it is what is compared",
}


def words_of(row: str, config: DictConfig) -> list[str]:
    """The key=value arguments of a row. config: the recipe of the row `full`."""
    flow = config.flow
    if row in SHARES:
        return [f"flow.depth={max(1, round(SHARES[row] * flow.depth))}"]
    words = {
        "full": [],
        "channels196": [f"flow.hidden_channels={round(196 / CHANNELS * flow.hidden_channels)}"],
        "no_transition": ["flow.transition_depth=0"],
        "no_injector": ["flow.injector=false"],
    }
    return words[row]


class Options:
    """The arguments of the command: its own, and the overrides of every run.

    ConfigError: a key is one of OWN or comes twice, or there is no such row or experiment.
    """

    def __init__(self, words: list[str]) -> None:
        self.experiment = EXPERIMENTS[0]
        self.rows: list[str] = list(ROWS)
        self.seeds = [0]
        self.overrides: list[str] = []
        out = None
        for key, value in parse(words).items():
            if key in OWN:
                raise ConfigError(f"{key} is not to be given here: {OWN[key]}")
            if key == "experiment":
                self.experiment = value
            elif key == "rows":
                self.rows = value.strip("[]").replace(" ", "").split(",")
            elif key == "seeds":
                self.seeds = parse_seeds(value)
            elif key == "out":
                out = expand_home("out", value)
            else:
                self.overrides.append(f"{key}={value}")
        check_names("experiment", [self.experiment], EXPERIMENTS)
        check_names("rows", self.rows, ROWS)
        self.config = compose(self.experiment, self.overrides)
        preset = self.config.preset or "paper"
        self.root = out or Path("outputs", NAME, f"{self.experiment}-{preset}")


def check_names(key: str, names: list[str], known: tuple[str, ...]) -> None:
    """ConfigError: a name is not known."""
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{key}={name} is not known{nearest(name, known)}: give {', '.join(known)}"
            )


@command
def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Train the missing runs, print the table after each; return the content of the file."""
    words = arguments(argv)
    if {"--help", "-h"} & set(words):
        say((__doc__ or "").strip())
        return None
    options = Options(words)
    check_one_process(options.config)
    runs = [(row, seed) for seed in options.seeds for row in options.rows]
    for row, seed in runs:
        check_settings(options, folder_of(options, row, seed))
    with repeatable(words, NAME):
        for number, (row, seed) in enumerate(runs, 1):
            folder = folder_of(options, row, seed)
            if outcome(folder):
                continue
            say(f"\nrun {number} of {len(runs)}: {folder}")
            own = [*words_of(row, options.config), f"seed={seed}"]
            train([*options.overrides, *own], folder, options.experiment)
            conclude(options)
        return conclude(options)


def folder_of(options: Options, row: str, seed: int) -> Path:
    return options.root / f"{row}-seed{seed}"


def check_settings(options: Options, folder: Path) -> None:
    """ConfigError, one line: an ended run had other settings than the new ones."""
    path = outcome(folder)
    if path is None:
        return
    result = read_json(path)
    own = settings(options.overrides, OWN)
    used = settings(result.get("overrides", []), OWN)
    if result["experiment"] != options.experiment or own != used:
        given = " ".join(f"{key}={value}" for key, value in used.items())
        raise ConfigError(
            f"{folder} is of {result['experiment']} with {given or 'no other settings'}: say the "
            "same, or give another out=FOLDER"
        )


def conclude(options: Options) -> dict[str, Any]:
    """Write ablations.json for all ended runs, and print their table."""
    runs = []
    for row in ROWS:
        for folder in sorted(options.root.glob(f"{row}-seed*")):
            path = outcome(folder)
            if path is not None:
                runs.append(entry(row, read_json(path)))
    content = portable(
        {"experiment": options.experiment, "overrides": options.overrides, "runs": runs}
    )
    path = options.root / "ablations.json"
    write(path, f"{json.dumps(content, indent=1)}\n")
    say("", *markdown([table(runs)])[:-1], path)
    return content


def entry(row: str, result: dict[str, Any]) -> dict[str, Any]:
    """The entry of an ended run in ablations.json."""
    flow = result["config"]["flow"]
    kept = {key: result.get(key) for key in RECORDED}
    figures = {metric: result["metrics"].get(metric) for metric in METRICS}
    return {"row": row, **kept, "flow": flow, "metrics": figures}


def table(runs: list[dict[str, Any]]) -> Table:
    """The figures of all runs, in the order of ROWS."""
    heads = ["row", "seed", "parameters", *(metric.partition("/")[2] for metric in METRICS)]
    rows = []
    for run in runs:
        figures = [shown(run["metrics"][metric], decimals) for metric, decimals in METRICS.items()]
        rows.append([run["row"], str(run["seed"]), f"{run['parameters']:,}", *figures])
    return Table(heads, rows)


def shown(value: object, decimals: int) -> str:
    """A figure with some decimals; a dash for one that was not measured.

    >>> shown(27.0911, 2), shown(None, 2)
    ('27.09', '-')
    """
    if isinstance(value, float | int) and is_number(value):
        return f"{value:.{decimals}f}"
    return "-"


if __name__ == "__main__":
    main()
