"""Whether an affine Glow stays finite: the page's section on `python -m benchmarks.stability`."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from results import ROOT, is_number
from results.blocks import Block, Code, Heading, Paragraph, Table
from results.checks import flag, list_of, number, or_null, record, text
from results.files import NO_FILES, checked_json
from results.formats import commit, distinct, fixed, machine_text, span

TITLE = "Stability"
MODEL = (
    "depth",
    "hidden_channels",
    "batch_size",
    "min_scale",
    "optim",
)  # equal in all runs of a file
RUN = record(
    {
        "seed": number,
        "depth": number,
        "hidden_channels": number,
        "batch_size": number,
        "optim": record({"name": text, "lr": number, "warmup_steps": number}),
        "steps": number,
        "skipped_steps": number,
        "bpd": list_of(or_null(number), at_least=1),
        "highest_rise": or_null(number),
        "round_trip_grey_levels": record({"images": or_null(number), "noise": or_null(number)}),
        "finite_T0.7": or_null(number),
        "finite_T1": or_null(number),
        "commit": or_null(text),
        "dirty": flag,
        "device": text,
    },
    optional={"min_scale": number},  # a run without it had 0, as the authors' code
)
FORM = record({"kind": text, "overrides": list_of(text), "runs": list_of(RUN, at_least=1)})
COLUMNS = [
    "runs",
    "size",
    "scales",
    "optimizer",
    "seeds",
    "steps",
    "skipped",
    "bpd of 256 fixed images",
    "highest rise",
    "round trip, images",
    "round trip, noise",
    "finite at T=0.7",
    "at T=1",
    "commit",
    "device",
]
TEXT = (
    "Affine Glow, on CIFAR-10 unless the command says otherwise. Each cell shows the worst seed; "
    "round trips are in grey levels, in float32. A step whose loss is not finite is skipped, and a "
    "run with too many of them ends early."
)


def model(run: dict) -> dict[str, Any]:
    """The values of MODEL, by dotted keys.

    Older runs were recorded without min_scale, and had 0, as the authors' code.
    """
    values = {"min_scale": 0.0} | {key: run[key] for key in MODEL if key in run}
    optim = values.pop("optim")
    return values | {f"optim.{key}": value for key, value in optim.items()}


def changes(old: dict, new: dict) -> tuple[str, str] | None:
    """What differs between two models, as `depth=4` and `depth=8`; None if nothing does."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if not keys:
        return None
    before, after = (" ".join(f"{key}={values.get(key)}" for key in keys) for values in (old, new))
    return before, after


def read(path: Path) -> dict:
    """The content of one file: kind, overrides and runs.

    ValueError, one line: benchmarks.stability has not written it, or its runs are of two models.
    """
    damaged = (
        "is not what benchmarks.stability writes ({problem}): restore it, or give another file"
    )
    unusable = damaged.replace("{problem}", "no usable {problem}")
    content = checked_json(path, FORM, damaged, unusable)
    first = model(content["runs"][0])
    for run in content["runs"]:
        change = changes(first, model(run))
        if change:
            raise ValueError(
                f"{path} mixes runs of {change[0]} and {change[1]}: "
                "give each model a file of its own"
            )
    return content


def read_all(root: Path = ROOT) -> dict[str, dict]:
    """The content of every recorded file by its stem."""
    return {path.stem: read(path) for path in sorted((Path(root) / "stability").glob("*.json"))}


def section(root: Path = ROOT, new: Mapping[Path, bytes] = NO_FILES) -> list[Block]:
    """The section: a row for each file in results/stability/; [] without any."""
    files = read_all(root)
    if not files:
        return []
    commands = [
        shlex.join(["python", "-m", "benchmarks.stability", content["kind"], *content["overrides"]])
        for content in files.values()
    ]
    rows = [[stem, *cells(content["runs"])] for stem, content in files.items()]
    return [
        Heading(TITLE),
        Paragraph(TEXT),
        Code("\n".join(commands)),
        Table(COLUMNS, rows),
    ]


def cells(runs: list[dict]) -> list[str]:
    """The cells of one file after its name. All of its runs have the same model."""
    shared = model(runs[0])
    size = (
        f"K={shared['depth']}, {shared['hidden_channels']} channels, batch {shared['batch_size']}"
    )
    errors = [run["round_trip_grey_levels"] for run in runs]
    return [
        size,
        scales(shared),
        f"{shared['optim.name']} {shared['optim.lr']:g}, warm-up {shared['optim.warmup_steps']}",
        str(len(runs)),
        span([str(steps) for steps in sorted(run["steps"] for run in runs)]),
        str(sum(run["skipped_steps"] for run in runs)),
        f"{bpd_range(runs, 0)} then {bpd_range(runs, -1)}",
        worst_of([run["highest_rise"] for run in runs]),
        worst_of([error["images"] for error in errors]),
        worst_of([error["noise"] for error in errors]),
        worst_of([run["finite_T0.7"] for run in runs], min, ".1%"),
        worst_of([run["finite_T1"] for run in runs], min, ".1%"),
        distinct([commit(run) for run in runs], ", "),
        distinct([machine_text(run["device"]) for run in runs], ", "),
    ]


def scales(shared: dict) -> str:
    """The lowest scale of the couplings; `authors'` if it is 0, as in the authors' code."""
    if shared["min_scale"]:
        return f"from {shared['min_scale']:g}"
    return "authors'"


def bpd_range(runs: list[dict], place: int) -> str:
    """`6.8 to 6.9`: the lowest and the highest finite bits/dim of all seeds at one step."""
    values = [run["bpd"][place] for run in runs if is_number(run["bpd"][place])]
    return f"{fixed(min(values, default=None))} to {fixed(max(values, default=None))}"


def worst_of(
    values: list[float | None],
    worst: Callable[[list[float]], float] = max,
    form: str = ".2g",
) -> str:
    """The worst finite value, by default the largest, and how many values were not finite."""
    finite = [value for value in values if is_number(value)]
    parts = []
    if finite:
        parts.append(format(worst(finite), form))
    if len(finite) < len(values):
        parts.append(f"not finite in {len(values) - len(finite)}")
    return ", ".join(parts)
