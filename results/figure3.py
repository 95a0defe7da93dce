"""Glow's Figure 3: {reverse, shuffle, invertible 1x1} x {additive, affine} compared.

`reproduce/figure3.py` trains the runs. This module decides whether their order is the paper's, and
writes the table for a terminal and for the results page.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from results import ROOT, is_number
from results.blocks import Block, Bullets, Code, Fold, Heading, Paragraph, Picture, Table
from results.checks import (
    anything,
    check,
    flag,
    list_of,
    mapping,
    number,
    one_of,
    or_null,
    record,
    stem,
    text,
)
from results.files import (
    NO_FILES,
    Addition,
    checked_json,
    is_new_record,
    matching_files,
    portable,
    small_png,
)
from results.formats import (
    commit,
    count,
    data_name,
    distinct,
    machine_text,
    mean_and_error,
    plus_minus,
    span,
    wall_time,
)

NAME = "figure3"
TITLE = "Glow's Figure 3"
PERMUTATIONS = ("reverse", "shuffle", "invertible")  # worst first, as the paper has it
COUPLINGS = ("additive", "affine")
COLUMNS = ("permutation", "coupling", "seeds", "test/bpd")
# Pairs of permutations, of which the first has the lower bits/dim in the paper.
ORDER = (("invertible", "shuffle"), ("shuffle", "reverse"), ("invertible", "reverse"))

# What the comparison of two combinations can show.
AGREES = "agrees"
DISAGREES = "disagrees"
NOISE = "within noise"
NOTHING_SHARED = "no seed in common"

T_QUANTILES = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
)  # for 1, 2, 3 ... degrees of freedom
T_QUANTILE_BEYOND = 2.23  # for ten, and close enough for more

POINT = check(  # images, seconds, val/bpd
    lambda row: isinstance(row, list) and len(row) == 3 and is_number(row[0]) and is_number(row[1])
)
RUN = record(
    {
        "permutation": one_of(*PERMUTATIONS),
        "coupling": one_of(*COUPLINGS),
        "seed": number,
        "test/bpd": anything,
        "val/bpd": anything,
        "images": number,
        "seconds": number,
        "skipped_steps": number,
        "commit": or_null(text),
        "dirty": flag,
        "device": text,
        "precision": text,
        "parameters": number,
        "curve": list_of(POINT),
    }
)
ABLATION = record(  # what a figure3.json holds
    {
        "experiment": stem,
        "ablation": stem,
        "name": stem,
        "overrides": list_of(text),
        "config": record(optional={"data": or_null(mapping), "flow": or_null(mapping)}),
        "runs": list_of(RUN, at_least=1),
    }
)

# Numbers


def seeds_of(runs: list[dict], permutation: str, coupling: str) -> dict[int, dict]:
    """The runs of one combination by seed."""
    combination = (permutation, coupling)
    by_seed = {
        run["seed"]: run for run in runs if (run["permutation"], run["coupling"]) == combination
    }
    return dict(sorted(by_seed.items()))


def name(run: dict) -> str:
    """The name of a run's folder: `<permutation>-<coupling>-seed<seed>`."""
    return f"{run['permutation']}-{run['coupling']}-seed{run['seed']}"


def missing(runs: list[dict]) -> list[str]:
    """The combinations without a run, as `<permutation>-<coupling>`."""
    return [f"{p}-{c}" for c in COUPLINGS for p in PERMUTATIONS if not seeds_of(runs, p, c)]


def claims() -> Iterator[tuple[str, tuple[str, str], tuple[str, str]]]:
    """The order that the paper's figure shows, pair by pair.

    Yields a label, the combination with the lower bits/dim, and the one with the higher.
    """
    for coupling in COUPLINGS:
        for low, high in ORDER:
            yield f"{coupling}: {low} < {high}", (low, coupling), (high, coupling)
    for permutation in PERMUTATIONS:
        label = f"{permutation}: affine < additive"
        yield label, (permutation, "affine"), (permutation, "additive")


def verdict(differences: list[float]) -> dict[str, Any]:
    """Whether differences (low minus high, one for each seed) agree with the paper.

    Returns:
        n: how many differences there are.
        mean, error: their mean and its standard error; None where there are too few of them.
        word: `within noise` with one seed, and where a two-sided t-test at 5 % finds nothing; else
            `agrees` where the mean is negative and `disagrees` where it is positive.
    """
    if not differences:
        return {"n": 0, "mean": None, "error": None, "word": NOTHING_SHARED}
    mean, error = mean_and_error(differences)
    word = NOISE
    if error is not None and mean != 0:
        word = word_of(mean, t_quantile(len(differences) - 1) * error)
    return {"n": len(differences), "mean": mean, "error": error, "word": word}


def word_of(mean: float, noise: float) -> str:
    """The verdict of a mean difference, of which nothing follows if it is below `noise`."""
    if abs(mean) < noise:
        return NOISE
    if mean < 0:
        return AGREES
    return DISAGREES


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, 4.30 for two degrees of freedom (three seeds)."""
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    return T_QUANTILE_BEYOND


def verdicts(runs: list[dict]) -> list[dict[str, Any]]:
    """A `verdict` with its `label` for each pair, over the seeds for which both runs are finite."""
    pairs = []
    for label, low, high in claims():
        differences = paired_differences(seeds_of(runs, *low), seeds_of(runs, *high))
        pairs.append({"label": label} | verdict(differences))
    return pairs


def paired_differences(lows: dict[int, dict], highs: dict[int, dict]) -> list[float]:
    """test/bpd of the first minus that of the second, for each seed for which both are finite."""
    values = [(lows[seed]["test/bpd"], highs[seed]["test/bpd"]) for seed in lows if seed in highs]
    return [low - high for low, high in values if is_number(low) and is_number(high)]


# Words


def rows(runs: list[dict]) -> list[list[str]]:
    """The cells of COLUMNS for each combination with a run."""
    return [
        [permutation, coupling, ", ".join(map(str, by_seed)), bpd_cell(list(by_seed.values()))]
        for coupling in COUPLINGS
        for permutation in PERMUTATIONS
        if (by_seed := seeds_of(runs, permutation, coupling))
    ]


def bpd_cell(runs: list[dict]) -> str:
    """`3.5120 ± 0.0040 (1 not finite)`: test/bpd over the seeds of a combination."""
    values = [run["test/bpd"] for run in runs if is_number(run["test/bpd"])]
    cell = "-"
    if values:
        cell = plus_minus(*mean_and_error(values))
    lost = len(runs) - len(values)
    if lost:
        cell += f" ({lost} not finite)"
    return cell


def verdict_line(pair: dict) -> str:
    """`additive: invertible < shuffle: -0.0120 ± 0.0030 over 3 seeds: agrees`."""
    if pair["mean"] is None:
        return f"{pair['label']}: {pair['word']}"
    seeds = f"{pair['n']} seeds".replace("1 seeds", "1 seed")
    difference = plus_minus(pair["mean"], pair["error"], "+.4f")
    return f"{pair['label']}: {difference} over {seeds}: {pair['word']}"


def summary(pairs: list[dict]) -> str:
    """One line: whether the order is the paper's, and how many pairs say so."""
    words = [pair["word"] for pair in pairs]
    parts = [
        f"{words.count(AGREES)} of {len(pairs)} pairs agree",
        f"{words.count(DISAGREES)} disagree",
        f"{words.count(NOISE)} within noise",
    ]
    if NOTHING_SHARED in words:
        parts.append(f"{words.count(NOTHING_SHARED)} without a seed in common")
    order = "(1x1 < shuffle < reverse, affine < additive)"
    return f"The order {answer(words)} {order}: {', '.join(parts)}"


def answer(words: list[str]) -> str:
    """The summary of all pairs' verdicts in a few words."""
    if DISAGREES in words:
        return "disagrees with the paper's"
    if set(words) <= {AGREES}:
        return "agrees with the paper's"
    if AGREES in words:
        return "does not contradict the paper's"
    return "is not decided"


def report(runs: list[dict]) -> str:
    """The table, a line for each pair, and the summary, for a terminal."""
    cells = [list(COLUMNS), *rows(runs)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *body = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
    pairs = verdicts(runs)
    lines = [head, "-" * len(head), *body, "", *map(verdict_line, pairs), summary(pairs)]
    return "\n".join(lines)


def command(ablation: dict) -> str:
    """The shell line that repeats an ablation."""
    seeds = sorted({run["seed"] for run in ablation["runs"]})
    module = f"reproduce.{ablation['ablation']}"
    argument = f"seeds=[{','.join(map(str, seeds))}]"
    return shlex.join(["python", "-m", module, argument, *ablation["overrides"]])


# The page


def section(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> list[Block]:
    """The section: a part for each ablation in results/ablations/; [] without any."""
    blocks: list[Block] = []
    for file_stem, ablation in read_all(root, new).items():
        blocks += part(file_stem, ablation)
    if blocks:
        return [Heading(TITLE), *blocks]
    return []


def part(file_stem: str, ablation: dict) -> list[Block]:
    """One ablation: summary, table, picture, command, and the verdicts and settings in a fold."""
    runs = ablation["runs"]
    pairs = verdicts(runs)
    details: list[Block] = [
        Paragraph(
            "Each pair of the paper's order, with differences between runs of the same seed. "
            "Within noise: a t-test at 5 % finds no difference, or there is one seed."
        ),
        Bullets([verdict_line(pair) for pair in pairs]),
        Paragraph(f"Runs: {'; '.join(settings(ablation))}."),
    ]
    skipped = [f"{run['skipped_steps']} in {name(run)}" for run in runs if run["skipped_steps"]]
    if skipped:
        details.append(Paragraph(f"Steps skipped as not finite: {', '.join(skipped)}."))
    return [
        Heading(file_stem, 3),
        Paragraph(f"{summary(pairs)}."),
        Table(list(COLUMNS), rows(runs)),
        Paragraph("Mean ± standard error over seeds."),
        Picture(f"ablations/{file_stem}.png", f"Curves of {file_stem}"),
        Code(command(ablation)),
        Fold("Pairs and settings", details),
    ]


def settings(ablation: dict) -> list[str]:
    """The settings of the runs: data, flow, images, machines, time."""
    runs = ablation["runs"]
    flow = ablation["config"].get("flow") or {}
    images = span([count(n) for n in sorted(run["images"] for run in runs)])
    return [
        f"data {data_name(ablation)}",
        *(f"flow.{key} {value}" for key, value in flow.items()),
        f"{images} images a run",
        distinct([machine_text(run["device"]) for run in runs], " and "),
        distinct([run["precision"] for run in runs], " and "),
        distinct([f"commit {commit(run)}" for run in runs], " and "),
        f"{wall_time(sum(run['seconds'] for run in runs))} in all",
    ]


# Files


def dump(ablation: dict) -> str:
    """A figure3.json as text, without absolute paths, and with null for NaN and infinity."""
    return json.dumps(portable(ablation), indent=1, allow_nan=False) + "\n"


def read(path: Path, content: bytes | None = None) -> dict:
    """Read a figure3.json. ValueError, one line that names the file and what is wrong with it."""
    return checked_json(
        path,
        ABLATION,
        damaged="is not valid JSON ({problem}): restore it, or repeat the ablation",
        unusable="lacks a usable {problem}: edited, or of another version? Repeat the ablation",
        content=content,
    )


def read_all(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> dict[str, dict]:
    """Every recorded ablation by the stem of its file. new: files that are not written yet.

    ValueError: an ablation cannot be read.
    """
    paths = matching_files(Path(root), "ablations/*.json", new)
    return {path.stem: read(path, new.get(path)) for path in paths}


def add(folder: str | Path, root: Path = ROOT) -> Addition:
    """The files that record an ablation: a JSON file in `ablations/`, and a picture beside it.

    Args:
        folder: where `python -m reproduce.figure3` wrote, `outputs/figure3/<name>`.
        root: the results folder.

    Returns:
        The files, which are not written here, and lines to print.

    Raises:
        ValueError: one line; a file is missing or damaged, or a combination has no finished run.
    """
    source = Path(folder) / f"{NAME}.json"
    if not source.is_file():
        raise ValueError(f"no {source}: give the folder of an ablation, outputs/{NAME}/<name>")
    ablation = read(source)
    incomplete = missing(ablation["runs"])
    if incomplete:
        names = ", ".join(incomplete)
        raise ValueError(
            f"{folder} is not complete, no run of {names}: go on with {command(ablation)}"
        )
    file_name = f"{ablation['experiment']}-{ablation['ablation']}-{ablation['name']}.json"
    path = Path(root) / "ablations" / file_name
    content = dump(ablation)
    if not is_new_record(path, content):
        return Addition(lines=[f"{path} is already recorded, with the same content"])
    picture = small_png(source.with_suffix(".png"))
    # The record comes last: the ablation counts as recorded from then on.
    files = {path.with_suffix(".png"): picture, path: content.encode()}
    lines = [f"recorded {path}: {summary(verdicts(ablation['runs']))}"]
    if any(run["dirty"] for run in ablation["runs"]):
        lines.append(
            "warning: some of its runs were made with uncommitted changes: "
            "their code is not that of their commit"
        )
    return Addition(files, lines)
