"""Glow's Figure 3, {reverse, shuffle, invertible 1x1} x {additive, affine}: the table, and whether the order is found.

`reproduce/figure3.py` makes the runs; here are the numbers and the words, without torch, for the page too.
"""

import json
import math
import re
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results import ROOT, is_number
from results.files import checked_json, lacking, portable, small_png, write

NAME = "figure3"
PERMUTATIONS = ("reverse", "shuffle", "invertible")  # worst first, as the paper has it
COUPLINGS = ("additive", "affine")
COLUMNS = ("permutation", "coupling", "seeds", "test/bpd")
ORDER = (
    ("invertible", "shuffle"),
    ("shuffle", "reverse"),
    ("invertible", "reverse"),
)  # the first has the lower bpd
AGREES, DISAGREES, NOISE, NOTHING = "agrees", "disagrees", "within noise", "no seed in common"

REQUIRED = [
    "experiment",
    "ablation",
    "name",
    "overrides",
    "config",
    "runs",
]  # what a figure3.json holds at least
RUN = [  # and each of its runs
    *(
        "permutation",
        "coupling",
        "seed",
        "test/bpd",
        "val/bpd",
        "images",
        "seconds",
        "skipped_steps",
    ),
    *("commit", "dirty", "device", "precision", "parameters", "curve"),
]

# Numbers


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean and its standard error; no error of one value. ValueError: no values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def seeds_of(runs: list[dict], permutation: str, coupling: str) -> dict[int, dict]:
    """The runs of one combination by seed."""
    by_seed = {
        run["seed"]: run
        for run in runs
        if (run["permutation"], run["coupling"]) == (permutation, coupling)
    }
    return dict(sorted(by_seed.items()))


def name(run: dict) -> str:
    """`<permutation>-<coupling>-seed<seed>`: what a run's folder is called."""
    return f"{run['permutation']}-{run['coupling']}-seed{run['seed']}"


def missing(runs: list[dict]) -> list[str]:
    """The combinations that no run has, as `<permutation>-<coupling>`."""
    return [f"{p}-{c}" for c in COUPLINGS for p in PERMUTATIONS if not seeds_of(runs, p, c)]


def claims() -> Iterator[tuple[str, tuple[str, str], tuple[str, str]]]:
    """What the figure shows, pair by pair: a label, the combination with the lower bpd, the one with the higher."""
    for coupling in COUPLINGS:
        for low, high in ORDER:
            yield f"{coupling}: {low} < {high}", (low, coupling), (high, coupling)
    for permutation in PERMUTATIONS:
        yield (
            f"{permutation}: affine < additive",
            (permutation, "affine"),
            (permutation, "additive"),
        )


def verdict(differences: list[float]) -> dict[str, Any]:
    """Whether differences (low minus high, one a seed) say what the paper says.

    Returns:
        n, mean and its standard error (None where there are too few), and word: `within noise` where a t-test at 5 %
        (two-sided) finds nothing, and with one seed; else `agrees` where the mean is negative, `disagrees` where it is
        positive.
    """
    if not differences:
        return {"n": 0, "mean": None, "error": None, "word": NOTHING}
    mean, error = mean_and_error(differences)
    noise = error is None or mean == 0 or abs(mean) < t_quantile(len(differences) - 1) * error
    return {
        "n": len(differences), "mean": mean, "error": error,
        "word": NOISE if noise else AGREES if mean < 0 else DISAGREES,
    }  # fmt: skip


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: with three seeds (2 degrees of freedom) twice the normal's."""
    return {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}.get(
        freedom, 2.23
    )


def verdicts(runs: list[dict]) -> list[dict[str, Any]]:
    """A `verdict` with its `label` for each pair, over the seeds that both have with a finite test/bpd."""
    each = []
    for label, low, high in claims():
        lows, highs = seeds_of(runs, *low), seeds_of(runs, *high)
        pairs = [
            (lows[seed]["test/bpd"], highs[seed]["test/bpd"]) for seed in lows if seed in highs
        ]
        each.append(
            {"label": label} | verdict([a - b for a, b in pairs if is_number(a) and is_number(b)])
        )
    return each


# Words


def rows(runs: list[dict]) -> list[list[str]]:
    """The cells of COLUMNS for each combination with a run."""
    table = []
    for coupling in COUPLINGS:
        for permutation in PERMUTATIONS:
            if not (by_seed := seeds_of(runs, permutation, coupling)):
                continue
            values = [run["test/bpd"] for run in by_seed.values() if is_number(run["test/bpd"])]
            bpd = plus_minus(*mean_and_error(values)) if values else "-"
            bpd += (
                f" ({len(by_seed) - len(values)} not finite)" if len(values) < len(by_seed) else ""
            )
            seeds = ", ".join(str(seed) for seed in by_seed)
            table.append([permutation, coupling, seeds, bpd])
    return table


def plus_minus(mean: float, error: float | None, form: str = ".4f") -> str:
    """`3.5120 ± 0.0040`; without an error the mean alone."""
    return format(mean, form) + ("" if error is None else f" ± {error:.4f}")


def verdict_line(pair: dict) -> str:
    """`additive: invertible < shuffle: -0.0120 ± 0.0030 over 3 seeds: agrees`."""
    if pair["mean"] is None:
        return f"{pair['label']}: {pair['word']}"
    seeds = "1 seed" if pair["n"] == 1 else f"{pair['n']} seeds"
    return f"{pair['label']}: {plus_minus(pair['mean'], pair['error'], '+.4f')} over {seeds}: {pair['word']}"


def summary(pairs: list[dict]) -> str:
    """One line: whether the order is the paper's, and how many pairs say so."""
    agree, disagree, noise, nothing = (
        [pair["word"] for pair in pairs].count(word) for word in (AGREES, DISAGREES, NOISE, NOTHING)
    )
    answer = (
        "disagrees with the paper's" if disagree
        else "agrees with the paper's" if agree == len(pairs)
        else "does not contradict the paper's" if agree
        else "is not decided"
    )  # fmt: skip
    counts = f"{agree} of {len(pairs)} pairs agree, {disagree} disagree, {noise} within noise"
    counts += f", {nothing} without a seed in common" if nothing else ""
    return f"The order {answer} (1x1 < shuffle < reverse, affine < additive): {counts}"


def report(runs: list[dict]) -> str:
    """The table, the pairs and the last line, for a terminal."""
    table = [list(COLUMNS), *rows(runs)]
    widths = [max(len(row[k]) for row in table) for k in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    pairs = verdicts(runs)
    return "\n".join(
        [lines[0], "-" * len(lines[0]), *lines[1:], "", *map(verdict_line, pairs), summary(pairs)]
    )


def command(ablation: dict) -> str:
    """The shell line that repeats it."""
    seeds = ",".join(str(seed) for seed in sorted({run["seed"] for run in ablation["runs"]}))
    return shlex.join(
        [
            "python",
            "-m",
            f"reproduce.{ablation['ablation']}",
            f"seeds=[{seeds}]",
            *ablation["overrides"],
        ]
    )


# Files


def dump(ablation: dict) -> str:
    """The content of a figure3.json, without absolute paths; numbers that are not finite become null."""
    return json.dumps(portable(ablation), indent=1, allow_nan=False) + "\n"


def read(path: Path) -> dict:
    """A figure3.json. ValueError, one line that names the file and what is wrong with it."""
    return checked_json(
        path,
        faults,
        damaged="is not valid JSON ({problem}): restore it, or repeat the ablation",
        unusable="lacks a usable {problem}: edited, or of another version? Repeat the ablation",
    )


def faults(ablation: Any) -> list[str]:
    """The keys that a figure3.json lacks, or whose value cannot be what it should."""
    if keys := lacking(ablation, REQUIRED):
        return keys
    kinds = {"overrides": list, "config": dict, "runs": list}
    keys = [key for key, kind in kinds.items() if not isinstance(ablation[key], kind)]
    keys += [key for key in REQUIRED[:3] if not re.fullmatch(r"\w[\w.+-]*", str(ablation[key]))]
    if keys:
        return keys
    return [f"runs[{k}].{key}" for k, run in enumerate(ablation["runs"]) for key in run_faults(run)]


def run_faults(run: Any) -> list[str]:
    """The keys that one of the runs lacks, or whose value cannot be what it should."""
    if keys := lacking(run, RUN):
        return keys
    keys = [
        key
        for key in ("images", "seconds", "seed", "skipped_steps", "parameters")
        if not is_number(run[key])
    ]
    keys += [] if run["permutation"] in PERMUTATIONS else ["permutation"]
    keys += [] if run["coupling"] in COUPLINGS else ["coupling"]
    curve = run["curve"] if isinstance(run["curve"], list) else [None]
    points = [
        isinstance(row, list) and len(row) == 3 and is_number(row[0]) and is_number(row[1])
        for row in curve
    ]
    return keys + ([] if all(points) else ["curve"])


def read_all(root: Path = ROOT) -> dict[str, dict]:
    """Every recorded ablation by its stem. ValueError when one cannot be read."""
    return {path.stem: read(path) for path in sorted((Path(root) / "ablations").glob("*.json"))}


def add(folder: str | Path, root: Path = ROOT) -> list[str]:
    """Record an ablation as `ablations/<experiment>-<ablation>-<name>.json`, its picture beside it.

    Args:
        folder: where `python -m reproduce.figure3` wrote, `outputs/figure3/<name>`.
        root: the results folder.

    Returns:
        Lines to print.

    Raises:
        ValueError: one line; a file is missing or damaged, or a combination has no finished run. Nothing is written.
    """
    source = Path(folder) / f"{NAME}.json"
    if not source.is_file():
        raise ValueError(f"no {source}: give the folder of an ablation, outputs/{NAME}/<name>")
    ablation = read(source)
    if lacks := missing(ablation["runs"]):
        raise ValueError(
            f"{folder} is not complete, no run of {', '.join(lacks)}: go on with {command(ablation)}"
        )
    stem = "-".join(ablation[key] for key in REQUIRED[:3])
    path, content = Path(root) / "ablations" / f"{stem}.json", dump(ablation)
    if path.exists():
        if path.read_text(encoding="utf-8") == content:
            return [f"{path} is already recorded, with the same content"]
        raise ValueError(
            f"{path} is already recorded, with other content: delete it first to replace it"
        )
    write(path.with_suffix(".png"), small_png(source.with_suffix(".png")))
    write(path, content)  # last: it counts as recorded from here on
    dirty = any(run["dirty"] for run in ablation["runs"])
    warning = "warning: some of its runs ran on uncommitted changes: their commit does not give their code"
    return [
        f"recorded {path}: {summary(verdicts(ablation['runs']))}",
        *([warning] if dirty else []),
    ]
